"""Evaluate a model; one that is not calibrated yet is calibrated first, evaluated float and quantized, and saved.

python tools/test.py CONFIG                 calibrate, save quantized.pth in the work directory, evaluate both
python tools/test.py CONFIG float.pth       the same, from the weights of a float checkpoint
python tools/test.py CONFIG quantized.pth   evaluate the quantized model
python tools/test.py CONFIG quantized.pth --tta    the same with the test-time augmentation of the config
python tools/test.py CONFIG --backend B --model DIR    float, fake-quantized and deployed model, see tools/export.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from mmrazor_quant.backends.deploy import read_report
from mmrazor_quant.engine import CheckpointMatchHook, DeployLoop, PTQLoop, QuantEvalHook
from mmrazor_quant.engine.checkpoint import check_checkpoint
from mmrazor_quant.engine.launch import add_common_arguments, check_checkpoint_fields, load_config, run_tool
from mmrazor_quant.engine.quant_model import QuantModel, bare_model


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument('checkpoint', nargs='?', help='float or quantized checkpoint')
    parser.add_argument('--out', metavar='FILE', help='write predictions (.pkl) or metrics (.json) to this file')
    parser.add_argument('--tta', action='store_true', help="evaluate with the config's tta_model and tta_pipeline")
    parser.add_argument('--backend', help='evaluate what tools/export.py made for this backend, too; needs --model')
    parser.add_argument('--model', metavar='DIR', help='folder that tools/export.py wrote')
    parser.add_argument('--threads', type=int, default=1, help='threads of the backend')
    args = parser.parse_args()
    if (args.backend is None) != (args.model is None) or (args.backend is not None and args.tta):
        parser.error('--backend and --model go together, and not with --tta')
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle', '.json')):
        parser.error(f'--out must end in .pkl (predictions) or .json (metrics), but got {args.out}')
    return args


def prepare(runner: Runner, has_weights: bool) -> None:
    """Register the hooks of a test, and check that there is something to test.

    Args:
        runner: Runner of the model.
        has_weights: Whether the command line or the config name a checkpoint.

    Raises:
        ValueError: If a float model would be tested with random weights.
    """
    runner.register_hook(CheckpointMatchHook())
    is_quantized = isinstance(bare_model(runner), QuantModel)
    if not has_weights and not is_quantized:
        raise ValueError('checkpoint: a float model is tested with weights; give a checkpoint, or set load_from')
    if not has_weights:
        runner.logger.warning(
            'No checkpoint, model.float_checkpoint or load_from is given: unless the architecture came with its '
            'weights, it is random weights that are quantized'
        )
    if is_quantized and not isinstance(runner.test_loop, (PTQLoop, DeployLoop)):
        runner.register_hook(QuantEvalHook())


def use_test_time_augmentation(cfg: Config) -> None:
    """Test a model that is quantized already on several versions of each image.

    Args:
        cfg: Config, changed in place: ``tta_model`` wraps the model, ``tta_pipeline`` makes the versions.

    Raises:
        ValueError: If the config has no such fields.
    """
    missing = [field for field in ('tta_model', 'tta_pipeline') if cfg.get(field) is None]
    if missing:
        raise ValueError(f'--tta: the config has no {" and no ".join(missing)}, which say what is averaged')
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    cfg.test_cfg = dict(type='TestLoop')
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def use_backend(cfg: Config, args: argparse.Namespace) -> None:
    """Test a deployed model beside the float and the fake-quantized one.

    Args:
        cfg: Config, changed in place.
        args: Command line; without a checkpoint, that of the export is taken.
    """
    cfg.load_from = args.checkpoint or read_report(Path(args.model))['checkpoint']
    check_checkpoint(cfg.load_from, 'checkpoint')
    cfg.test_cfg = dict(type='mmrazor.DeployLoop', backend=args.backend, folder=args.model, threads=args.threads)


def main() -> None:
    """Test."""
    args = parse_args()
    check_checkpoint(args.checkpoint, 'checkpoint')
    cfg = load_config(args)
    cfg.resume = False
    if args.checkpoint is not None:
        cfg.load_from = args.checkpoint
    check_checkpoint_fields(cfg)
    if cfg.get('test_dataloader') is None:
        raise ValueError(f'config: {args.config} has no test_dataloader, test_evaluator and test_cfg')
    if args.backend is not None:
        use_backend(cfg, args)
    has_weights = bool(cfg.get('load_from') or cfg.model.get('float_checkpoint'))
    if args.tta:
        use_test_time_augmentation(cfg)
    runner = Runner.from_cfg(cfg)
    prepare(runner, has_weights)
    if args.out is not None and not args.out.endswith('.json'):
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out is not None and args.out.endswith('.json'):
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    run_tool(main)
