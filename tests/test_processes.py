"""Real processes: kills, stop signals, several ranks, several runs in one process, the offline W&B run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # several ranks may take ten times as long beside others

REPOSITORY = Path(__file__).parent.parent
STEPS = 24
VIT = [
    "tower@towers.image=vit_tiny",
    "towers.image.image_size=32",
    "towers.image.patch_size=16",
    "towers.image.width=32",
    "towers.image.layers=2",
    "towers.image.heads=2",
]
RESNET = [  # its weights lie in memory as channels_last, its batch norm has running statistics
    "towers.image.width=8",
    "towers.image.layers=[1,1,1,1]",
    "towers.image.heads=2",
]
TINY = [
    "towers.text.width=32",
    "towers.text.layers=1",
    "towers.text.heads=2",
    "model.embed_dim=16",
    "dataset.image_size=32",
    "dataset.size=200",
    "global_batch_size=32",
    "evals.shapes.dataset.size=80",
    "evals.shapes.every=9steps",
    "log.every=1steps",
    "checkpoint.every=4steps",
    f"duration={STEPS}steps",
    "precision=fp32",
]


def command(runs: Path, name: str, *overrides: str, ranks: int = 1, tower: Sequence[str] = VIT) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "train.py", f"run.name={name}", f"paths.runs={runs}", *tower, *TINY, "tracker=none", *overrides]


def environment() -> dict[str, str]:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**keep, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1"}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment(), text=True, start_new_session=True, **pipes)


def run(arguments: list[str], seconds: float = 600) -> str:
    """What it printed; that of one that hangs says where all of its threads are."""
    process = start(arguments)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def rows(runs: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def computed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    clocked = {"train/samples_per_s", "train/data_wait"}
    return [{key: value for key, value in row.items() if key not in clocked} for row in rows]


def weights(runs: Path, name: str, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(runs / name / "checkpoints" / f"step-{STEPS:08d}" / f"{file}.safetensors")


def wait_for_step(runs: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        log = runs / name / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # the group that `start` made: the program and its data workers
    process.communicate()


@pytest.mark.parametrize(
    ("workers", "tower", "words"),
    [
        (0, VIT, []),
        (2, VIT, []),
        (2, RESNET, []),
        (0, VIT, ["optimizer=muon", "schedule=wsd", "ema.decay=0.9"]),
        (0, RESNET, ["optimizer=lion", "schedule=inverse_sqrt", "ema.decay=0.9"]),
    ],
)
def test_killed_at_random_steps_and_run_again_equals_uninterrupted(
    tmp_path: Path, workers: int, tower: list[str], words: list[str]
) -> None:
    run(command(tmp_path, "whole", f"workers={workers}", *words, tower=tower))
    draw = random.Random(workers)
    for step in sorted(draw.sample(range(1, STEPS - 2), 3)):
        process = start(command(tmp_path, "killed", f"workers={workers}", *words, tower=tower))
        wait_for_step(tmp_path, "killed", step, process)
        kill(process)
    run(command(tmp_path, "killed", f"workers={workers}", *words, tower=tower))

    for file in ("model", "optimizer", *(["ema"] if words else [])):
        whole, killed = weights(tmp_path, "whole", file), weights(tmp_path, "killed", file)
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert computed(rows(tmp_path, "whole")) == computed(rows(tmp_path, "killed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_cleanly_and_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    arguments = command(tmp_path, "stopped", "workers=1", "checkpoint.every=never")
    process = start(arguments)
    wait_for_step(tmp_path, "stopped", 3, process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "the same command continues" in output
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["status"] == "stopped"

    assert "continues after step" in run(arguments)
    steps = [row["step"] for row in rows(tmp_path, "stopped") if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert "is finished" in run(arguments)


@pytest.mark.parametrize("words", [[], ["sharding=full", "micro_batch_size=auto", "ema.decay=0.9"]])
def test_two_ranks_follow_one_process_and_share_one_run_directory(tmp_path: Path, words: list[str]) -> None:
    run(command(tmp_path, "one", *words))
    run(command(tmp_path, "two", *words, ranks=2))
    one, two = computed(rows(tmp_path, "one")), computed(rows(tmp_path, "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    losses = [[row["train/loss"] for row in log if "train/loss" in row] for log in (one, two)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    for name, expected in weights(tmp_path, "one").items():
        torch.testing.assert_close(weights(tmp_path, "two")[name], expected, rtol=1e-3, atol=2e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names


PARTS_THAT_FAIL = '''
import os
from multimodal.losses.infonce import InfoNCE

class FailsOnRankOne(InfoNCE):
    """Raises on one rank, at its third step."""

    def __call__(self, features):
        global calls
        calls = globals().get("calls", 0) + 1
        if os.environ["RANK"] == "1" and calls == 3:
            raise RuntimeError("rank one has had enough")
        return super().__call__(features)
'''


def announce(folder: Path, package: str, source: str) -> str:
    """Make an importable package that announces parts, as an installed one does; the PYTHONPATH that finds it."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[multimodal.parts]\n{package} = {package}\n")
    return os.pathsep.join([str(folder), str(REPOSITORY)])


