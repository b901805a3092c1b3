"""The text transformer of CLIP, as open_clip builds it."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from multimodal.parts import Operational
from multimodal.towers.projection import Projection, check_width, projection
from multimodal.towers.text import TextEncoder, TextPreprocessor, TextTower, end_of
from multimodal.towers.transformer import (
    Activation,
    activation_layer,
    adapt,
    depths,
    norm_layer,
    one_token,
)


class TextTransformerEncoder(TextEncoder):
    """The network is open_clip's `TextTransformer` without its projection."""

    def forward(self, inputs: Tensor, embedded: Tensor | None = None) -> Tensor:
        """From int64 [n, L], or the beginning of it, and its embedded tokens [n, L, W], to [n, W]."""
        net, length = self.net, inputs.shape[1]
        x = (self.embedding(inputs) if embedded is None else embedded) + net.positional_embedding[:length]
        attn_mask = net.attn_mask[:length, :length] if net.attn_mask is not None else None
        if net.use_pad_mask:
            attn_mask = net._build_additive_mask(inputs, length, x.dtype)  # [n * heads, L, L]
        features: Tensor = net.ln_final(one_token(net.transformer, x, self.place(inputs), attn_mask))
        return features

    @property
    def embedding(self) -> nn.Module:
        """Chunks of captions share its gradient."""
        table: nn.Module = self.net.token_embedding
        return table

    def place(
        self,
        inputs: Tensor,  # int64 [n, L]
    ) -> Tensor:  # int64 [n]
        """Where the token is that stands for a text; the first place, if a text has no end token."""
        if self.net.pool_type == "eos":
            return torch.eq(inputs, self.net.eos_id).int().argmax(1)
        place = inputs.shape[1] - 1 if self.net.pool_type == "last" else 0
        return torch.full(inputs.shape[:1], place, device=inputs.device)

    def lengths(self, inputs: Tensor) -> Tensor | None:
        """To the pooled token where attention is causal, to the last word where it is kept from padding."""
        net = self.net
        if net.pool_type == "last" or (net.attn_mask is None and not net.use_pad_mask):
            return None
        lengths = self.place(inputs) + 1
        return lengths if net.attn_mask is not None else torch.maximum(lengths, end_of(inputs != net.pad_id))

    def depths(self) -> list[list[nn.Parameter]]:
        return depths(self.net, self.net.transformer.resblocks, self.net.ln_final)


class TextTransformer(TextTower):
    """Transformer over tokens: causal with the end token pooled in CLIP, both ways with the last position in SigLIP."""

    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the token table; null for as many as the tokenizer has."""
    width: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Number of blocks."""
    heads: int = Field(gt=0)
    """Attention heads; divides the width."""
    mlp_ratio: float = Field(gt=0)
    """Hidden width of a block's MLP, as a multiple of the width."""
    causal: bool = True
    """Whether a token attends only to those before it."""
    mask_padding: bool = False
    """Whether tokens are kept from attending to padding, where attention goes both ways; SigLIP lets them."""
    pool: Literal["end", "first", "last"] = "end"
    """Which token stands for the caption: the end token, or the first or last place in the context."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples that the last block passes by in training; fewer in earlier blocks, none in the first."""
    layer_scale: float | None = Field(default=None, gt=0)
    """Learnt factors on the branches of blocks start at this; null for none."""
    activation: Activation = "gelu"
    """Of the MLPs; quick_gelu in OpenAI's weights."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to variances in layer norms."""
    projection: Projection = "linear"
    """How the shared space is reached."""
    grad_checkpointing: Operational[bool] = False
    """Compute blocks a second time in the backward pass instead of keeping what they made: slower, with less memory."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.width % self.heads:
            yield "heads", f"{self.heads} does not divide width={self.width}"
        if self.mask_padding and self.causal:
            yield "mask_padding", "is for attention both ways (causal=false): causal attention sees no padding"
        if self.pool == "first" and self.causal:
            yield "pool", "first needs causal=false: the first token attends to itself alone"
        if self.pool == "last" and self.mask_padding:
            yield "pool", "last may be padding, which mask_padding hides: pool=end or first"

    def build(self, preprocessor: TextPreprocessor, embed_dim: int, saved: bool = False) -> TextTransformerEncoder:
        encoding = preprocessor.encoding
        rows = self.vocab_size or encoding.vocab_size
        if encoding.vocab_size > rows:
            raise ValueError(f"the tokenizer has {encoding.vocab_size} tokens, the table only vocab_size={rows}")
        if self.pool == "end" and encoding.end is None:
            raise ValueError("pool=end needs a tokenizer that marks the end of a text: pool=last, or another tokenizer")
        check_width(self.projection, self.width, embed_dim)
        from open_clip.transformer import TextTransformer as Net

        net = Net(
            context_length=self.context_length,
            vocab_size=rows,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp_ratio=self.mlp_ratio,
            ls_init_value=self.layer_scale,
            output_dim=None,
            no_causal_mask=not self.causal,
            use_pad_mask=self.mask_padding,
            pad_id=encoding.pad,
            eos_id=encoding.end,
            pool_type="eos" if self.pool == "end" else self.pool,
            act_layer=activation_layer(self.activation),
            norm_layer=norm_layer(self.norm_eps),
        )
        net.set_grad_checkpointing(self.grad_checkpointing)
        adapt(net.transformer.resblocks, self.drop_path)
        return TextTransformerEncoder(net, projection(self.projection, self.width, embed_dim), self.width)
