"""Time and memory of the losses over all pairs, forward and backward, against those of open_clip.

    uv run python benchmarks/contrastive_loss.py --quick      # batches to 4096
    uv run python benchmarks/contrastive_loss.py              # to 32768, and the memory of 65536
    uv run python benchmarks/contrastive_loss.py 4096         # of these sizes only
    uv run python benchmarks/contrastive_loss.py --device cuda    # on a GPU: 4096, 16384, 32768

Features are unit rows of 512 dimensions. Times are of one thread, in seconds of the processor, all variants in turn in
one process; ratios are medians of the ratios of rounds. The share of the peak is what the products that a variant needs
would take at the speed of a product alone, measured in the same rounds, of what it took. Memory is the highest resident
size above what holds the features, of a process of its own (Linux). All ratios are to the peer in float32; its own bf16
has a row. Ends in one line of JSON: how many times better.

On a GPU times are by its clock, and memory is what tensors take beside the features at the peak
(`torch.cuda.max_memory_allocated`). Products in float32 are no TF32. Larger tiles than a processor's cache likes
have rows, too. Ratios are to the peer in the same precision there.
"""

import argparse
import json
import multiprocessing
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from stopwatch import DEVICES, Device, peak, seconds
from torch import Tensor

from multimodal.losses.infonce import info_nce
from multimodal.losses.sigmoid import sigmoid_loss
from multimodal.losses.tiles import TILE

DIMS = 512
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute one of the losses."""

    loss: Callable[[Inputs], Tensor]
    products: int
    """Of B x B x D, forward and backward."""
    matrices: float
    """How many matrices of B x B in float32 are held at the peak."""
    peer: str
    dtype: torch.dtype = torch.float32


def clip(inputs: Inputs) -> Tensor:
    """The peer."""
    return ClipLoss()(*inputs[:3])


def siglip(inputs: Inputs) -> Tensor:
    """The peer."""
    return SigLipLoss()(*inputs)


def in_bf16(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """With products in bf16."""

    def call(inputs: Inputs) -> Tensor:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return loss(inputs)

    return call


def tiled(inputs: Inputs, tile: int = TILE) -> Tensor:
    """As for batches that are not small."""
    return info_nce(*inputs[:3], keep_logits=False, tile=tile)


def dense(inputs: Inputs) -> Tensor:
    """As for small batches."""
    return info_nce(*inputs[:3], keep_logits=True)


def sigmoid(inputs: Inputs, tile: int = TILE) -> Tensor:
    """There is one way."""
    return sigmoid_loss(*inputs, tile=tile)


VARIANTS = {
    "ClipLoss": Variant(clip, 6, 4.1, "ClipLoss"),
    "ClipLoss_bf16": Variant(in_bf16(clip), 6, 4.1, "ClipLoss", torch.bfloat16),
    "infonce_dense_fp32": Variant(dense, 3, 1.0, "ClipLoss"),
    "infonce_tiled_fp32": Variant(tiled, 4, 0, "ClipLoss"),
    "infonce_tiled_bf16": Variant(in_bf16(tiled), 4, 0, "ClipLoss", torch.bfloat16),
    "SigLipLoss": Variant(siglip, 3, 5.1, "SigLipLoss"),
    "SigLipLoss_bf16": Variant(in_bf16(siglip), 3, 5.1, "SigLipLoss", torch.bfloat16),
    "sigmoid_fp32": Variant(sigmoid, 3, 0, "SigLipLoss"),
    "sigmoid_bf16": Variant(in_bf16(sigmoid), 3, 0, "SigLipLoss", torch.bfloat16),
}
TILES = (4096, 8192)
"""Of other variants on a GPU."""
REPORTED = ("infonce_memory_16384", "sigmoid_memory_8192")
NAMED = ("infonce_dense_fp32_4096", "infonce_tiled_fp32_4096", "infonce_tiled_bf16_4096", "sigmoid_fp32_4096")


def made(size: int, variant: str, device: Device = "cpu") -> Inputs:
    """Unit features, a scale and a bias as in training."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(size, DIMS, generator=generator) for _ in range(2)]
    for z in features:
        z /= z.norm(dim=1, keepdim=True)
    at_start = (10.0, -10.0) if "sig" in variant.lower() else (50.0, 0.0)
    x, y, scale, bias = (z.to(device).requires_grad_() for z in (*features, *map(torch.tensor, at_start)))
    return x, y, scale, bias


def forget(inputs: Inputs) -> None:
    """The gradients."""
    for leaf in inputs:
        leaf.grad = None


