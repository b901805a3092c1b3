"""InfoNCE, the loss of CLIP."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Strict
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Features
from multimodal.parts import Loss


def info_nce(
    x: Tensor,  # [b, D] unit norm, one modality
    y: Tensor,  # [b, D] unit norm, the other
    logit_scale: Tensor,  # [] already exponentiated
) -> Tensor:  # [] its mean over ranks is the loss of the global batch
    """Symmetric cross-entropy of every pair against every pair on every rank.

    Each rank scores its own b rows of both modalities against all B of the other. Equals open_clip's `ClipLoss` with
    `local_loss` and `gather_with_grad`; on one process, `ClipLoss` as it is. log B for features that are all equal.
    Computed in at least float32, whatever autocast says.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = (z if z.dtype == torch.float64 else z.float() for z in (x, y))
        positives = torch.arange(len(x), device=x.device) + distributed.rank() * len(x)
        x_to_y = F.cross_entropy(logit_scale * x @ distributed.gather(y).T, positives)
        y_to_x = F.cross_entropy(logit_scale * y @ distributed.gather(x).T, positives)
        return (x_to_y + y_to_x) / 2


class InfoNCE(Loss):
    """Symmetric cross-entropy of matching pairs against all others in the batch, as in CLIP."""

    pair: Annotated[tuple[str, str], Strict(False)] = ("image", "text")
    """The two towers that are aligned."""

    def needs(self) -> frozenset[str]:
        return frozenset(f"{tower}_features" for tower in self.pair)

    def __call__(self, features: Features) -> Tensor:
        x, y = (features.tensors[f"{tower}_features"] for tower in self.pair)
        return info_nce(x, y, features.logit_scale)
