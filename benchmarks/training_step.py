"""Time of a training step against that of open_clip: the same weights, pairs, precision and batch.

    uv run python benchmarks/training_step.py            # about ten minutes
    uv run python benchmarks/training_step.py --quick    # smaller batches, two rounds

The peer is open_clip's CLIP in its plain training step: forward, ClipLoss, backward, AdamW as open_clip_train makes it.
Ours is `multimodal.step.training_step`, first with towers that compute all tokens of padded captions, then with what
each change leaves out. A small ViT (width 192, 6 layers, 3 heads, patch 8, 64 pixels), a text transformer of 4 layers.
Pairs are Flickr8k's, read before the clock runs; where it is missing, noise and captions of such lengths.

Times are of one thread, in seconds of the processor, all variants in turn in one process; ratios are medians of the
ratios of rounds, with the lowest and highest. Losses of all rounds are compared too. Ends in one line of JSON: how many
times as fast.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from multimodal.batch import Batch
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

DIMS, VOCABULARY = 256, 49408
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION: dict[str, Any] = {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6}
TEXT: dict[str, Any] = {"width": 192, "layers": 4, "heads": 3}
LR, DECAY, BETAS, EPS = 5e-4, 0.2, (0.9, 0.98), 1e-6
PRECISIONS = {"fp32": torch.autocast("cpu", enabled=False), "bf16": torch.autocast("cpu", torch.bfloat16)}
BARS = {"fp32": 1.3, "bf16_vs_fp32": 1.7, "bf16_vs_bf16": 1.15, "context77_fp32": 1.6}
PEER, PADDED, COPIED_LESS = "open_clip", "ours, all tokens", "+ attention without copies"
POOLED, OURS = "+ one token in the last block", "+ captions by length"
Step = Callable[[Batch, Tensor], Tensor]


class WholeViT(ViTEncoder):
    """All tokens in all blocks."""

    features = ImageEncoder.features


class WholeText(TextTransformerEncoder):
    """All tokens in all blocks."""

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.net(inputs)
        return features


class Variant(NamedTuple):
    """Who makes the step, and in which precision."""

    who: str
    precision: str


# --- pairs ----------------------------------------------------------------------------------------------------------


def flickr8k(rows: int, context: int, count: int) -> list[Batch]:
    """So many batches, as the towers' preprocessors read them."""
    root = Path(os.environ.get("MULTIMODAL_DATASETS", "data"))
    source = Shards(urls=("flickr8k-train-{000..003}.tar",)).build(root)
    image, text = vit().preprocessor(list, Keep(), None), text_transformer(context).preprocessor(list, Keep(), None)
    batches = []
    for start in range(0, rows * count, rows):
        samples = [source[index] for index in range(start, start + rows)]
        pixels = torch.stack([image(sample.inputs["image"], None) for sample in samples])
        ids = torch.stack([text(sample.inputs["text"], Random(sample.key)) for sample in samples])
        batches.append(Batch({"image": pixels, "text": ids}, torch.arange(rows)))
    return batches


def made_up(rows: int, context: int, count: int) -> list[Batch]:
    """Noise, and captions of random words; as long as Flickr8k's: 8 to 22 tokens for nine of ten, 14 in the mean."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        lengths = (2.55 + 0.33 * torch.randn(rows, 1, generator=generator)).exp().long().clamp(3, context)
        ids = torch.randint(1, VOCABULARY - 2, (rows, context), generator=generator)
        places = torch.arange(context)
        ids[places >= lengths] = 0
        ids[places == lengths - 1] = VOCABULARY - 1
        pixels = torch.randint(0, 256, (rows, 3, 64, 64), dtype=torch.uint8, generator=generator)
        batches.append(Batch({"image": pixels, "text": ids}, torch.arange(rows)))
    return batches


def pairs(rows: int, context: int, count: int) -> list[Batch]:
    """Real ones, where they are."""
    try:
        batches = flickr8k(rows, context, count)
    except (FileNotFoundError, ValueError) as error:
        print(f"note: noise and captions of such lengths, not Flickr8k, which is missing ({error})")
        batches = made_up(rows, context, count)
    lengths = torch.cat([batch.inputs["text"].argmax(1) + 1 for batch in batches]).float()
    print(f"context {context}, batch {rows}: {lengths.mean():.1f} tokens in the mean, at most {lengths.max():.0f}")
    return batches


# --- models ---------------------------------------------------------------------------------------------------------


def vit() -> ViT:
    """As the peer has it."""
    knobs: dict[str, Any] = {"mlp_ratio": 4.0, "pool": "tok", "patch_dropout": 0.0, "interpolation": "bicubic"}
    return ViT(**VISION, **knobs, heads=3, mean=MEAN, std=STD)


def text_transformer(context: int) -> TextTransformer:
    """As the peer has it."""
    return TextTransformer(**TEXT, mlp_ratio=4.0, tokenizer=ClipBPE(), context_length=context)


def peer_model(context: int) -> CLIP:
    """The same weights each time."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(**VISION, head_width=64)
    text = CLIPTextCfg(**TEXT, context_length=context, vocab_size=VOCABULARY)
    return CLIP(DIMS, vision, text, output_dict=True).train()


