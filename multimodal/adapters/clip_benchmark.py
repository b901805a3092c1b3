"""A trained model as CLIP_benchmark's metrics take it: pixels and token ids in, features out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from multimodal.api import ImageTextModel
from multimodal.data.files import open_image
from multimodal.parts import Preprocessor


@dataclass(frozen=True)
class Transform:
    """From a PIL image to the pixels [C, H, W] that the image tower reads, as in evaluation; for a dataset."""

    preprocessor: Preprocessor

    def __call__(self, image: Image.Image) -> Tensor:
        return self.preprocessor(open_image(image, "image"), None)


@dataclass(frozen=True)
class Tokenize:
    """From strings to the token ids [n, L] that the text tower reads; a warning says how many were cut."""

    model: ImageTextModel
    tower: str

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        with self.model.count_truncated(self.tower, len(texts)):
            return torch.stack([self.model.readers[self.tower].preprocessor(text, None) for text in texts])


class CLIPBenchmarkModel(nn.Module):
    """Model, `transform` and `tokenizer` in the form of CLIP_benchmark, around a model that `multimodal.load` gives.

    `zeroshot_classification.evaluate` and `zeroshot_retrieval.evaluate` of `clip_benchmark.metrics` take it; ValueError
    if the model lacks a tower for images or texts. Where their numbers and ours are of different things:

    - give them `amp=False`: otherwise cosines are bf16 or fp16 whatever the features are, so many tie.
    - templates have {c} for the class name there, {} here.
    - `acc5` is not a number below five classes there, 1 here. Ties are broken by their order in memory there, and
      count against the model here.
    - retrieval knows only a caption's own image as right: our `duplicates=wrong`. `image_retrieval_recall@k` is our
      `t2i_r...`, `text_retrieval_recall@k` our `i2t_r...`. There k may not be above the number of items.
    """

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.image, self.text = model.tower("image"), model.tower("text")
        self.model = model.model
        self.transform = Transform(model.readers[self.image].preprocessor)
        self.tokenizer = Tokenize(model, self.text)
        self.context = model.encoder.context

    def encode_image(
        self,
        images: Tensor,  # [n, C, H, W] by `transform`
    ) -> Tensor:  # float32 [n, D] unit norm, on the model's device
        """Embed images; in the precision that the model was loaded with, also inside another autocast."""
        return self._encode(self.image, images)

    def encode_text(
        self,
        tokens: Tensor,  # int64 [n, L] by `tokenizer`
    ) -> Tensor:  # float32 [n, D] unit norm, on the model's device
        """Embed texts; in the precision that the model was loaded with, also inside another autocast."""
        return self._encode(self.text, tokens)

    @torch.no_grad()
    def _encode(self, tower: str, inputs: Tensor) -> Tensor:
        lengths = self.model.lengths({tower: inputs.cpu()}).get(tower)
        with self.context:
            return self.model.encode(tower, inputs.to(self.model.logit_scale.device), lengths).float()
