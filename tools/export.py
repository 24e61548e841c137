"""Export a quantized model to a backend's file, run the file, and compare.

python tools/export.py CONFIG quantized.pth --backend onnxruntime --out DIR
python tools/test.py CONFIG --backend onnxruntime --model DIR        its accuracy

CONFIG has to be one whose quantizers are placed for the backend (model.quantizer.backend). DIR gets the file and
deploy.json: scales, zero points and bits of each tensor, versions, and the comparison.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor

from mmrazor_quant.backends.deploy import DEPLOYABLE, backend_module
from mmrazor_quant.backends.loading import load_quantized
from mmrazor_quant.engine.checkpoint import check_checkpoint
from mmrazor_quant.engine.launch import add_common_arguments, load_config, run_tool
from mmrazor_quant.engine.quant_model import QuantModel


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='quantized checkpoint')
    parser.add_argument('--backend', required=True, help=f'one of {", ".join(DEPLOYABLE)}')
    parser.add_argument('--out', required=True, type=Path, metavar='DIR', help='where to')
    parser.add_argument(
        '--input-shape',
        type=int,
        nargs=4,
        metavar='N',
        help='batch, channels, height, width; default: those of a batch of the test data',
    )
    parser.add_argument('--dynamic-batch', action='store_true', help='let the file take any batch size')
    parser.add_argument('--dynamic-size', action='store_true', help='let the file take images of any size')
    args = parser.parse_args()
    if args.input_shape is not None and min(args.input_shape) < 1:
        parser.error(f'--input-shape takes numbers from 1 up, got {args.input_shape}')
    return args


def example_images(cfg: Config, model: QuantModel, shape: list[int] | None) -> Tensor:
    """Give preprocessed images: of the test data, or random ones where there are none, or none of the shape.

    Args:
        cfg: Config.
        model: Model, with its preprocessor.
        shape: Shape wanted; None: that of a batch of the test data.

    Returns:
        The images.

    Raises:
        ValueError: If there are neither data nor a shape.
    """
    images, reason = read_images(cfg, model)
    if images is None and shape is None:
        raise ValueError(f'--input-shape: not given, and {reason}; give it, such as 1 3 224 224')
    if shape is None:
        return images
    if images is not None and list(images.shape[1:]) == shape[1:]:
        return images.repeat(-(-shape[0] // len(images)), 1, 1, 1)[: shape[0]]
    reason = reason or f'the test data are images of {list(images.shape[1:])}'
    print(f'{reason}: the comparison is on random images')
    return torch.randn(shape)


def read_images(cfg: Config, model: QuantModel) -> tuple[Tensor | None, str]:
    """Read a batch of the test data; returns None and the reason where there is none."""
    if cfg.get('test_dataloader') is None:
        return None, 'the config has no test_dataloader'
    try:
        batch = next(iter(Runner.build_dataloader(cfg.test_dataloader, seed=0)))
    except OSError as error:
        return None, f'the test data cannot be read ({error})'
    return model.data_preprocessor(batch, False)['inputs'], ''


def main() -> None:
    """Export."""
    args = parse_args()
    check_checkpoint(args.checkpoint, 'checkpoint')
    backend_module(args.backend, 'exporter')
    from mmrazor_quant.engine.deployment import describe, export

    cfg = load_config(args)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = load_quantized(cfg.model, args.checkpoint, args.backend)
        images = example_images(cfg, model, args.input_shape)
        dynamic = ([0] if args.dynamic_batch else []) + ([2, 3] if args.dynamic_size else [])
        print(describe(export(model, images, args.backend, args.out, dynamic, args.checkpoint)))


if __name__ == '__main__':
    run_tool(main)