def our_model(context: int, who: str) -> Model:
    """The peer's weights in our model, with so many of the changes."""
    state = peer_model(context).state_dict()
    image_part, text_part = vit(), text_transformer(context)
    image = image_part.build(image_part.preprocessor(list, Keep(), None), DIMS)
    text = text_part.build(TextPreprocessor(ClipBPE().build(list, None), context), DIMS)
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
        embed_dim=DIMS, logit_scale=1 / 0.07, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None
    )
    return Model({"image": image, "text": text}, section).train()


# --- steps ----------------------------------------------------------------------------------------------------------


def peer_step(context: int, precision: str) -> Step:
    """The plain step of open_clip_train, with its optimizer."""
    model, loss = peer_model(context), ClipLoss()
    named = list(model.named_parameters())
    without = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for n, p in named if not (p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n)]
    groups = [{"params": without, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)

    def step(batch: Batch, normalised: Tensor) -> Tensor:
        optimizer.zero_grad()
        with PRECISIONS[precision]:
            made = model(normalised, batch.inputs["text"])
            total = loss(**made, output_dict=True)["contrastive_loss"]
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return total.detach()  # type: ignore[no-any-return]

    return step


def our_step(context: int, precision: str, who: str) -> Step:
    """Ours, with so many of the changes."""
    model = our_model(context, who)
    part = AdamW(lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    optimizer = part.build(parameter_groups(model, part, {name: Tuning() for name in model.towers}))
    losses = {"infonce": InfoNCE()}

    def step(batch: Batch, _: Tensor) -> Tensor:
        lengths = model.lengths(batch.inputs) if who == OURS else {}
        given = Batch(batch.inputs, batch.indices, lengths=lengths)
        return training_step(model, losses, optimizer, given, PRECISIONS[precision], None, None, (0, 0))["loss"]

    return step


# --- measuring ------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One context's rounds, by variant."""

    seconds: dict[Variant, list[float]]
    losses: dict[Variant, list[float]]

    def ratios(self, theirs: Variant, ours: Variant) -> list[float]:
        """How many times as fast, by round."""
        return [a / b for a, b in zip(self.seconds[theirs], self.seconds[ours], strict=True)]


def measure(context: int, rows: int, rounds: int, precisions: list[str], who: list[str]) -> Measured:
    """All variants in turn, one batch a round; the first round is to warm up, and counts for losses only."""
    batches = pairs(rows, context, rounds + 1)
    steps: dict[Variant, Step] = {}
    for precision in precisions:
        for name in who:
            made = peer_step(context, precision) if name == PEER else our_step(context, precision, name)
            steps[Variant(name, precision)] = made
    seconds: dict[Variant, list[float]] = {variant: [] for variant in steps}
    losses: dict[Variant, list[float]] = {variant: [] for variant in steps}
    mean, std = (torch.tensor(colour).view(3, 1, 1) for colour in (MEAN, STD))
    for number, batch in enumerate(batches):
        normalised = (batch.inputs["image"] / 255 - mean) / std  # in the peer it is its loader that does it
        for variant, step in steps.items():
            started = time.process_time()
            loss = step(batch, normalised)
            taken = time.process_time() - started
            losses[variant].append(loss.item())
            if number:
                seconds[variant].append(taken)
    return Measured(seconds, losses)


def show(measured: Measured) -> None:
    """A line for each variant; AssertionError if a first loss is not the peer's."""
    first = next(iter(measured.seconds))
    print(f"{'':34} {'s a step':>9}   against {first.precision:19} against its own precision      loss differs by")
    for variant, taken in measured.seconds.items():
        peer = Variant(PEER, variant.precision)
        told = []
        for theirs in (first, peer):
            ratios = measured.ratios(theirs, variant)
            told.append(f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        apart = [
            abs(ours / theirs - 1) for ours, theirs in zip(measured.losses[variant], measured.losses[peer], strict=True)
        ]
        name = f"{variant.who}, {variant.precision}"
        differs = f"{apart[0]:.0e}, later {max(apart):.0e}"
        print(f"{name:34} {statistics.median(taken):9.2f}   {told[0]:27} {told[1]:27} {differs}")
        assert apart[0] < (2e-6 if variant.precision == "fp32" else 1e-2), "the loss is another one"


def main() -> None:
    """Print tables, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches, two rounds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rounds, share = (2, 4) if asked.quick else (7, 1)
    who = [PEER, OURS] if asked.quick else [PEER, PADDED, COPIED_LESS, POOLED, OURS]
    short = measure(32, 256 // share, rounds, ["fp32", "bf16"], who)
    show(short)
    long = measure(77, 128 // share, rounds, ["fp32"], who)
    show(long)
    peer, ours = Variant(PEER, "fp32"), Variant(OURS, "fp32")
    peer_bf16, ours_bf16 = Variant(PEER, "bf16"), Variant(OURS, "bf16")
    answer = {
        "fp32": short.ratios(peer, ours),
        "bf16_vs_fp32": short.ratios(peer, ours_bf16),
        "bf16_vs_bf16": short.ratios(peer_bf16, ours_bf16),
        "context77_fp32": long.ratios(peer, ours),
    }
    for name, ratios in answer.items():
        print(f"{name:15} {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), wanted {BARS[name]}")
    print(json.dumps({name: round(statistics.median(ratios), 3) for name, ratios in answer.items()}))


if __name__ == "__main__":
    main()
