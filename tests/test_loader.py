"""The laws of reading: the same batches however they are read, and full ones whatever is broken."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal import distributed
from multimodal.batch import Batch, Sample
from multimodal.data import workers
from multimodal.data.loader import MAX_ATTEMPTS, Reader, read_inputs, training_batches
from multimodal.data.order import Batches
from multimodal.data.workers import lost_worker
from multimodal.parts import BadSample, Source

SAMPLES, BATCH = 20, 6


class Numbers(Source):
    """Sample i holds i; some are broken."""

    def __init__(self, broken: Iterable[int] = ()) -> None:
        self.broken = frozenset(broken)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BadSample(f"number/{index}: broken")
        return Sample(f"number/{index}", {"number": index, "negative": -index})

    def captions(self, index: int) -> tuple[str, ...]:
        return ()


class Plain:
    """The number."""

    num_truncated = 0

    def __call__(self, value: int, rng: Random | None) -> Tensor:
        return torch.tensor([value])

    def save(self, folder: Path) -> None: ...


class Noisy:
    """The number and a random one."""

    num_truncated = 0

    def __call__(self, value: int, rng: Random | None) -> Tensor:
        assert rng is not None
        return torch.tensor([value, rng.randrange(10**6)])

    def save(self, folder: Path) -> None: ...


READERS = {"one": Reader("number", Noisy()), "other": Reader("negative", Noisy())}


def read(
    source: Source, workers: int = 0, start: int = 0, stop: int = 9, seed: int = 1, timeout: float = 0
) -> list[Batch]:
    order = Batches(SAMPLES, seed, BATCH, 0, 1, start, stop)
    return list(training_batches(source, READERS, order, seed, workers, timeout=timeout))


def assert_same(ours: list[Batch], others: list[Batch]) -> None:
    assert len(ours) == len(others)
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert a.replaced == b.replaced
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


def test_the_batches_are_the_same_whatever_the_number_of_workers() -> None:
    source = Numbers(broken=[3, 11])
    assert_same(read(source, workers=0), read(source, workers=2))


def test_the_batches_are_the_same_beside_other_ranks_where_a_server_starts_workers() -> None:
    source = Numbers(broken=[3, 11])
    with distributed.pretended(2):
        assert_same(read(source), read(source, workers=2))


def test_inputs_are_the_same_beside_other_ranks_where_a_server_starts_workers() -> None:
    reader = Reader("image", Plain())
    with distributed.pretended(2):
        here, there = (list(read_inputs(range(20), reader, range(3, 17), 4, workers)) for workers in (0, 2))
    assert [read.places for read in here] == [read.places for read in there]
    assert all(torch.equal(a.values, b.values) for a, b in zip(here, there, strict=True))


class Unwilling(Numbers):
    """Can be sent, or not, and then not made where it arrives."""

    def __init__(self, sent: bool) -> None:
        super().__init__()
        self.held = None if sent else (number for number in range(3))

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ZeroDivisionError("where it arrives")


def test_what_cannot_be_sent_to_workers_or_not_be_made_there_is_told() -> None:
    with distributed.pretended(2):
        with pytest.raises(TypeError, match=r"it cannot be: cannot pickle 'generator' object"):
            read(Unwilling(sent=False), workers=1)
        with pytest.raises(ZeroDivisionError, match="where it arrives"):
            read(Unwilling(sent=True), workers=1)


def test_a_run_that_starts_later_reads_what_the_whole_run_reads_from_there() -> None:
    source = Numbers(broken=[3, 11])
    assert_same(read(source)[4:], read(source, start=4))


def test_reading_leaves_the_random_state_of_the_step_alone() -> None:
    before = torch.get_rng_state()
    read(Numbers())
    read(Numbers(), workers=1, stop=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_tower_reads_its_own_input_of_the_same_sample() -> None:
    for batch in read(Numbers()):
        assert torch.equal(batch.inputs["one"][:, 0], batch.indices)
        assert torch.equal(batch.inputs["other"][:, 0], -batch.indices)


def test_random_variations_of_a_sample_differ_between_epochs_and_seeds() -> None:
    drawn = {
        (seed, step, int(index)): int(noise)
        for seed in (1, 2)
        for step, batch in enumerate(read(Numbers(), seed=seed))
        for index, noise in zip(batch.indices, batch.inputs["one"][:, 1], strict=True)
    }
    assert len(set(drawn.values())) > 0.99 * len(drawn)


def test_a_broken_sample_is_replaced_by_a_good_one_named_and_the_batch_stays_full() -> None:
    broken = {3, 11, 12}
    whole, mended = read(Numbers()), read(Numbers(broken))
    for batch, other in zip(whole, mended, strict=True):
        hit = [int(i) for i in batch.indices if int(i) in broken]
        assert len(other.indices) == BATCH
        assert not broken & set(other.indices.tolist())
        assert torch.equal(other.inputs["one"][:, 0], other.indices)
        named = set(other.replaced)
        assert {f"number/{index}: broken" for index in hit} <= named
        good = torch.tensor([int(i) not in broken for i in batch.indices])
        assert torch.equal(batch.inputs["one"][good], other.inputs["one"][good])
    assert sum(len(batch.replaced) for batch in mended) >= 3


def test_broken_samples_are_replaced_alike_each_time() -> None:
    source = Numbers(broken=range(15))
    assert_same(read(source), read(source))


def test_nothing_but_broken_samples_ends_the_run_and_names_one() -> None:
    with pytest.raises(BadSample, match=rf"{MAX_ATTEMPTS} samples in a row are broken, the last one number/\d+"):
        read(Numbers(broken=range(SAMPLES)))


def test_an_error_that_is_no_bad_sample_is_not_swallowed() -> None:
    class Faulty(Numbers):
        def __getitem__(self, index: int) -> Sample:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read(Faulty())


class Arrays(Numbers):
    """Sample i holds whether i is in all arrays, and how many of them are in memory that processes share."""

    def __init__(self) -> None:
        super().__init__()
        table = np.arange(SAMPLES * 3.0).reshape(SAMPLES, 3)
        self.arrays = [np.arange(SAMPLES, dtype=np.int8), np.asfortranarray(table), np.array(["a"] * SAMPLES), table]
        self.empty, self.halves = np.zeros((0, 3)), table[::2]

    def __getitem__(self, index: int) -> Sample:
        maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "shm/torch" in line]
        ranges = [[int(end, 16) for end in one.split("-")] for one in maps]
        shared = [any(a <= array.ctypes.data < b for a, b in ranges) for array in self.arrays]
        numbers, one, letters, other = self.arrays
        right = numbers[index] == index and letters[index] == "a" and one[index, 1] == other[index, 1] == 3 * index + 1
        right &= self.empty.shape == (0, 3) and np.array_equal(self.halves, other[::2])
        right &= all(array.flags.aligned for array in self.arrays)
        return Sample(f"array/{index}", {"number": bool(right), "negative": sum(shared)})


def test_beside_other_ranks_workers_share_the_arrays_of_a_data_set() -> None:
    with distributed.pretended(2):
        for batch in read(Arrays(), workers=2):
            assert bool(batch.inputs["one"][:, 0].all())
            assert batch.inputs["other"][:, 0].tolist() == [4] * BATCH


class Slow(Numbers):
    """Sample 3 takes a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.seconds if index == 3 else 0)
        return super().__getitem__(index)


