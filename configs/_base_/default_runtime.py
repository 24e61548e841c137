# What all configs with data of this project share.
_base_ = 'mmcls::_base_/default_runtime.py'

# More than one checkpoint is kept: if the machine dies while one is written, the one before is there. The QAT loops
# write each of them whole or not at all.
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
