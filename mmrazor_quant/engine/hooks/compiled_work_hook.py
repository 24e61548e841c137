"""Keep in checkpoints how far the compiler had been called in."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmrazor_quant.ops import compiled
from mmrazor_quant.registry import HOOKS

KEY = 'compiled_work'
"""Name of the entry in the checkpoint."""


@HOOKS.register_module()
class CompiledWorkHook(Hook):
    """Let a resumed training compile a function in the same iteration as the uninterrupted one would.

    Compiled functions sum in another order than eager ones, which shows in the last bits of gradients.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down the work done so far.

        Args:
            runner: Runner of the model.
            checkpoint: What will be written to the file.
        """
        checkpoint[KEY] = dict(compiled.switch.done)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on from the work that was done by the process that is being resumed.

        Args:
            runner: Runner of the model.
            checkpoint: What was read from the file.
        """
        if runner._resume:
            compiled.switch.done = dict(checkpoint.get(KEY, {}))
