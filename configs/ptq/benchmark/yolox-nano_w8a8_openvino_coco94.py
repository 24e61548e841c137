# As yolox-nano_w8a8_coco94.py, with quantizers where OpenVINO has them. Its weights have no zero point, and its
# integers at most 8 bits: the tensor behind the stem, which needs 16, stays float, and so does the layer that reads it.
_base_ = './yolox-nano_w8a8_coco94.py'

override = dict(name='backbone.stage1.0.depthwise_conv.conv', a_qscheme='float')
model = dict(quantizer=dict(backend='openvino', qconfig=dict(w_qscheme=dict(is_symmetry=True), overrides=[override])))
