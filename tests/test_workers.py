"""Whatever goes wrong, the processes that read data end, and so does the program."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import signal, time, torch
from contextlib import closing
from multimodal.data.loader import Reader, read_inputs

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background

class Preprocessor:
    num_truncated = 0
    def __call__(self, value, rng):
        time.sleep(0.02)
        if value == {place}:
            raise {error}
        return torch.tensor([value])

inputs = range(100_000)
with closing(read_inputs(inputs, Reader("image", Preprocessor()), inputs, 8, workers=2)) as batches:
    for batch in batches:
        print(batch.places[0], flush=True)
        for error in batch.broken.values():
            raise error
"""


def start(error: str, place: int = 700) -> tuple[subprocess.Popen[str], list[int]]:
    """The program, and its workers, when it has read its first batch."""
    command = [sys.executable, "-c", PROGRAM.format(error=error, place=place)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return process, [int(word) for word in children.split()]


def end(process: subprocess.Popen[str], workers: list[int]) -> str:
    """What it wrote to the end, which comes soon, and with it that of its workers."""
    try:
        _, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        for one in (process.pid, *workers):
            os.kill(one, signal.SIGKILL)
        raise
    assert process.returncode != 0
    assert len(workers) == 2
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    return errors


@pytest.mark.parametrize("error", ["ValueError('700 is broken')", "ZeroDivisionError('700 is broken')"])
def test_a_program_that_fails_ends_with_its_workers(error: str) -> None:
    assert "700 is broken" in end(*start(error))


def test_a_program_that_is_interrupted_ends_with_its_workers() -> None:
    process, workers = start("ValueError", place=-1)  # which never comes, however late the signal does
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    if process.poll() is None:  # Python loses an interrupt that comes in a destructor, and a user presses again
        process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in end(process, workers)
