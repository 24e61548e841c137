# As yolox-nano_qdrop_w6a8_coco94.py, with 4-bit weights.
_base_ = './yolox-nano_qdrop_w6a8_coco94.py'

model = dict(quantizer=dict(qconfig=dict(w_qscheme=dict(bit=4))))
