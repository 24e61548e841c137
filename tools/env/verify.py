"""Checks inside the virtual environment that the installed stack works together."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

# mmcv.ops fails where its compiled part does not match torch, cv2 where system libraries are missing.
MODULES = ('torch', 'cv2', 'mmengine', 'mmcv.ops', 'mmcls.models', 'mmdet.models')
# mmengine asks for opencv-python by name; the headless build provides the same module without libGL. mmdeploy 1.3.1
# works with newer versions of protobuf than it asks for, and imports grpcio for a backend that is not used here.
NOT_NEEDED = ('opencv-python', 'mmdeploy 1.3.1 has requirement protobuf', 'mmdeploy 1.3.1 requires grpcio')


def unmet_requirements() -> list[str]:
    """Returns what ``pip check`` complains of, less what does no harm."""
    result = subprocess.run([sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return []
    return [line for line in result.stdout.splitlines() if not any(known in line for known in NOT_NEEDED)]


def check_inherited_config() -> None:
    """Loads a config that inherits from the ones shipped inside mmcls."""
    from mmengine.config import Config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config.py'
        path.write_text("_base_ = ['mmcls::resnet/resnet18_8xb32_in1k.py']\n", encoding='utf-8')
        backbone = Config.fromfile(path).model.backbone
    if backbone.depth != 18:
        raise RuntimeError(f'mmcls::resnet/resnet18_8xb32_in1k.py gave the backbone {backbone}')


def main() -> None:
    """Raises, or ends with a non-zero status, at the first thing that does not work."""
    unmet = unmet_requirements()
    if unmet:
        sys.exit('requirements that do not fit:\n' + '\n'.join(unmet))
    for name in MODULES:
        print(f'importing {name}', flush=True)
        importlib.import_module(name)
    check_inherited_config()
    # Only found, not imported: an error in the package itself is for its tests to show.
    if importlib.util.find_spec('mmrazor_quant') is None:
        sys.exit('mmrazor_quant is not installed')


if __name__ == '__main__':
    main()
