"""The Vision Transformer of CLIP, as open_clip builds it."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from multimodal.parts import Operational
from multimodal.towers.images import ImageEncoder, ImagePreprocessor, ImageTower
from multimodal.towers.projection import Projection, check_width, projection
from multimodal.towers.transformer import (
    Activation,
    activation_layer,
    adapt,
    depths,
    norm_layer,
    one_token,
)


class PatchDropout(nn.Module):
    """Open_clip's draws on the CPU, and a GPU waits for it: this one draws the same on the device of its input."""

    prob: float

    def forward(
        self,
        x: Tensor,  # [n, 1 + P, W]
    ) -> Tensor:  # [n, 1 + K, W]
        """The class token and, in training, some of the patches, others for each image."""
        if not self.training:
            return x
        count, patches = x.shape[0], x.shape[1] - 1
        kept = torch.randn(count, patches, device=x.device).topk(max(1, int(patches * (1 - self.prob)))).indices
        rows = torch.arange(count, device=x.device)[:, None]
        return torch.cat([x[:, :1], x[:, 1:][rows, kept]], dim=1)


class ViTEncoder(ImageEncoder):
    """The network is open_clip's `VisionTransformer` without its projection."""

    def features(self, pixels: Tensor) -> Tensor:
        """Where the class token is pooled, no more than it needs."""
        net = self.net
        if net.attn_pool is not None or net.pool_type != "tok":
            return super().features(pixels)
        x = net._embeds(pixels)  # [n, 1 + P, W]
        first = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        pooled: Tensor = net.ln_post(one_token(net.transformer, x, first, None))
        return pooled

    def depths(self) -> list[list[nn.Parameter]]:
        last = nn.ModuleList([self.net.ln_post, *([self.net.attn_pool] if self.net.attn_pool is not None else [])])
        return depths(self.net, self.net.transformer.resblocks, last)


class ViT(ImageTower):
    """Vision Transformer (Dosovitskiy et al. 2021) in CLIP's form: a norm before the blocks, the class token pooled."""

    patch_size: int = Field(gt=0)
    """Side of a patch, in pixels; divides the image size."""
    width: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Number of blocks."""
    heads: int = Field(gt=0)
    """Attention heads; divides the width."""
    mlp_ratio: float = Field(gt=0)
    """Hidden width of a block's MLP, as a multiple of the width."""
    pool: Literal["tok", "avg", "attn"]
    """What stands for the image: the class token, the mean of the patches, or a learnt query that attends to all."""
    pool_queries: int = Field(default=256, gt=0)
    """Queries of pool=attn, the first of which stands for the image (256 in CoCa)."""
    pool_heads: int = Field(default=8, gt=0)
    """Attention heads of pool=attn; divides model.embed_dim."""
    patch_dropout: float = Field(ge=0, lt=1)
    """Share of patches left out in training (FLIP, Li et al. 2023)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples that the last block passes by in training; fewer in earlier blocks, none in the first."""
    layer_scale: float | None = Field(default=None, gt=0)
    """Learnt factors on the branches of blocks start at this; null for none."""
    activation: Activation = "gelu"
    """Of the MLPs; quick_gelu in OpenAI's weights."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to variances in layer norms."""
    norm_first: bool = True
    """Whether there is a layer norm before the blocks."""
    norm_after_pool: bool = False
    """Whether the last layer norm comes after pooling instead of before."""
    projection: Projection = "linear"
    """How the shared space is reached."""
    grad_checkpointing: Operational[bool] = False
    """Compute blocks a second time in the backward pass instead of keeping what they made: slower, with less memory."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.image_size % self.patch_size:
            yield "image_size", f"{self.image_size} is not divisible by patch_size={self.patch_size}"
        if self.width % self.heads:
            yield "heads", f"{self.heads} does not divide width={self.width}"

    def build(self, preprocessor: ImagePreprocessor, embed_dim: int, saved: bool = False) -> ViTEncoder:
        if self.pool == "attn" and embed_dim % self.pool_heads:
            raise ValueError(f"pool_heads {self.pool_heads} does not divide model.embed_dim={embed_dim}")
        width = embed_dim if self.pool == "attn" else self.width
        check_width(self.projection, width, embed_dim)
        from open_clip.transformer import VisionTransformer

        net = VisionTransformer(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            ls_init_value=self.layer_scale,
            attentional_pool=self.pool == "attn",
            attn_pooler_queries=self.pool_queries,
            attn_pooler_heads=self.pool_heads,
            output_dim=embed_dim,
            patch_dropout=self.patch_dropout,
            no_ln_pre=not self.norm_first,
            pool_type="tok" if self.pool == "attn" else self.pool,
            final_ln_after_pool=self.norm_after_pool,
            act_layer=activation_layer(self.activation),
            norm_layer=norm_layer(self.norm_eps),
        )
        net.proj = None
        if self.patch_dropout:
            net.patch_dropout.__class__ = PatchDropout
        net.set_grad_checkpointing(self.grad_checkpointing)
        adapt(net.transformer.resblocks, self.drop_path)
        return ViTEncoder(net, projection(self.projection, width, embed_dim), width, self.mean, self.std)
