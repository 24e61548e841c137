# Images of 416x416, as YOLOX-nano is trained for.
_base_ = './_base_/detection_onnxruntime.py'

onnx_config = dict(input_shape=(416, 416))
