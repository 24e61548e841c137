# Post-training quantization to 8 bits: python tools/test.py configs/quickstart/ptq_w8a8.py
# The float config, with its model put into a quantizer and its test loop replaced.
_base_ = ['float.py']

work_dir = 'work_dirs/quickstart/ptq_w8a8'

model = dict(
    _delete_=True,
    type='mmrazor.GeneralQuant',
    architecture={{_base_.model}},
    float_checkpoint='work_dirs/quickstart/float/epoch_30.pth',
    input_shape=(1, 8, 8),
    quantizer=dict(
        type='mmrazor.CustomQuantizer',
        # Where quantizers are: as ONNX Runtime runs them.
        backend='onnxruntime',
        qconfig=dict(
            w_qscheme=dict(bit=8, is_symmetry=True, is_per_channel=True),
            a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
            w_observer=dict(type='mmrazor.MinMaxObserver'),
            a_observer=dict(type='mmrazor.EMAMinMaxObserver'),
        ),
    ),
)

# Calibrates on the training split, saves quantized.pth, evaluates the float and the quantized model on the test split.
test_cfg = dict(_delete_=True, type='mmrazor.PTQLoop', calibrate_steps=10)
