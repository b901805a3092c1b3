"""The losses as their definitions say, on the whole B x B matrix: what the streamed ones are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pairs(rows: int, dims: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """Unit rows of two modalities, a scale and a bias, all leaves that want a gradient."""
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    x, y = (F.normalize(torch.randn(rows, dims, generator=generator, dtype=dtype), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(14.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype)
    return tuple(leaf.requires_grad_() for leaf in (x, y, scale, bias))


def some_ids(rows: int) -> Tensor:
    """Groups of one to four rows, in no order, some of them large and negative."""
    ids = (torch.arange(rows) * 7) % max(rows // 2, 1)
    return torch.where(ids % 3 == 0, ids, -(10**12) - ids)


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """Two losses, and their gradients."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)


def explicit_info_nce(
    x: Tensor, y: Tensor, scale: Tensor, label_smoothing: float = 0.0, ids: Tensor | None = None, same: str = "positive"
) -> Tensor:
    rows = len(x)
    ids = torch.arange(rows) if ids is None else ids
    equal = ids[:, None] == ids
    losses = []
    for logits in (scale * x @ y.T, scale * y @ x.T):
        if same == "positive":
            targets = equal.to(logits) / equal.sum(1, keepdim=True)
            losses.append(F.cross_entropy(logits, targets, label_smoothing=label_smoothing))
            continue
        for i in range(rows):
            left = [j for j in range(rows) if j == i or not equal[i, j]]
            loss = F.cross_entropy(logits[i, left], torch.tensor(left.index(i)), label_smoothing=label_smoothing)
            losses.append(loss / rows)
    return torch.stack(losses).sum() / 2


def explicit_sigmoid(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None = None, same: str = "positive"
) -> Tensor:
    rows = len(x)
    ids = torch.arange(rows) if ids is None else ids
    logits = scale * x @ y.T + bias
    total = torch.zeros((), dtype=logits.dtype)
    for i in range(rows):
        for j in range(rows):
            if i == j or (same == "positive" and ids[i] == ids[j]):
                total = total - F.logsigmoid(logits[i, j])
            elif ids[i] != ids[j]:
                total = total - F.logsigmoid(-logits[i, j])
    return total / rows
