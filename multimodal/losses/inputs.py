"""What the losses over all pairs of a batch ask of what they are given, on every rank alike."""

import torch
from torch import Tensor

from multimodal import distributed


def check_inputs(
    x: Tensor,  # [b, D]
    y: Tensor,  # [b, D]
    ids: Tensor | None,  # int64 [b]
    settings: str,  # what else must be the same on all ranks
    problem: str = "",  # with the settings
) -> None:
    """ValueError on all ranks if one's features do not fit each other, or fit another rank's; never a hang."""
    shapes, dtypes = f"{list(x.shape)} and {list(y.shape)}", f"{x.dtype} and {y.dtype}"
    if x.ndim != 2 or x.shape != y.shape:
        problem = f"features should be two matrices of one shape, row i of x matching row i of y, not {shapes}"
    elif x.numel() == 0:
        problem = f"features should have a row and a dimension at least, not {shapes}"
    elif not (x.is_floating_point() and y.is_floating_point()):
        problem = f"features should be floating-point numbers, not {dtypes}"
    elif ids is not None and (ids.shape != x.shape[:1] or ids.dtype != torch.int64):
        problem = f"ids should be int64, one for each of {len(x)} rows, not {ids.dtype} of shape {list(ids.shape)}"
    trained = [name for name, z in (("x", x), ("y", y)) if z.requires_grad and torch.is_grad_enabled()]
    has = f"features of shape {shapes}, {dtypes}, gradients for {' and '.join(trained) or 'none'}"
    distributed.agree(f"{has}, {'no ' if ids is None else ''}ids, {settings}", problem)
