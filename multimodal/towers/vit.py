"""The Vision Transformer of CLIP, as open_clip builds it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from multimodal.towers.images import ImageEncoder, ImagePreprocessor, ImageTower


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
    pool: Literal["tok", "avg"]
    """What stands for the image: the class token, or the mean of the patches."""
    patch_dropout: float = Field(ge=0, lt=1)
    """Share of patches left out in training (FLIP, Li et al. 2023)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self

    def build(self, preprocessor: ImagePreprocessor, embed_dim: int) -> ImageEncoder:
        from open_clip.transformer import VisionTransformer

        net = VisionTransformer(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            patch_dropout=self.patch_dropout,
            pool_type=self.pool,
        )
        net.proj = None
        return ImageEncoder(net, self.width, self.mean, self.std)
