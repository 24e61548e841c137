# As qat_det_6e.py, for detectors that are trained with AdamW.
_base_ = './qat_det_6e.py'

qat_optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-5, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
