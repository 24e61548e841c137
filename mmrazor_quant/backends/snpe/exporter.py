"""Files for SNPE and QNN: float ONNX with encodings for their converters, and Q/DQ ONNX for ONNX Runtime.

* ``model.onnx``: the float network, its weights on their grids, and ``encodings_VERSION.json``, which say the grids.
* ``model_qdq.onnx``: the same with uint8 Q/DQ pairs around every operation, integer weights and int32 biases.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from mmrazor_quant.backends.intermediate import Intermediate
from mmrazor_quant.backends.simplify import simplify

from .encodings import VERSIONS
from .float_file import to_float
from .qdq_file import to_qnn
from .spread import spread

FILE, FLOAT_FILE = 'model_qdq.onnx', 'model.onnx'
ENCODINGS = 'encodings_{}.json'


def write(network: Intermediate, folder: Path) -> Path:
    """Writes the files.

    Args:
        network: intermediate form.
        folder: where to; it exists.

    Returns:
        Path of the Q/DQ file, which is the one that runs.

    Raises:
        ValueError: sizes vary, which QNN's HTP does not know, or a tensor has two grids.
    """
    if any(d.dim_param for d in network.onnx.graph.input[0].type.tensor_type.shape.dim):
        raise ValueError(
            '--dynamic-batch, --dynamic-size: given, allowed with --backend snpe: neither, since its graphs have fixed '
            'sizes'
        )
    network = simplify(network)
    model, encodings = to_float(spread(network))
    onnx.save(model, folder / FLOAT_FILE)
    for version, written in VERSIONS.items():
        (folder / ENCODINGS.format(version)).write_text(json.dumps(written(encodings), indent=1))
    onnx.save(to_qnn(spread(network, pairs=True)), folder / FILE)
    return folder / FILE


def next_steps(file: Path, *_: object) -> list[str]:
    """Returns what reads the encodings on a machine with Qualcomm's SDK.

    Args:
        file: path of the Q/DQ file.
    """
    model, encodings = file.parent / FLOAT_FILE, file.parent / ENCODINGS.format('1.0.0')
    arguments = f'--input_network {model} --quantization_overrides {encodings}'
    return [f'QNN: qnn-onnx-converter {arguments}', f'SNPE: snpe-onnx-to-dlc {arguments}']
