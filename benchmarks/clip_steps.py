"""Training steps of CLIP, open_clip's and ours, from the same weights on the same pairs, for `training_step.py`."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from open_clip import get_model_config
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from stopwatch import Device
from torch import Tensor, nn

from multimodal.batch import Batch
from multimodal.compiling import compile_towers
from multimodal.config import ModelSection
from multimodal.data.augment import Keep
from multimodal.data.shards import Shards
from multimodal.losses.infonce import InfoNCE
from multimodal.model import Model
from multimodal.optim import AdamW, parameter_groups
from multimodal.parts import Tuning
from multimodal.step import training_step
from multimodal.towers.clip_bpe import ClipBPE
from multimodal.towers.images import ImageEncoder
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformer, TextTransformerEncoder
from multimodal.towers.vit import ViT, ViTEncoder

VOCABULARY, HEAD_WIDTH = 49408, 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LR, DECAY, BETAS, EPS = 5e-4, 0.2, (0.9, 0.98), 1e-6
PEER, PADDED, COPIED_LESS = "open_clip", "ours, all tokens", "+ attention without copies"
POOLED, OURS = "+ one token in the last block", "+ captions by length"


class Size(NamedTuple):
    """Of a model, in the words of open_clip's configurations."""

    embed_dim: int
    vision: dict[str, Any]
    text: dict[str, Any]


SMALL = Size(
    256,
    {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6},
    {"width": 192, "layers": 4, "heads": 3},
)


def size_of(name: str) -> Size:
    """Of one of open_clip's own models with a ViT."""
    config = get_model_config(name)
    text = {key: config["text_cfg"][key] for key in SMALL.text}
    return Size(config["embed_dim"], {key: config["vision_cfg"][key] for key in SMALL.vision}, text)


class Setting(NamedTuple):
    """What all variants have in common."""

    size: Size
    context: int
    rows: int
    device: Device = "cpu"


class Variant(NamedTuple):
    """Who makes the step, and how."""

    who: str
    precision: str
    compiled: bool = False

    @property
    def peer(self) -> "Variant":
        """The peer in this precision, compiled if this one is."""
        return Variant(PEER, self.precision, self.compiled)

    def __str__(self) -> str:
        return f"{self.who}, {self.precision}{', compiled' if self.compiled else ''}"


class Given(NamedTuple):
    """A batch as each of them gets it."""

    batch: Batch
    captions: Tensor
    """Its token ids on the CPU, where ours looks for their lengths."""
    normalised: Tensor
    """Its pixels; in the peer it is its loader that makes them so."""


Step = Callable[[Given], Tensor]


class WholeViT(ViTEncoder):
    """All tokens in all blocks."""

    features = ImageEncoder.features


class WholeText(TextTransformerEncoder):
    """All tokens in all blocks."""

    def forward(self, inputs: Tensor, embedded: Tensor | None = None) -> Tensor:
        features: Tensor = self.net(inputs)
        return features


# --- pairs ----------------------------------------------------------------------------------------------------------


def flickr8k(setting: Setting, count: int) -> list[Batch]:
    """So many batches, as the towers' preprocessors read them."""
    root = Path(os.environ.get("MULTIMODAL_DATASETS", "data"))
    source = Shards(urls=("flickr8k-train-{000..003}.tar",)).build(root)
    image = vit(setting.size).preprocessor(list, Keep(), None)
    text = text_transformer(setting).preprocessor(list, Keep(), None)
    batches, rows = [], setting.rows
    for start in range(0, rows * count, rows):
        samples = [source[index] for index in range(start, start + rows)]
        pixels = torch.stack([image(sample.inputs["image"], None) for sample in samples])
        ids = torch.stack([text(sample.inputs["text"], Random(sample.key)) for sample in samples])
        batches.append(Batch({"image": pixels, "text": ids}, torch.arange(rows)))
    return batches


def made_up(setting: Setting, count: int) -> list[Batch]:
    """Noise, and captions of random words; as long as Flickr8k's: 8 to 22 tokens for nine of ten, 13 in the mean."""
    generator = torch.Generator().manual_seed(0)
    rows, context, side = setting.rows, setting.context, setting.size.vision["image_size"]
    batches = []
    for _ in range(count):
        told = (2.55 + 0.33 * torch.randn(rows, 1, generator=generator)).exp().long().clamp(3, context)
        ids = torch.randint(1, VOCABULARY - 2, (rows, context), generator=generator)
        places = torch.arange(context)
        ids[places >= told] = 0
        ids[places == told - 1] = VOCABULARY - 1
        pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
        batches.append(Batch({"image": pixels, "text": ids}, torch.arange(rows)))
    return batches


