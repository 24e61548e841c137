"""Running files of dynamic quantization: ONNX Runtime itself."""

from mmrazor_quant.backends.onnxruntime.runtime import Session, layers

__all__ = ['Session', 'layers']
