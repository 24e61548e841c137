# As yolox-nano_w8a8_coco94.py, with 6-bit weights reconstructed by QDrop; first layer and prediction layers at 8 bits.
_base_ = './yolox-nano_w8a8_coco94.py'

eight = dict(w_qscheme=dict(bit=8))
qconfig = dict(
    w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.QDropFakeQuantize'),
    w_qscheme=dict(bit=6),
    overrides=[
        _base_.stem,
        dict(eight, order='first'),
        dict(eight, name='bbox_head.multi_level_conv_*'),
    ],
)
model = dict(quantizer=dict(qconfig=qconfig))
test_cfg = dict(reconstruction=dict(type='mmrazor.QDrop', iters=300, batch_size=8, cache_gib=4.0))
