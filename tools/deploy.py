"""Export a quantized detector with mmdeploy: one ONNX file with NMS inside, and the boxes compared.

python tools/deploy.py DEPLOY_CFG MODEL_CFG CHECKPOINT IMG --work-dir DIR

DEPLOY_CFG is one of configs/deploy, MODEL_CFG the config that CHECKPOINT was quantized with, which has to place its
quantizers for the backend (model.quantizer.backend). The arguments are those of mmdeploy's own tools/deploy.py, which
works on them, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.logging import MMLogger

from mmrazor_quant.backends.deploy import backend_module
from mmrazor_quant.engine.launch import run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('deploy_cfg', help='deploy config')
    parser.add_argument('model_cfg', help='config of the quantized model')
    parser.add_argument('checkpoint', help='quantized checkpoint')
    parser.add_argument('img', help='image to export with')
    parser.add_argument('--test-img', help='image to compare boxes on; default: the same')
    parser.add_argument('--work-dir', type=Path, default=Path.cwd(), help='where to; default: the current folder')
    parser.add_argument('--device', default='cpu', help='device of mmdeploy')
    parser.add_argument(
        '--log-level', default='WARNING', choices=['DEBUG', 'INFO', 'WARNING', 'ERROR'], help='what is logged'
    )
    return parser.parse_args()


def check_files(args: argparse.Namespace) -> None:
    """Refuse paths that are no files, before any work.

    Args:
        args: Parsed arguments.

    Raises:
        FileNotFoundError: Naming the argument.
    """
    for field in ('deploy_cfg', 'model_cfg', 'checkpoint', 'img', 'test_img'):
        path = getattr(args, field)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f'{field}: there is no file {path}')


def main() -> None:
    """Deploy."""
    args = parse_args()
    check_files(args)
    backend_module('onnxruntime', 'runtime')
    try:
        from mmrazor_quant.backends.mmdeploy.deploy import compare, deploy
    except ModuleNotFoundError as error:
        raise ImportError(
            f'tools/deploy.py needs the package {error.name}; docs/deployment.md tells how mmdeploy is installed'
        ) from error
    from mmrazor_quant.backends.onnxruntime.runtime import layers

    MMLogger.get_instance('mmdeploy', logger_name='mmdeploy', log_level=args.log_level)
    common = args.deploy_cfg, args.model_cfg, args.checkpoint
    files = deploy(*common, args.img, args.work_dir, args.device)
    agreement = compare(*common, args.test_img or args.img, files, args.work_dir, args.device)
    print(f'{files[0]}: layers {layers(Path(files[0]))}\n{agreement}')


if __name__ == '__main__':
    run_tool(main)
