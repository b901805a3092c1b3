"""What the vision and the text transformer of open_clip share: activation, norm, drop path, depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

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


def add_drop_path(blocks: nn.ModuleList, rate: float) -> None:
    """Let open_clip's residual blocks leave out their branches in training: none of the first, `rate` of the last.

    Stochastic depth (Huang et al. 2016), per sample. Hooks do it, so the names of weights stay open_clip's.
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
