"""Refuse checkpoints of another network."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmrazor_quant.engine.checkpoint import check_checkpoint_matches
from mmrazor_quant.engine.quant_model import bare_model
from mmrazor_quant.registry import HOOKS


@HOOKS.register_module()
class CheckpointMatchHook(Hook):
    """Stop when a loaded checkpoint has nothing in common with the model, instead of going on with random weights."""

    # Before EMAHook, which loads the checkpoint into its own copy of the model.
    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the checkpoint before it is loaded into the model.

        Args:
            runner: Runner of the model.
            checkpoint: What was read from the file.

        Raises:
            ValueError: If nothing matches in name and shape.
        """
        model = bare_model(runner)
        check_checkpoint_matches(checkpoint, model)
