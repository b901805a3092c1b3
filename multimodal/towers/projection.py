"""From a tower's own width into the shared space."""

from typing import Literal

from torch import nn

Projection = Literal["linear", "linear_bias", "mlp", "none"]


def check_width(kind: str, width: int, embed_dim: int) -> None:
    """ValueError if there is no projection and the widths differ; known before a network is built."""
    if kind == "none" and width != embed_dim:
        raise ValueError(f"projection=none needs model.embed_dim={width}, the tower's width; it is {embed_dim}")


def projection(kind: Projection, width: int, embed_dim: int) -> nn.Module:
    """From [n, W] to [n, D]: a matrix, as in CLIP, with bias in SigLIP; two around a GELU; or nothing.

    The latter two are those of open_clip's Hugging Face towers. ValueError if it is nothing and the widths differ.
    """
    check_width(kind, width, embed_dim)
    if kind == "none":
        return nn.Identity()
    if kind == "mlp":
        hidden = (width + embed_dim) // 2
        return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))
    linear = nn.Linear(width, embed_dim, bias=kind == "linear_bias")
    nn.init.normal_(linear.weight, std=width**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