def step(variant: Variant, inputs: Inputs) -> Tensor:
    """Forward and backward; the loss."""
    forget(inputs)
    loss = variant.loss(inputs)
    loss.backward()
    return loss.detach()


def product_speed(dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a product alone, of the size of a tile."""
    a, b = (torch.randn(1024, DIMS).to(dtype) for _ in range(2))
    times = [seconds("cpu", lambda: torch.mm(a, b.T)) for _ in range(5)]
    return 2 * 1024 * 1024 * DIMS / statistics.median(times[1:])


def status(key: str, path: str = "/proc/self/status") -> int:
    """A number of bytes from what Linux says."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_memory(variant: str, size: int, answer: Any) -> None:
    """Sends the bytes that a step takes at its peak above what holds the features."""
    inputs = made(size, variant)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is counted anew
    before = status("VmRSS")
    step(VARIANTS[variant], inputs)
    answer.send(status("VmHWM") - before)


def in_a_process(variant: str, size: int) -> int:
    """The peak memory of a variant in a process of its own."""
    context = multiprocessing.get_context("fork")  # nothing was computed yet in this one
    mine, theirs = context.Pipe()
    process = context.Process(target=peak_memory, args=(variant, size, theirs))
    process.start()
    theirs.close()
    found: int = mine.recv()
    process.join()
    return found


def fits(variant: str, size: int) -> bool:
    """Whether the matrices of a variant find room in what memory is free, with a note if not."""
    needed, free = VARIANTS[variant].matrices * size**2 * 4, status("MemAvailable", "/proc/meminfo")
    if needed > 0.8 * free:
        print(f"{variant:20} {size:6}  left out: would take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return needed <= 0.8 * free


def measure_memory(sizes: list[int]) -> dict[tuple[str, int], int]:
    """Bytes by variant and size."""
    found = {}
    for size in sizes:
        for name in VARIANTS:
            if not name.endswith("bf16") and fits(name, size):
                found[name, size] = in_a_process(name, size)
                peer = found.get((VARIANTS[name].peer, size))
                times = f"{peer / found[name, size]:6.1f}x less" if peer else ""
                print(f"{name:20} {size:6} {found[name, size] / 2**20:9.1f} MiB {times}", flush=True)
    return found


def measure_times(sizes: dict[int, int]) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """Median seconds and median ratios to the peer, by variant and size."""
    medians, ratios = {}, {}
    for size, rounds in sizes.items():
        names = [name for name in VARIANTS if fits(name, size)]
        inputs = {name: made(size, name) for name in ("infonce", "sigmoid")}
        times: dict[str, list[float]] = {name: [] for name in names}
        speeds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for number in range(rounds + (size <= 4096)):  # one to warm up
            for name in names:
                given = inputs["sigmoid" if "sig" in name.lower() else "infonce"]
                taken = seconds("cpu", lambda: step(VARIANTS[name], given))  # noqa: B023
                if number or size > 4096:
                    times[name].append(taken)
            for dtype, measured in speeds.items():
                measured.append(product_speed(dtype))
        for name in names:
            variant = VARIANTS[name]
            medians[name, size] = statistics.median(times[name])
            needed = 2 * variant.products * size**2 * DIMS / statistics.median(speeds[variant.dtype])
            line = f"{name:20} {size:6} {1e3 * medians[name, size]:9.0f} ms {needed / medians[name, size]:5.0%} of peak"
            if variant.peer in names:
                by_round = [theirs / ours for theirs, ours in zip(times[variant.peer], times[name], strict=True)]
                ratios[name, size] = statistics.median(by_round)
                line += f" {ratios[name, size]:5.2f}x ({min(by_round):.2f}-{max(by_round):.2f})"
            print(line, flush=True)
    return medians, ratios


def variants_on_a_gpu() -> dict[str, Variant]:
    """All, and ours with larger tiles; the peer is the one of the same precision."""
    found = dict(VARIANTS)
    for tile in TILES:
        for loss, of in ((partial(tiled, tile=tile), "infonce_tiled"), (partial(sigmoid, tile=tile), "sigmoid")):
            found[f"{of}_fp32_{tile}"] = replace(VARIANTS[f"{of}_fp32"], loss=loss)
            found[f"{of}_bf16_{tile}"] = replace(VARIANTS[f"{of}_bf16"], loss=in_bf16(loss))
    return {
        name: replace(variant, peer=f"{variant.peer}_bf16") if variant.dtype == torch.bfloat16 else variant
        for name, variant in found.items()
    }


def measure_on_a_gpu(sizes: list[int], rounds: int) -> None:
    """Times and memory of all that fits, then one line of JSON; AssertionError if a loss is not the peer's."""
    variants, answer, wrong = variants_on_a_gpu(), {}, []
    for size in sizes:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        names = [name for name, variant in variants.items() if variant.matrices * size**2 * 4 < 0.9 * free]
        inputs = {name: made(size, name, "cuda") for name in ("infonce", "sigmoid")}
        times: dict[str, list[float]] = {name: [] for name in names}
        memory, losses = {}, {}
        for number in range(rounds + 1):  # one to warm up
            for name in names:
                given, variant = inputs["sigmoid" if "sig" in name.lower() else "infonce"], variants[name]
                if number:
                    times[name].append(seconds("cuda", lambda: step(variant, given)))  # noqa: B023
                else:
                    losses[name] = step(variant, given).item()
                    forget(given)
                    memory[name] = peak("cuda", lambda: step(variant, given))  # noqa: B023
        for name in names:
            line, peer = f"{name:24} {size:6}", variants[name].peer
            line += f" {1e3 * statistics.median(times[name]):9.2f} ms {memory[name] / 2**20:9.1f} MiB"
            if peer in names:
                by_round = [theirs / ours for theirs, ours in zip(times[peer], times[name], strict=True)]
                answer[f"{name}_{size}"] = statistics.median(by_round)
                answer[f"{name}_memory_{size}"] = memory[peer] / memory[name]
                apart = abs(losses[name] / losses[peer] - 1)
                line += f" {answer[f'{name}_{size}']:6.2f}x ({min(by_round):.2f}-{max(by_round):.2f})"
                line += f" {answer[f'{name}_memory_{size}']:7.1f}x less, loss differs by {apart:.0e}"
                if apart > (1e-4 if variants[name].dtype == torch.float32 else 2e-2):
                    wrong.append(f"{name} of {size}")
            print(line, flush=True)
    print(json.dumps({name: round(ratio, 2) for name, ratio in answer.items() if "Loss" not in name}))
    assert not wrong, f"another loss: {', '.join(wrong)}"


def draw(times: dict[tuple[str, int], float], memory: dict[tuple[str, int], int], path: Path) -> None:
    """Both curves."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    panels = [(axes[0], times, 1.0, "seconds, one thread"), (axes[1], memory, 2.0**20, "MiB above the features")]
    for ax, found, unit, label in panels:
        for i, name in enumerate(VARIANTS):
            sizes = [size for of, size in found if of == name]
            if sizes:
                style = "--" if VARIANTS[name].peer == name else "-"
                ax.loglog(
                    sizes, [found[name, size] / unit for size in sizes], style, marker=".", color=f"C{i}", label=name
                )
        ax.set(xlabel="batch", ylabel=label)
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"curves: {path}")


def main() -> None:
    """Print tables, draw curves, then print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, help="batches to measure")
    parser.add_argument("--quick", action="store_true", help="two rounds of small batches")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/contrastive_loss.png"), help="for the curves")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cpu unless told; no curves of a GPU")
    asked = parser.parse_args()
    if asked.device == "cuda":
        measure_on_a_gpu(asked.sizes or ([4096] if asked.quick else [4096, 16384, 32768]), 2 if asked.quick else 7)
        return
    torch.set_num_threads(1)
    sizes = asked.sizes or ([1024, 4096] if asked.quick else [1024, 2048, 4096, 8192, 16384, 32768])
    # What the peer takes grows with the square: few rounds of large batches.
    rounds = {size: 2 if asked.quick else 7 if size <= 4096 else 3 if size <= 8192 else 1 for size in sizes}
    memory = measure_memory(sizes)
    if not asked.sizes and not asked.quick:
        name, size = "infonce_tiled_fp32", 65536
        print(f"{name:20} {size:6} {in_a_process(name, size) / 2**20:9.1f} MiB")
    times, ratios = measure_times(rounds)
    draw(times, memory, asked.out)
    answer = {f"{name}_{size}": ratio for (name, size), ratio in ratios.items() if f"{name}_{size}" in NAMED}
    for key, name in (("infonce_memory", "infonce_tiled_fp32"), ("sigmoid_memory", "sigmoid_fp32")):
        for (of, size), taken in memory.items():
            peer = memory.get((VARIANTS[name].peer, size))
            if of == name and peer and (asked.quick or asked.sizes or f"{key}_{size}" in REPORTED):
                answer[f"{key}_{size}"] = peer / taken
    print(json.dumps({name: round(times_better, 2) for name, times_better in answer.items()}))


if __name__ == "__main__":
    main()
