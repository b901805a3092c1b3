"""A trained model as MTEB's tasks on texts, on images, and on both take it."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.api import ImageTextModel

READ = "text", "image"


class MTEBEncoder:
    """What mteb calls an encoder (`EncoderProtocol` of mteb 2), around a model that `multimodal.load` gives.

    `mteb.evaluate(MTEBEncoder(model), tasks)` takes it. Where mteb's numbers and ours are of different things:

    - mteb's `recall_at_k` is the share of right items that were found; our `r1`, `r5`, `r10` are its `hit_rate_at_k`.
    - its `mrr_at_k` is 0 beyond place k; our `mrr` is over all items, so never below it, and above by 1 / (k + 1) at
      most. `ndcg_at_10` is our `ndcg10`.
    - ties are broken by names or order there, and count against the model here.
    - classes are prompted as the task says, with one prompt each; `accuracy` is our `top1` with these prompts.
    - `cosine_spearman` is our `spearman`; of two images with two captions (Winoground), `text_acc`, `image_acc` and
      `accuracy` are our `text`, `image` and `group`.

    Features are of unit norm, which mteb's own wrapper of open_clip leaves to cosines: tasks that take features as they
    are (probes, clusters) see another scale. What has an image and a text is the sum of both, of unit norm again.
    Instructions of tasks are not read. Results are kept by mteb under the model's name and revision, which is a digest
    of its weights and precision.
    """

    def __init__(
        self,
        model: ImageTextModel,
        name: str | None = None,  # in results: "organisation/model"; None for where the weights are from
    ) -> None:
        if name is not None and "/" not in name:
            raise ValueError(f"name should be 'organisation/model', as mteb wants it, got {name!r}")
        self.model = model
        self.name = name or f"multimodal/{model.origin.lstrip('/')}"

    @cached_property
    def mteb_model_meta(self) -> Any:
        """The description by which mteb chooses tasks and files results; needs mteb."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        known = {
            "name": self.name,
            "revision": self.revision,
            "n_parameters": self.model.model.num_parameters()["total"],
            "embed_dim": self.model.embed_dim,
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
            "modalities": [kind for kind in READ if kind in {reader.reads for reader in self.model.readers.values()}],
        }
        return ModelMeta.create_empty(overwrites=known)

    @cached_property
    def revision(self) -> str:
        """A digest of what features depend on besides the name: the weights, and the precision."""
        digest = hashlib.sha256(self.model.precision.encode())
        for key, tensor in self.model.model.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],  # batches of "text" (strings), "image" (PIL images), or both
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Tensor:  # float32 [n, D] unit norm, on the CPU
        """Embed what mteb's loader gives; ValueError if that is neither text nor image."""
        texts: list[str] = []
        images: list[Tensor] = []
        for batch in inputs:
            if not set(READ) & batch.keys() or {"audio", "video"} & batch.keys():
                raise ValueError(f"inputs should be texts, images, or both, got {', '.join(batch)}")
            texts.extend(batch.get("text", ()))
            if "image" in batch:
                images.append(self.model.encode_image(list(batch["image"])))
        if not images:
            return self.model.encode_text(texts)
        features = torch.cat(images)
        return F.normalize(features + self.model.encode_text(texts), dim=-1) if texts else features

    def similarity(
        self,
        embeddings1: Any,  # [n, D] or [D], a tensor or an array
        embeddings2: Any,  # [m, D] or [D]
    ) -> Tensor:  # [n, m]
        """Cosines of all with all."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(
        self,
        embeddings1: Any,  # [n, D] or [D]
        embeddings2: Any,  # [n, D] or [D]
    ) -> Tensor:  # [n]
        """Cosines of each with its counterpart."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)


def _unit(embeddings: Any) -> Tensor:
    features = torch.as_tensor(embeddings)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(features.reshape(-1, features.shape[-1]), dim=-1)