def test_a_batch_that_is_asked_after_comes_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL", 0.05)
    assert_same(read(Numbers()), read(Slow(0.5), workers=2, timeout=60))


def test_workers_that_are_stuck_are_told_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL", 0.05)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.05)  # how long torch lets them end
    with pytest.raises(RuntimeError) as caught:
        read(Slow(1000), workers=2, timeout=0.5)
    assert lost_worker(caught.value) == "the processes that read data gave none for 0.5 seconds"
    assert multiprocessing.active_children() == []


def test_too_little_shared_memory_is_told() -> None:
    told = "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
    assert "/dev/shm" in (lost_worker(RuntimeError(told)) or "")
    assert lost_worker(RuntimeError("something else")) is None


class Suicidal(Numbers):
    """Whoever reads sample 3 is killed."""

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_that_is_killed_is_told_long_before_the_timeout(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL", 0.5)
    with distributed.pretended(ranks), pytest.raises(RuntimeError) as caught:
        read(Suicidal(), workers=1, timeout=10_000)
    told = lost_worker(caught.value)
    assert told is not None
    assert re.match(r"a process that reads data \(pid \d+\) (is killed|exited)", told)
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_while_a_step_computes_is_told() -> None:
    order = Batches(SAMPLES, 1, BATCH, 0, 1, 0, 9)
    with closing(training_batches(Numbers(), READERS, order, 1, workers=1)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        with pytest.raises(RuntimeError) as caught:
            time.sleep(10)
    assert lost_worker(caught.value) is not None
    assert multiprocessing.active_children() == []


class Words(Source):
    """Sample i says one of five words, and is of one of two classes."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"word/{index}", {"text": self.captions(index), "number": index})

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"word {index % 5}",)

    def label(self, index: int) -> int:
        return index % 2


class Letters:
    """The bytes of a text."""

    num_truncated = 0

    def __call__(self, value: tuple[str, ...], rng: Random | None) -> Tensor:
        return torch.tensor(list(value[0].encode()))

    def save(self, folder: Path) -> None: ...


def same_rows(ids: Tensor) -> Tensor:
    return torch.eq(ids[:, None], ids)


@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_one_caption_or_class_have_one_id(kept: bool) -> None:
    readers = {"text": Reader("text", Letters()), "other": Reader("number", Noisy())}
    features = {"text": lambda index: torch.zeros(2)} if kept else {}
    order = Batches(SAMPLES, 1, SAMPLES, 0, 1, 0, 1)
    (batch,) = training_batches(Words(), readers, order, 1, 0, features)
    assert torch.equal(same_rows(batch.ids["caption"]), same_rows(batch.indices % 5))
    assert torch.equal(batch.ids["label"], batch.indices % 2)


def test_samples_without_captions_are_all_different() -> None:
    for batch in read(Numbers()):
        assert len(set(batch.ids["caption"].tolist())) == BATCH
        assert "label" not in batch.ids


class HalfLabelled(Words):
    """Some samples have a class."""

    def label(self, index: int) -> int | None:  # type: ignore[override]
        return index % 2 or None


def test_samples_of_which_some_have_no_class_are_refused_by_number() -> None:
    order = Batches(SAMPLES, 1, SAMPLES, 0, 1, 0, 1)
    with pytest.raises(BadSample, match=r"a class, or none: sample \d+ has caption.*, sample \d+ has caption"):
        list(training_batches(HalfLabelled(), {"text": Reader("text", Letters())}, order, 1, 0))


def test_all_tensors_of_a_batch_are_pinned_and_go_to_the_device_but_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    batch = Batch({"image": x}, x, {"caption": x}, pooled={"text": x}, lengths={"image": x})
    meta = torch.device("meta")
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to(meta))
    for moved in (batch.to(meta), batch.pin_memory()):
        given = (moved.inputs["image"], moved.indices, moved.ids["caption"], moved.pooled["text"])
        assert all(tensor.device == meta for tensor in given)
        assert moved.lengths["image"] is x
