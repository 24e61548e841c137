# Quantization-aware training of Jacob et al. 2018, section 3, from a float checkpoint, as variables: activations are
# quantized after an epoch of observation, batch norms are folded with the statistics of the batch until they freeze.
# For a total batch of 256 images.
qat_loop = dict(
    type='mmrazor.QATEpochBasedLoop',
    max_epochs=10,
    val_interval=1,
    act_quant_begin=1,
    freeze_bn_begin=6,
)
qat_optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.001, momentum=0.9, weight_decay=1e-4),
)
# A list replaces whatever the stock config has.
qat_param_scheduler = [dict(type='CosineAnnealingLR', T_max=10, by_epoch=True, convert_to_iter_based=True)]
