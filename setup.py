"""Packaging of mmrazor_quant. For a working environment with pinned versions use ``make env``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Reads the version from the source: importing the package would need its dependencies."""
    source = (HERE / 'mmrazor_quant' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", source, re.MULTILINE)[1]


# mmcv is in the extra `detection` only, though mmcls imports it too: it is published as source, and its build
# needs care (tools/env/mmcv_wheel.py). Without detection, mmcv-lite 2.0.x is enough; it must not be installed
# beside mmcv, because both unpack into the same folder.
INSTALL_REQUIRES = [
    'torch>=2.6',
    'mmengine>=0.10.4',
    'mmcls>=1.0.0rc6,<2',
    'numpy>=1.23',
]

EXTRAS = {
    # mmcls 1.0.0rc6 refuses mmcv 2.1 and later.
    'detection': ['mmdet>=3.3,<3.4', 'mmcv>=2.0.1,<2.1', 'pycocotools>=2.0.6'],
    'deployment': ['onnx>=1.16', 'onnxruntime>=1.18', 'openvino>=2024.0', 'ncnn>=1.0.20240820', 'pnnx>=20240819'],
    # mmdeploy itself asks for protobuf<=3.20.2, which onnx does not go with, and works with newer ones: it is installed
    # by `pip install --no-deps mmdeploy==1.3.1`; these are the other packages that it imports.
    'mmdeploy': ['aenum>=3.1', 'dill>=0.3', 'multiprocess>=0.70', 'prettytable>=3.0', 'terminaltables>=3.1'],
    'quickstart': ['scikit-learn>=1.3'],
    'dev': ['ruff', 'pytest>=8', 'pytest-xdist>=3.5', 'hypothesis>=6.100'],
}

setup(
    name='mmrazor_quant',
    version=read_version(),
    description='Quantization for OpenMMLab models: PTQ, QAT, mixed precision and export to inference backends',
    packages=find_packages(include=['mmrazor_quant', 'mmrazor_quant.*']),
    python_requires='>=3.9',
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
)
