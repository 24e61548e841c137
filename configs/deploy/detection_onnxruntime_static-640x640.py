# Images of 640x640.
_base_ = './_base_/detection_onnxruntime.py'

onnx_config = dict(input_shape=(640, 640))
