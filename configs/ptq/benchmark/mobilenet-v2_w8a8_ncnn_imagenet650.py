# As mobilenet-v2_w8a8_imagenet650.py, with quantizers where ncnn has them; all integers are in [-127, 127], without
# zero points.
_base_ = './mobilenet-v2_w8a8_imagenet650.py'

w_qscheme = dict(is_symmetric_range=True)
a_qscheme = dict(is_symmetry=True, is_symmetric_range=True)
model = dict(quantizer=dict(backend='ncnn', qconfig=dict(w_qscheme=w_qscheme, a_qscheme=a_qscheme)))
