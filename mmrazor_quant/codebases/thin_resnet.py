"""The thin ResNets for CIFAR of the original paper, which mmcls does not have."""

from __future__ import annotations

from typing import Any

from mmcls.models.backbones.resnet import BasicBlock
from mmcls.models.backbones.resnet_cifar import ResNet_CIFAR


class ThinResNetCIFAR(ResNet_CIFAR):
    """ResNet of depth 6n + 2 for images of 32x32: three stages of n basic blocks with 16, 32 and 64 channels.

    He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2. Parameters are named as in mmcls.
    Configs name it by its full path, ``type='mmrazor_quant.codebases.thin_resnet.ThinResNetCIFAR'``, because this
    module is imported only where it is used: mmcls is not needed for detectors.

    Args:
        depth: 20, 32, 44, 56 or 110.
        **kwargs: Further arguments of mmcls's ``ResNet_CIFAR``.
    """

    arch_settings = {6 * n + 2: (BasicBlock, (n, n, n)) for n in (3, 5, 7, 9, 18)}

    def __init__(self, depth: int = 20, **kwargs: Any) -> None:
        shape = dict(
            stem_channels=16, base_channels=16, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)
        )
        super().__init__(depth, **{**shape, **kwargs})
