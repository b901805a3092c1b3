"""What the vision and the text transformer of open_clip share: activation, norm, attention, drop path, depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


def activation_layer(name: Activation) -> Callable[[], nn.Module]:
    """What open_clip's transformers take as `act_layer`."""
    from open_clip.transformer import QuickGELU

    layers: dict[str, Callable[[], nn.Module]] = {
        "gelu": nn.GELU,
        "gelu_tanh": partial(nn.GELU, approximate="tanh"),
        "quick_gelu": QuickGELU,
    }
    return layers[name]


def norm_layer(eps: float) -> Callable[[int], nn.Module]:
    """What open_clip's transformers take as `norm_layer`."""
    from open_clip.transformer import LayerNorm

    return partial(LayerNorm, eps=eps)


def adapt(blocks: nn.ModuleList, drop_path: float) -> None:
    """Let open_clip's residual blocks copy less, leave out their branches in training, and compute `one_token`.

    Names and number of weights stay open_clip's.
    """
    for block in blocks:
        block.attn.__class__ = Attention
    _add_drop_path(blocks, drop_path)
    last = blocks[-1]
    last.attn.__class__ = LastAttention
    last.attn.__dict__["norm"] = last.ln_1  # no child
    last.ln_1_kv = nn.Identity()  # without one, open_clip's block takes keys and values from its queries


class Attention(nn.MultiheadAttention):
    """Torch's, of inputs [n, L, W], on views of the projected queries, keys and values, which torch's own copies."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,  # [n, Q, W]
        key: Tensor,  # [n, K, W]
        value: Tensor,  # [n, K, W]
        need_weights: Literal[False],
        attn_mask: Tensor | None,  # [Q, K], or [n * heads, Q, K]; added to the logits
    ) -> tuple[Tensor, None]:
        """As torch's; weights are not told, and there is no dropout."""
        weight, bias, width, of_head = self.in_proj_weight, self.in_proj_bias, self.embed_dim, (-1, self.head_dim)
        if query is key is value:
            projected = list(F.linear(query, weight, bias).chunk(3, -1))
        elif key is value:
            of_key = F.linear(key, weight[width:], bias[width:])
            projected = [F.linear(query, weight[:width], bias[:width]), *of_key.chunk(2, -1)]
        else:
            inputs = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
            projected = [F.linear(x, *affine) for x, *affine in inputs]
        q, k, v = (torch.unflatten(x, -1, of_head).transpose(1, 2) for x in projected)  # [n, heads, L, W / heads]
        if query.device.type == "cpu" and q.dtype == torch.bfloat16:  # plain products would copy them in float32
            q, k, v = (x.contiguous() for x in (q, k, v))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = torch.unflatten(attn_mask, 0, (-1, self.num_heads))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


class LastAttention(Attention):
    """Of one sequence to another, which is both keys and values, and which it norms, once, as the block its queries."""

    norm: nn.Module

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: Literal[False], attn_mask: Tensor | None
    ) -> tuple[Tensor, None]:
        if query is not key:
            key = value = self.norm(key)
        return super().forward(query, key, value, need_weights, attn_mask)


def _add_drop_path(blocks: nn.ModuleList, rate: float) -> None:
    """Leave out none of the first block's branches, and a share of samples, `rate`, of the last one's.

    Stochastic depth (Huang et al. 2016).
    """
    from timm.layers.drop import drop_path

    def hook(module: nn.Module, _: Any, output: Tensor, share: float) -> Tensor:
        dropped: Tensor = drop_path(output, share, module.training)
        return dropped

    for place, block in enumerate(blocks):
        share = rate * place / max(1, len(blocks) - 1)
        if share:
            for branch in (block.ls_1, block.ls_2):
                assert isinstance(branch, nn.Module)
                branch.register_forward_hook(partial(hook, share=share))


def depths(net: nn.Module, blocks: nn.ModuleList, last: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a transformer by depth: all that is in neither `blocks` nor `last`, then the blocks.

    The parameters of `last`, what follows the blocks, are with the last block.
    """
    inside = {id(p) for module in (blocks, last) for p in module.parameters()}
    groups = [[p for p in net.parameters() if id(p) not in inside], *(list(block.parameters()) for block in blocks)]
    groups[-1] += last.parameters()
    return groups


def one_token(
    transformer: Any,  # open_clip's, whose blocks we `adapt`
    x: Tensor,  # [n, L, W]
    place: Tensor,  # int64 [n], of the token that is wanted
    attn_mask: Tensor | None,  # [L, L], or [n * heads, L, L]; added to the logits of attention
) -> Tensor:  # [n, W]
    """What a transformer makes of one token in each row, as if it made all.

    The last block has no queries, attention or MLP of other tokens: all that they are for is their keys and values.
    """

    def run(block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if transformer.grad_checkpointing:
            again: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return again
        output: Tensor = block(*inputs)
        return output

    *before, last = transformer.resblocks
    for block in before:
        x = run(block, x, None, None, attn_mask)
    rows = torch.arange(x.shape[0], device=x.device)  # len(x) would fix the number in exports
    if attn_mask is not None:  # the token's row of it
        heads = last.attn.num_heads
        if attn_mask.ndim == 2:
            attn_mask = attn_mask[place].repeat_interleave(heads, 0)
        else:
            attn_mask = attn_mask.view(-1, heads, *attn_mask.shape[1:])[rows, :, place].flatten(0, 1)
        attn_mask = attn_mask[:, None]
    return run(last, x[rows, place][:, None], x, x, attn_mask)[:, 0]
