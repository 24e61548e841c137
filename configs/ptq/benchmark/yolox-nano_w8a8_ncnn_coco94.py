# As yolox-nano_w8a8_coco94.py, with quantizers where ncnn has them; all integers are in [-127, 127], without zero
# points. That leaves the first stages, whose activations reach far, too few steps: their small layers are float.
_base_ = './yolox-nano_w8a8_coco94.py'

float_layers = ['backbone.stage1.0.*', 'backbone.stage2.0.*', 'backbone.stage2.1.blocks.*.depthwise_conv.conv']
model = dict(
    quantizer=dict(
        backend='ncnn',
        qconfig=dict(
            w_qscheme=dict(is_symmetry=True, is_symmetric_range=True),
            a_qscheme=dict(is_symmetry=True, is_symmetric_range=True),
            overrides=[dict(name=name, w_qscheme='float', a_qscheme='float') for name in float_layers],
        ),
    )
)
