"""Train a model: quantization-aware with one of the QAT loops, or a float model.

python tools/train.py CONFIG [--resume] [--amp] [--work-dir DIR] [--cfg-options KEY=VALUE ...]
"""

from __future__ import annotations

import argparse

from mmengine.config import Config
from mmengine.runner import Runner

from mmrazor_quant.engine import CheckpointMatchHook, QATEpochBasedLoop, QATIterBasedLoop
from mmrazor_quant.engine.checkpoint import check_checkpoint, find_resumable_checkpoint
from mmrazor_quant.engine.launch import add_common_arguments, check_checkpoint_fields, load_config, run_tool
from mmrazor_quant.engine.quant_model import QuantModel, bare_model


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on with a run: from this checkpoint or, without one, from the last in the work directory',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--no-validate', action='store_true', help='do not validate during training')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size')
    return parser.parse_args()


def merge_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Merge the arguments of training into the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise ValueError(f'--amp needs optim_wrapper.type OptimWrapper or AmpOptimWrapper, but it is {kind!r}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if cfg.get('auto_scale_lr') is None:
            raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config')
        cfg.auto_scale_lr.enable = True


def choose_resume(cfg: Config, resume: str | None) -> str | None:
    """Decide what to resume from.

    Args:
        cfg: Config; ``resume`` and ``load_from`` are set.
        resume: Argument ``--resume``.

    Returns:
        What to tell the user.
    """
    if resume is None and not (cfg.get('resume') and cfg.get('load_from') is None):
        return None
    if resume in (None, 'auto'):
        path = find_resumable_checkpoint(cfg.work_dir)
        if path is None:
            # load_from stays: the run starts as it did, or would have done, without --resume.
            cfg.resume = False
            return f'No complete checkpoint in {cfg.work_dir} to resume from: starting from the beginning'
    else:
        path = resume
        check_checkpoint(path, '--resume')
    cfg.resume, cfg.load_from = True, path
    return f'Resuming from {path}'


def main() -> None:
    """Train."""
    args = parse_args()
    cfg = load_config(args)
    merge_arguments(cfg, args)
    message = choose_resume(cfg, args.resume)
    check_checkpoint_fields(cfg)
    runner = Runner.from_cfg(cfg)
    if message:
        runner.logger.info(message)
    runner.register_hook(CheckpointMatchHook())
    check_loop(runner)
    runner.train()


def check_loop(runner: Runner) -> None:
    """Refuse a training loop that would train a quantized model as a float one."""
    model = bare_model(runner)
    loop = runner.train_loop
    if (
        loop is not None
        and isinstance(model, QuantModel)
        and not isinstance(loop, (QATEpochBasedLoop, QATIterBasedLoop))
    ):
        raise ValueError(
            f"train_cfg: {type(loop).__name__} does not train quantized models; set type='mmrazor.QATEpochBasedLoop' "
            "or type='mmrazor.QATIterBasedLoop' in train_cfg"
        )


if __name__ == '__main__':
    run_tool(main)
