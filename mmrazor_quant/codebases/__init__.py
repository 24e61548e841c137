"""What is known of the OpenMMLab libraries: how to run their models on an example."""

from .examples import Example, build_examples, codebase_of, has_modes, run_mode

__all__ = ['Example', 'build_examples', 'codebase_of', 'has_modes', 'run_mode']
