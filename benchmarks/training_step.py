"""Time of a training step against that of open_clip: the same weights, pairs, precision and batch.

    uv run python benchmarks/training_step.py                  # about ten minutes
    uv run python benchmarks/training_step.py --quick          # smaller batches, two rounds
    uv run python benchmarks/training_step.py --device cuda    # on a GPU; --quick without torch's compiler

The peer is open_clip's CLIP in its plain training step: forward, ClipLoss, backward, AdamW as open_clip_train makes it.
Ours is `multimodal.step.training_step`, first with towers that compute all tokens of padded captions, then with what
each change leaves out. A small ViT (width 192, 6 layers, 3 heads, patch 8, 64 pixels), a text transformer of 4 layers.
Pairs are Flickr8k's, read before the clock runs; where it is missing, noise and captions of such lengths.

Times are of one thread, in seconds of the processor, all variants in turn in one process; ratios are medians of the
ratios of rounds, with the lowest and highest. Losses of all rounds are compared too. Ends in one line of JSON: how many
times as fast.

On a GPU the model is ViT-B-32, 512 pairs, a context of 77. Times are by the GPU's clock, of five steps in a row, from
batches that are there already; the peer's are normalised before. float32 is in TF32 on both sides. The peer's AdamW is
torch's default, and `torch.compile` is of its whole model, as open_clip_train has them. Memory is of all tensors of a
variant at its peak, weights and optimizer among them.
"""

import argparse
import json
import statistics
from typing import NamedTuple

import torch
from clip_steps import (
    COPIED_LESS,
    OURS,
    PADDED,
    PEER,
    POOLED,
    SMALL,
    Given,
    Setting,
    Step,
    Variant,
    build,
    pairs,
    size_of,
)
from stopwatch import DEVICES, allocated, peak, seconds

BARS = {"fp32": 1.3, "bf16_vs_fp32": 1.7, "bf16_vs_bf16": 1.15, "context77_fp32": 1.6}
ALL = (PEER, PADDED, COPIED_LESS, POOLED, OURS)
STEPS = 5
"""In a row, in a round on a GPU."""


class Measured(NamedTuple):
    """The rounds in one setting, by variant."""

    setting: Setting
    seconds: dict[Variant, list[float]]
    """Of a step, by round."""
    losses: dict[Variant, list[float]]
    """Of every step."""
    memory: dict[Variant, int]
    """Bytes at the peak; 0 on a CPU."""

    def ratios(self, theirs: Variant, ours: Variant) -> list[float]:
        """How many times as fast, by round."""
        return [a / b for a, b in zip(self.seconds[theirs], self.seconds[ours], strict=True)]


def measure(setting: Setting, rounds: int, variants: list[Variant]) -> Measured:
    """All variants in turn, after a round to warm up, which counts for losses only."""
    device = setting.device
    if device == "cpu":
        batches = [[given] for given in pairs(setting, rounds + 1)]
    else:
        given = pairs(setting, STEPS * (rounds + 1))
        batches = [given[start : start + STEPS] for start in range(0, len(given), STEPS)]
    measured = Measured(setting, {}, {}, {})
    steps: dict[Variant, Step] = {}

    def run(variant: Variant, of_round: list[Given]) -> None:
        measured.losses[variant] += [loss.item() for loss in [steps[variant](given) for given in of_round]]

    for variant in variants:
        before = allocated(device)
        steps[variant] = build(setting, variant)
        measured.losses[variant], measured.seconds[variant] = [], []
        taken = seconds(device, lambda: run(variant, batches[0]))  # noqa: B023
        measured.memory[variant] = allocated(device) - before
        if device == "cuda":
            print(f"{variant}: warm after {taken:.1f} s", flush=True)
            measured.memory[variant] += peak(device, lambda: run(variant, batches[0]))  # noqa: B023
    for of_round in batches[1:]:
        for variant in variants:
            taken = seconds(device, lambda: run(variant, of_round))  # noqa: B023
            measured.seconds[variant].append(taken / len(of_round))
    return measured


def show(measured: Measured) -> None:
    """A line for each variant; AssertionError if a first loss is not the peer's."""
    first, on_gpu = next(iter(measured.seconds)), measured.setting.device == "cuda"
    wrong = []
    head = f"{'':44} {'s a step':>9}" + (f" {'pairs/s':>9} {'GiB':>6}" if on_gpu else "")
    print(f"{head}   against {first!s:19} against its own precision      loss differs by")
    for variant, taken in measured.seconds.items():
        told = []
        for theirs in (first, variant.peer):
            ratios = measured.ratios(theirs, variant)
            told.append(f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        losses = zip(measured.losses[variant], measured.losses[variant.peer], strict=True)
        apart = [abs(ours / theirs - 1) for ours, theirs in losses]
        differs = f"{apart[0]:.0e}, later {max(apart):.0e}"
        median = statistics.median(taken)
        line = f"{variant!s:44} {median:9.4f}"
        if on_gpu:
            line += f" {measured.setting.rows / median:9.0f} {measured.memory[variant] / 2**30:6.2f}"
        print(f"{line}   {told[0]:27} {told[1]:27} {differs}")
        tolerance = 1e-2 if variant.precision == "bf16" else 1e-3 if on_gpu else 2e-6  # TF32 has 10 bits
        if not apart[0] < tolerance:
            wrong.append(str(variant))
    assert not wrong, f"another loss: {', '.join(wrong)}"


def on_a_cpu(quick: bool) -> None:
    """Two contexts, two precisions."""
    torch.set_num_threads(1)
    rounds, share = (2, 4) if quick else (7, 1)
    who = (PEER, OURS) if quick else ALL
    both = [Variant(name, precision) for precision in ("fp32", "bf16") for name in who]
    short = measure(Setting(SMALL, 32, 256 // share), rounds, both)
    show(short)
    long = measure(Setting(SMALL, 77, 128 // share), rounds, [Variant(name, "fp32") for name in who])
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


def on_a_gpu(quick: bool, rows: int) -> None:
    """In float32 as far as it is for comparison; compiled last, since that may fail."""
    variants = [Variant(PEER, "fp32"), Variant(OURS, "fp32"), *(Variant(name, "bf16") for name in ALL)]
    if not quick:
        variants += [Variant(name, "bf16", compiled=True) for name in (PEER, POOLED, OURS)]
    measured = measure(Setting(size_of("ViT-B-32"), 77, rows, "cuda"), 3 if quick else 7, variants)
    show(measured)
    answer: dict[str, float] = {}
    for variant in variants:
        if variant.who == OURS:
            name = f"{variant.precision}{'_compiled' if variant.compiled else ''}"
            answer[name] = statistics.median(measured.ratios(variant.peer, variant))
            answer[f"{name}_memory"] = measured.memory[variant.peer] / measured.memory[variant]
    print(json.dumps({name: round(ratio, 3) for name, ratio in answer.items()}))


def main() -> None:
    """Print tables, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="less of all, two rounds; on a GPU three, nothing compiled"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cpu unless told")
    parser.add_argument("--rows", type=int, default=512, help="pairs in a batch on a GPU")
    asked = parser.parse_args()
    if asked.device == "cuda":
        on_a_gpu(asked.quick, asked.rows)
    else:
        on_a_cpu(asked.quick)


if __name__ == "__main__":
    main()
