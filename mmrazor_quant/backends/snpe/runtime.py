"""Running the Q/DQ file on the simulator of QNN's HTP; where there is none, ONNX Runtime stands in for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from mmrazor_quant.backends.session import Layers
from mmrazor_quant.backends.stand_in import SessionOrStandIn
from mmrazor_quant.backends.stand_in import layers as layers_of_file

PROVIDER = 'QNNExecutionProvider'


class Session(SessionOrStandIn):
    """A file, ready to run.

    Args:
        file: path of the Q/DQ file.
        threads: threads of a run, where it is not on the simulator.
    """

    def __init__(self, file: Path, threads: int = 1) -> None:
        super().__init__(Simulator, missing(), file, threads)


def missing() -> str | None:
    """Returns why QNN cannot run here, or None."""
    try:
        import onnxruntime_qnn  # noqa: F401
    except ImportError as error:
        return f"QNN's simulator is not there ({error}; pip install onnxruntime-qnn)"
    return None


def layers(file: Path) -> Layers:
    """Counts the layers with quantized input and weight, which the HTP runs in integers, and the others.

    Args:
        file: path of the Q/DQ file.
    """
    return layers_of_file(file)


class Simulator:
    """A file on the HTP's simulator, which the package ``onnxruntime-qnn`` has for x86.

    Args:
        file: path of the Q/DQ file.
        only: whether an operation that the HTP does not take is an error; it runs on CPU otherwise.
    """

    def __init__(self, file: Path, only: bool = False) -> None:
        import onnxruntime_qnn

        if PROVIDER not in {device.ep_name for device in onnxruntime.get_ep_devices()}:
            onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if only:
            options.add_session_config_entry('session.disable_cpu_ep_fallback', '1')
        options.add_provider_for_devices(devices, {'backend_path': onnxruntime_qnn.get_qnn_htp_path()})
        self._session = onnxruntime.InferenceSession(str(file), options)
        (given,) = self._session.get_inputs()
        self.shape = tuple(given.shape)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Runs a batch that fits :attr:`shape`; returns the outputs."""
        return self._session.run(None, {'input': images})
