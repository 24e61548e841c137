"""A backbone of one's own, as it would stand in a package of one's own; nothing in it knows of quantization."""

from __future__ import annotations

from collections.abc import Sequence

from mmcls.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


class Block(BaseModule):
    """Depthwise and pointwise convolution, with the input added where the shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 5, stride, padding=2, groups=in_channels, bias=False)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.activate = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        out = self.norm2(self.pointwise(self.activate(self.norm1(self.depthwise(x)))))
        return self.activate(out + x if out.shape == x.shape else out)


@MODELS.register_module()
class TinyNet(BaseModule):
    """A small convolutional backbone.

    Args:
        widths: channels of the stages; each but the first halves the image.
        depth: blocks in each stage.
        init_cfg: mmengine's initialisation config.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), depth: int = 2, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]))
        blocks, before = [], widths[0]
        for index, width in enumerate(widths):
            for i in range(depth):
                blocks.append(Block(before, width, stride=2 if index and i == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images [N, 3, H, W] to one feature map [N, widths[-1], H / 4, W / 4]."""
        return (self.blocks(self.stem(x)),)
