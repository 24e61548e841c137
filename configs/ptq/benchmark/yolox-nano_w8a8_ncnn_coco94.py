# As yolox-nano_w8a8_coco94.py, with quantizers where ncnn has them; all integers are in [-127, 127], without zero
# points. The layer that wants 16 bits there is float here.
_base_ = './yolox-nano_w8a8_coco94.py'

stem = dict(name='backbone.stage1.0.depthwise_conv.conv', w_qscheme='float', a_qscheme='float')
model = dict(
    quantizer=dict(
        backend='ncnn',
        qconfig=dict(
            w_qscheme=dict(is_symmetry=True, is_symmetric_range=True),
            a_qscheme=dict(is_symmetry=True, is_symmetric_range=True),
            overrides=[stem],
        ),
    )
)