def pairs(setting: Setting, count: int) -> list[Given]:
    """Real ones, where they are; on the device."""
    try:
        batches = flickr8k(setting, count)
    except (FileNotFoundError, ValueError) as error:
        print(f"note: noise and captions of such lengths, not Flickr8k, which is missing ({error})")
        batches = made_up(setting, count)
    told = torch.cat([batch.inputs["text"].argmax(1) + 1 for batch in batches]).float()
    where = f"context {setting.context}, batch {setting.rows}"
    print(f"{where}: {told.mean():.1f} tokens in the mean, at most {told.max():.0f}", flush=True)
    device = torch.device(setting.device)
    mean, std = (torch.tensor(colour, device=device).view(3, 1, 1) for colour in (MEAN, STD))
    given = []
    for batch in batches:
        moved = batch.to(device)
        given.append(Given(moved, batch.inputs["text"], (moved.inputs["image"] / 255 - mean) / std))
    return given


# --- models ---------------------------------------------------------------------------------------------------------


def vit(size: Size) -> ViT:
    """As the peer has it."""
    knobs: dict[str, Any] = {"mlp_ratio": 4.0, "pool": "tok", "patch_dropout": 0.0, "interpolation": "bicubic"}
    return ViT(**size.vision, **knobs, heads=size.vision["width"] // HEAD_WIDTH, mean=MEAN, std=STD)


def text_transformer(setting: Setting) -> TextTransformer:
    """As the peer has it."""
    return TextTransformer(**setting.size.text, mlp_ratio=4.0, tokenizer=ClipBPE(), context_length=setting.context)


def peer_model(setting: Setting) -> CLIP:
    """The same weights each time."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(**setting.size.vision, head_width=HEAD_WIDTH)
    text = CLIPTextCfg(**setting.size.text, context_length=setting.context, vocab_size=VOCABULARY)
    return CLIP(setting.size.embed_dim, vision, text, output_dict=True).train()


def our_model(setting: Setting, who: str) -> Model:
    """The peer's weights in our model, with so many of the changes."""
    state, dims = peer_model(setting).state_dict(), setting.size.embed_dim
    image_part, text_part = vit(setting.size), text_transformer(setting)
    image = image_part.build(image_part.preprocessor(list, Keep(), None), dims)
    text = text_part.build(TextPreprocessor(ClipBPE().build(list, None), setting.context), dims)
    if who in (PADDED, COPIED_LESS):
        image.__class__, text.__class__ = WholeViT, WholeText
    if who == PADDED:
        for block in (*image.net.transformer.resblocks, *text.net.transformer.resblocks):
            block.attn.__class__ = nn.MultiheadAttention
    visual = {name.removeprefix("visual."): x for name, x in state.items() if name.startswith("visual.")}
    image.projection.weight.data.copy_(visual.pop("proj").T)  # type: ignore[union-attr,operator]
    image.net.load_state_dict(visual)
    text.projection.weight.data.copy_(state.pop("text_projection").T)  # type: ignore[union-attr,operator]
    text.net.load_state_dict({k: x for k, x in state.items() if not k.startswith(("visual.", "logit_scale"))})
    section = ModelSection(
        embed_dim=dims, logit_scale=1 / 0.07, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None
    )
    return Model({"image": image, "text": text}, section).train()


# --- steps ----------------------------------------------------------------------------------------------------------


def autocast(setting: Setting, precision: str) -> torch.autocast:
    """As both sides are trained: weights stay in float32."""
    return torch.autocast(setting.device, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def as_the_peer_sets() -> Iterator[None]:
    """All products of float32 in TF32, and convolutions that are tried out first: nothing of that is for a CPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.benchmark = before


def peer_step(setting: Setting, variant: Variant) -> Step:
    """The plain step of open_clip_train, with its optimizer."""
    model, loss = peer_model(setting).to(setting.device), ClipLoss()
    named = list(model.named_parameters())
    without = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for n, p in named if not (p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n)]
    groups = [{"params": without, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    forward = torch.compile(model) if variant.compiled else model
    context = autocast(setting, variant.precision)

    def step(given: Given) -> Tensor:
        with as_the_peer_sets():
            optimizer.zero_grad()
            with context:
                made = forward(given.normalised, given.batch.inputs["text"])
                total = loss(**made, output_dict=True)["contrastive_loss"]
            total.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        return total.detach()  # type: ignore[no-any-return]

    return step


def our_step(setting: Setting, variant: Variant) -> Step:
    """Ours, with so many of the changes."""
    model = our_model(setting, variant.who).to(setting.device)
    if variant.compiled:
        compile_towers(model)
    part = AdamW(lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    optimizer = part.build(parameter_groups(model, part, {name: Tuning() for name in model.towers}))
    losses, context = {"infonce": InfoNCE()}, autocast(setting, variant.precision)

    def step(given: Given) -> Tensor:
        found = model.lengths({"text": given.captions}) if variant.who == OURS else {}
        batch = Batch(given.batch.inputs, given.batch.indices, lengths=found)
        return training_step(model, losses, optimizer, batch, context, None, None, (0, 0))["loss"]

    return step


def build(setting: Setting, variant: Variant) -> Step:
    """A step with weights and an optimizer of its own."""
    return (peer_step if variant.who == PEER else our_step)(setting, variant)
