"""The laws of the order of samples."""

import pytest

from multimodal.data.order import Batches, epoch_order

SAMPLES, BATCH = 50, 12
PER_EPOCH = SAMPLES // BATCH


def batches(start: int = 0, stop: int = 3 * PER_EPOCH, rank: int = 0, world_size: int = 1, seed: int = 1) -> Batches:
    return Batches(SAMPLES, seed, BATCH, rank, world_size, start, stop)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_is_a_permutation(epoch: int) -> None:
    assert sorted(epoch_order(SAMPLES, 1, epoch)) == list(range(SAMPLES))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(epoch_order(SAMPLES, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == len(orders)
    assert all(tuple(epoch_order(SAMPLES, *key)) == order for key, order in orders.items())


def test_batches_do_not_cross_epochs() -> None:
    for step, batch in enumerate(batches()):
        assert {epoch for epoch, _ in batch} == {step // PER_EPOCH}


def test_no_sample_comes_twice_in_an_epoch() -> None:
    positions = [position for batch in batches() for position in batch]
    assert len(set(positions)) == len(positions) == 3 * PER_EPOCH * BATCH


def test_what_an_epoch_leaves_out_differs_from_epoch_to_epoch() -> None:
    seen = [
        {index for batch in list(batches())[e * PER_EPOCH : (e + 1) * PER_EPOCH] for _, index in batch} for e in (0, 1)
    ]
    assert [len(s) for s in seen] == [PER_EPOCH * BATCH] * 2
    assert seen[0] != seen[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_rows_of_all_ranks_in_turn_are_the_global_batch(world_size: int) -> None:
    ranks = [list(batches(rank=rank, world_size=world_size)) for rank in range(world_size)]
    joined = [[position for rows in parts for position in rows] for parts in zip(*ranks, strict=True)]
    assert joined == list(batches())


@pytest.mark.parametrize("start", [0, 1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1, 3 * PER_EPOCH])
def test_a_run_that_starts_later_sees_what_the_whole_run_sees_from_there(start: int) -> None:
    assert list(batches(start=start)) == list(batches())[start:]
    assert len(batches(start=start)) == len(list(batches(start=start)))


def test_a_longer_run_begins_with_the_shorter_one() -> None:
    assert list(batches(stop=20))[:7] == list(batches(stop=7))


def test_batches_are_full() -> None:
    assert {len(batch) for batch in batches()} == {BATCH}
