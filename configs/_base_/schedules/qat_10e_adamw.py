# As qat_10e.py, for transformers and other networks with layer norms. For a total batch of 1,024 images.
_base_ = './qat_10e.py'

qat_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-5, weight_decay=1e-8),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
