# As yolox-nano_w8a8_coco94.py, with quantizers where ONNX Runtime has them. Its weights have no zero point, and its
# integers at most 8 bits: the tensor that needs 16, and with it the two layers at it, stay float.
_base_ = './yolox-nano_w8a8_coco94.py'

stem = [
    dict(name=name, a_qscheme='float') for name in ('backbone.stem.conv.conv', 'backbone.stage1.0.depthwise_conv.conv')
]
model = dict(quantizer=dict(backend='onnxruntime', qconfig=dict(w_qscheme=dict(is_symmetry=True), overrides=stem)))
