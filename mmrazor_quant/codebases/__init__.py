"""What is known of the OpenMMLab libraries: how to run their models on an example."""

from .examples import Example, build_examples, has_modes

__all__ = ['Example', 'build_examples', 'has_modes']
