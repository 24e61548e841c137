# As mobilenet-v2_qdrop_w4a4_imagenet650.py, with 8-bit activations and reconstructed by AdaRound.
_base_ = './mobilenet-v2_qdrop_w4a4_imagenet650.py'

qconfig = dict(a_qscheme=dict(bit=8))
model = dict(quantizer=dict(qconfig=qconfig))
test_cfg = dict(reconstruction=dict(type='mmrazor.AdaRound'))
