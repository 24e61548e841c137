"""The file for OpenVINO: ONNX as for ONNX Runtime, from a model whose quantizers are placed by OpenVINO's table."""

from mmrazor_quant.backends.onnxruntime.exporter import FILE, write

__all__ = ['FILE', 'write']
