"""Time and memory of what runs on a processor or on a GPU, for the benchmarks that can measure either."""

import time
from collections.abc import Callable
from typing import Any, Literal

import torch

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")


def seconds(device: Device, run: Callable[[], Any]) -> float:
    """Of the processor, where the work of others does not count; by the clock of a GPU, on which nothing else runs."""
    if device == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()  # type: ignore[no-untyped-call]
    run()
    last.record()  # type: ignore[no-untyped-call]
    last.synchronize()  # type: ignore[no-untyped-call]
    return float(first.elapsed_time(last)) / 1e3  # type: ignore[no-untyped-call]


def allocated(device: Device) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU, of which nobody counts them."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak(device: Device, run: Callable[[], Any]) -> int:
    """Bytes of tensors on a GPU at the most while it runs, above those that are there; 0 on a CPU."""
    before = allocated(device)
    if device == "cpu":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
