# MobileNetV2: 4-bit weights and 8-bit activations, first and last layer 8 bits, reconstructed by AdaRound on 200 images
# of ImageNet, evaluated on 650 others. Float: 78.46 %, which is not comparable with results on the whole validation
# set.
_base_ = './mobilenet-v2_w8a8_imagenet650.py'

qconfig = dict(
    _delete_=True,
    qtype='affine',
    w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    a_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.QDropFakeQuantize'),
    w_qscheme=dict(bit=4, is_symmetry=True, is_per_channel=True),
    a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
    overrides=[
        dict(order='first', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
        dict(order='last', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
    ],
)
model = dict(quantizer=dict(qconfig=qconfig))
test_cfg = dict(reconstruction=dict(type='mmrazor.AdaRound', iters=300, batch_size=16, cache_gib=2.0))
