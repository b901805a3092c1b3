"""Time of a zero-shot evaluation against open_clip's: the same weights, names, prompts and images; memory of retrieval.

    uv run python benchmarks/evaluation.py                 # 1,000 classes x 80 templates, 10,000 images: half an hour
    uv run python benchmarks/evaluation.py --quick         # 40 of the classes, 400 images; retrieval of 10,000 x 10,000
    uv run python benchmarks/evaluation.py --context 32

The peer is open_clip's `build_zero_shot_classifier` and a plain loop over images with its transform. Ours is the
encoder of evaluations with `zero_shot_classifier`. The model is that of training_step.py: a small ViT (width 192,
6 layers, 64 pixels), a text transformer of 4 layers, context 77, float32. Images are noise, in memory. Times are of one
thread, in seconds of the processor, both in turn in one process; `again` is ours once more after other training, when
the ids of prompts are known. Retrieval of 50,000 x 50,000 features of 512 runs in a process of its own.

Ends in one line of JSON: how many times as fast the whole is and the classifier by itself, and the peak memory of the
whole retrieval process in GiB.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from training_step import MEAN, OURS, STD, our_model, peer_model, text_transformer, vit

from multimodal.data.augment import Keep
from multimodal.data.loader import Reader
from multimodal.encoder import Encoder
from multimodal.evals.zero_shot import top_k_accuracy, zero_shot_classifier
from multimodal.remembering import Remembering

TEMPLATES = open_clip.OPENAI_IMAGENET_TEMPLATES
BATCH, SIDE = 256, 64
BARS = {"zero_shot": 4.0, "classifier": 8.0}
T = TypeVar("T")


def timed(what: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the processor, and what it gave."""
    started = time.process_time()
    result = what()
    return time.process_time() - started, result


def noise(count: int) -> list[Image.Image]:
    """The same images each time."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]


class Peer:
    """open_clip's model, its builder, and a loop over images."""

    def __init__(self, context: int) -> None:
        self.model, self.tokenizer = peer_model(context).eval(), open_clip.SimpleTokenizer(context_length=context)
        self.transform = open_clip.image_transform(SIDE, is_train=False, mean=MEAN, std=STD)

    def classifier(self, names: list[str]) -> Tensor:
        """[K, D]"""
        built: Tensor = open_clip.build_zero_shot_classifier(self.model, self.tokenizer, names, TEMPLATES)
        return built.T

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Tensor:
        """[n, D]"""
        loader = DataLoader(images, BATCH, collate_fn=lambda rows: torch.stack([self.transform(row) for row in rows]))
        return torch.cat([self.model.encode_image(batch, normalize=True) for batch in loader])


class Ours:
    """The same weights, as evaluations see them."""

    def __init__(self, context: int) -> None:
        readers = {
            "image": Reader("image", vit().preprocessor(list, Keep(), None)),
            "text": Reader("text", text_transformer(context).preprocessor(list, Keep(), None)),
        }
        encoder = Encoder(our_model(context, OURS), readers, torch.autocast("cpu", enabled=False), BATCH)
        self.encoder = Remembering(encoder)

    def classifier(self, names: list[str]) -> Tensor:
        """[K, D]"""
        return zero_shot_classifier(self.encoder, names, [template("{}") for template in TEMPLATES])

    def images(self, images: list[Image.Image]) -> Tensor:
        """[n, D]"""
        return self.encoder.encode("image", images)


def retrieval_peak(count: int) -> float:
    """GiB, of a process of its own."""
    program = Path(__file__).with_name("retrieval_memory.py")
    said = subprocess.run([sys.executable, program, str(count)], check=True, capture_output=True, text=True).stdout
    return float(json.loads(said.splitlines()[-1])["retrieval_peak_gib"])


def main() -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a share of the classes and images")
    parser.add_argument("--context", type=int, default=77, help="tokens that texts are filled up to (77)")
    parser.add_argument("--rounds", type=int, default=0, help="0: one, and three where it is --quick")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    num_classes, num_images, count = (40, 400, 10_000) if asked.quick else (1000, 10_000, 50_000)
    names, pictures = list(open_clip.IMAGENET_CLASSNAMES[:num_classes]), noise(num_images)
    labels = torch.arange(num_images) % num_classes
    share = f", {num_classes / 10:g}% of the classes" if asked.quick else ""
    print(f"{num_classes} classes x {len(TEMPLATES)} templates, {num_images:,} images, context {asked.context}{share}")

    peer = Peer(asked.context)
    rows = []
    for _ in range(asked.rounds or (3 if asked.quick else 1)):
        ours = Ours(asked.context)
        theirs_text, theirs = timed(lambda: peer.classifier(names))
        ours_text, built = timed(lambda: ours.classifier(names))  # noqa: B023
        theirs_image, seen = timed(lambda: peer.images(pictures))
        ours_image, encoded = timed(lambda: ours.images(pictures))  # noqa: B023
        ours.encoder.forget()
        again, _ = timed(lambda: ours.classifier(names))  # noqa: B023
        off = (built - theirs).abs().max().item()
        same = top_k_accuracy(seen @ theirs.T, labels, 1), top_k_accuracy(encoded @ built.T, labels, 1)
        print(
            f"classifier: {theirs_text:.1f} s, ours {ours_text:.1f} s, again {again:.1f} s; weights differ by {off:.1e}"
        )
        print(f"images: {theirs_image:.1f} s, ours {ours_image:.1f} s; top-1 {same[0]:.4f}, {same[1]:.4f}")
        if off > 1e-6:
            raise SystemExit("the classifiers differ by more than 1e-6")
        rows.append((theirs_text, ours_text, theirs_image, ours_image, again))
    ratios = {
        "zero_shot": median((text + image) / (mine + seen) for text, mine, image, seen, _ in rows),
        "classifier": median(text / mine for text, mine, *_ in rows),
        "classifier_again": median(text / again for text, *_, again in rows),
    }
    peak = retrieval_peak(count)
    print(f"retrieval {count:,} x {count:,}: peak {peak:.2f} GiB (wanted below 1 at 50,000)")
    for name, bar in BARS.items():
        print(f"{name}: {ratios[name]:.2f} times as fast (wanted {bar})")
    print(json.dumps({name: round(value, 3) for name, value in {**ratios, "retrieval_peak_gib": peak}.items()}))


if __name__ == "__main__":
    main()