def test_a_rank_that_fails_ends_all_with_a_non_zero_status(tmp_path: Path) -> None:
    path = announce(tmp_path / "site", "failing_parts", PARTS_THAT_FAIL)
    arguments = command(tmp_path, "failing", "loss.infonce._target_=failing_parts.FailsOnRankOne", ranks=2)
    result = subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode != 0
    assert "rank one has had enough" in result.stderr


def test_a_refusal_reaches_all_ranks_in_words(tmp_path: Path) -> None:
    run(command(tmp_path, "refused", "duration=2steps"))
    process = start(command(tmp_path, "refused", "duration=2steps", "seed=7", ranks=2))
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "seed: 1 -> 7" in output
    assert "trainer.py" not in output  # no traceback of ours; the launcher has its own


def test_runs_of_a_sweep_are_runs_of_their_own_also_to_wandb(tmp_path: Path) -> None:
    program, script, *overrides = command(tmp_path, "x", "seed=1,2", "tracker=wandb", "duration=3steps")
    run([program, script, "-m", *(one for one in overrides if not one.startswith(("run.name", "tracker=none")))])
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert len(names) == 2
    assert {yaml.safe_load((tmp_path / name / "config.yaml").read_text())["seed"] for name in names} == {1, 2}
    ids = [json.loads((tmp_path / name / "summary.json").read_text())["id"] for name in names]
    assert ids[0] != ids[1]
    for name, identity in zip(names, ids, strict=True):
        (offline,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert offline.name.endswith(identity)
        losses = [row["train/loss"] for row in rows(tmp_path, name) if "train/loss" in row]
        assert history(offline, "train/loss") == pytest.approx(losses)


def history(offline: Path, key: str) -> list[float]:
    """The values of a metric in an offline W&B run, by W&B's own reader."""
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(next(offline.glob("*.wandb")))]
    lines = subprocess.run(reader, capture_output=True, text=True, check=True, env=environment()).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [item[key] for item in items if key in item]


def test_a_resumed_offline_wandb_run_holds_the_whole_history(tmp_path: Path) -> None:
    arguments = [*command(tmp_path, "resumed", "workers=0"), "tracker=wandb"]
    arguments.remove("tracker=none")
    process = start(arguments)
    wait_for_step(tmp_path, "resumed", 6, process)
    kill(process)
    run(arguments)
    newest = max((tmp_path / "resumed" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    losses = [row["train/loss"] for row in rows(tmp_path, "resumed") if "train/loss" in row]
    assert len(losses) == STEPS
    assert history(newest, "train/loss") == pytest.approx(losses)


def test_the_stored_configuration_launches_the_same_run(tmp_path: Path) -> None:
    run(command(tmp_path, "first", "duration=3steps"))
    launch = [sys.executable, "train.py", f"--config-path={tmp_path / 'first'}", "--config-name=config"]
    assert "is finished" in run(launch)
    run([*launch, "run.name=second"])
    assert computed(rows(tmp_path, "first")) == computed(rows(tmp_path, "second"))
    assert not (REPOSITORY / "outputs").exists()


def test_evaluating_a_finished_run_gives_the_numbers_of_its_last_evaluation(tmp_path: Path) -> None:
    run(command(tmp_path, "run", "duration=3steps", "ema.decay=0.5"))
    for weights in ("raw", "ema"):
        words = ["run=run", f"paths.runs={tmp_path}", "workers=0", f"weights={weights}"]
        run([sys.executable, "scripts/evaluate.py", *words])
    found = json.loads((tmp_path / "run" / "evaluations" / "step-00000003" / "results.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    values = {key: one["value"] for key, one in found.items()}
    assert values == {key: value for key, value in summary.items() if key.startswith("eval")}
    assert found.keys() >= {"eval/shapes/top1", "eval_ema/shapes/top1"}
    drawn = {path.name for path in (tmp_path / "run" / "evaluations" / "step-00000003").glob("*.png")}
    figures = ("confusion_matrix", "failures")
    assert drawn == {f"{prefix}shapes_{name}.png" for prefix in ("", "eval_ema_") for name in figures}
