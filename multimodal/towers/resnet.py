"""The residual network of CLIP, as open_clip builds it."""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field, Strict
from torch import nn

from multimodal.towers.batch_norm import normalise_globally
from multimodal.towers.images import ImageEncoder, ImagePreprocessor, ImageTower
from multimodal.towers.transformer import depths


class ResNetEncoder(ImageEncoder):
    """The network is open_clip's `ModifiedResNet`; its attention pooling ends in a projection of its own."""

    def depths(self) -> list[list[nn.Parameter]]:
        blocks = nn.ModuleList(block for k in (1, 2, 3, 4) for block in getattr(self.net, f"layer{k}"))
        return depths(self.net, blocks, self.net.attnpool)


class ResNet(ImageTower):
    """ModifiedResNet of CLIP: three stem convolutions, anti-aliased strides, attention pooling.

    Its batch norm takes the statistics of the global batch, over all ranks.
    """

    layers: Annotated[tuple[int, int, int, int], Strict(False)]
    """Bottleneck blocks in each of the four stages."""
    width: int = Field(gt=0)
    """Channels after the stem; the last stage has 32 times as many."""
    heads: int = Field(gt=0)
    """Heads of the attention pooling; divides 32 times the width."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.image_size % 32:
            yield "image_size", f"{self.image_size} is not divisible by 32, the stride of the network"
        if self.width * 32 % self.heads:
            yield "heads", f"{self.heads} does not divide 32 times width={self.width}"

    def build(self, preprocessor: ImagePreprocessor, embed_dim: int, saved: bool = False) -> ResNetEncoder:
        from open_clip.modified_resnet import ModifiedResNet

        net = ModifiedResNet(list(self.layers), embed_dim, self.heads, self.image_size, self.width)
        normalise_globally(net)
        net.to(memory_format=torch.channels_last)  # 1.3 times as fast on a CPU, with the same result
        return ResNetEncoder(net, nn.Identity(), embed_dim, self.mean, self.std)
