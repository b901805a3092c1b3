"""The laws of scripts/runs.py: how runs stand, which ones are meant, and that nothing goes that somebody needs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import composed_of, config_of, loaded, run_program
from report_runs import evaluated, rows, trained

from multimodal import checkpoint, run_lock
from multimodal.config import ConfigError, RunError
from multimodal.inventory.cleaning import delete, planned
from multimodal.inventory.listing import Entry, clock, entries
from multimodal.inventory.where import Condition
from multimodal.report.numbers import short

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"

Train = Callable[[Path], None]


@pytest.fixture
def train() -> Iterator[Train]:
    """Let another process hold a run's lock, until the test ends."""
    holders: list[subprocess.Popen[str]] = []

    def hold(folder: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(folder / run_lock.NAME)]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout is not None
        holders[-1].stdout.readline()

    yield hold
    for holder in holders:
        holder.communicate("\n", timeout=30)


def ended(folder: Path, status: str) -> Path:
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": status}))
    return folder


def listed(root: Path) -> dict[str, Entry]:
    return {entry.run.name: entry for entry in entries(sorted(root.iterdir()))}


# --- how runs stand -------------------------------------------------------------------------------------------------


def test_a_status_is_what_the_run_said_last_unless_it_lives_or_was_killed(tmp_path: Path, train: Train) -> None:
    for name in ("finished", "stopped", "failed"):
        ended(trained(tmp_path / name), name)
    ended(trained(tmp_path / "early"), "stopped early")
    for name in ("killed", "live"):
        ended(trained(tmp_path / name), "running")
    evaluated(tmp_path / "evaluated")
    (trained(tmp_path / "broken") / "config.yaml").write_text("{")
    (ended(trained(tmp_path / "killed_locked"), "running") / run_lock.NAME).write_text("{}")
    train(tmp_path / "live")
    told = {name: entry.status for name, entry in listed(tmp_path).items()}
    assert told == {**{name: name for name in told}, "killed_locked": "killed", "early": "finished"}


def test_asking_whether_a_run_is_held_takes_nothing(tmp_path: Path, train: Train) -> None:
    run = trained(tmp_path / "a")
    assert not run_lock.is_held(run)
    assert not (run / run_lock.NAME).exists()
    train(run)
    assert run_lock.is_held(run)
    with pytest.raises(RunError, match="another process trains"):
        run_lock.RunLock(run)


@pytest.mark.parametrize(
    ("duration", "total"), [("100steps", 100), ("12800samples", 100), ("2epochs", 40), ("soon", None)]
)
def test_progress_of_a_live_run_is_from_its_log(tmp_path: Path, train: Train, duration: str, total: int | None) -> None:
    log = [{**row, "train/epoch": row["step"] / 20} for row in rows()]
    run = ended(trained(tmp_path / "a", {"duration": duration}, log), "running")
    train(run)
    (entry,) = entries([run])
    assert (entry.step, entry.total) == (60, total)
    speeds = sorted(row["train/samples_per_s"] for row in log[1:-1])
    assert entry.rate == speeds[2]
    assert entry.left == (None if total is None else pytest.approx((total - 60) * 128 / entry.rate))
    assert entry.size == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def test_the_metric_is_the_best_of_what_checkpoints_are_judged_by(tmp_path: Path) -> None:
    judged = {"checkpoint": {"best": "train/loss", "mode": "min"}}
    (entry,) = entries([trained(tmp_path / "a", judged)])
    assert entry.metric == ("train/loss", min(row["train/loss"] for row in rows()[:-1]))
    (entry,) = entries([trained(tmp_path / "b")])
    assert entry.metric == ("eval/old/top1", rows()[-1]["eval/old/top1"])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (119, "119s"), (120, "2min"), (7200, "2h"), (200_000, "2d")])
def test_a_span_is_in_its_largest_unit(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# --- which are meant ------------------------------------------------------------------------------------------------

CONFIG = {
    "seed": 1,
    "optimizer": {"_target_": "multimodal.optimizers.lion.Lion", "lr": 0.001, "betas": [0.9, 0.98]},
    "duration": "900steps",
    "init": {"weights": None},
    "compile": False,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("seed=1", True),
        ("seed=1.0", True),
        ("seed=true", False),
        ("seed!=1", False),
        ("seed!=2", True),
        ("optimizer.lr=1e-3", True),
        ("optimizer.lr>=1e-3", True),
        ("optimizer.lr<0.001", False),
        ("optimizer=lion", True),
        ("optimizer=Lion", True),
        ("optimizer=adamw", False),
        ("optimizer.betas=[0.9,0.98]", True),
        ("duration=900steps", True),
        ("init.weights=null", True),
        ("compile=false", True),
        ("compile=0", False),
        ("gone=1", False),
        ("gone!=1", True),
        ("gone<1", False),
    ],
)
def test_a_condition_is_on_a_setting_as_it_is_typed(text: str, holds: bool) -> None:
    assert Condition.parse(text).holds(CONFIG) == holds


def test_mistakes_are_told_with_what_was_meant(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    with pytest.raises(ConfigError, match="should be a setting and its value") as caught:
        run_program("runs", f"paths.runs={tmp_path}", "where='seed'", "status=[faild]", "runs=[b]")
    assert [path for path, _ in caught.value.problems] == ["status.0", "runs", "where"]
    with pytest.raises(ConfigError, match=r"Did you mean 'optimizer\.lr'"):
        run_program("runs", f"paths.runs={tmp_path}", "where='optimizer.lrr=1'")


def test_nothing_is_cleaned_elsewhere_where_the_folder_of_runs_is_mistyped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"paths\.runs: there is no folder '.*rnus', and nothing is deleted"):
        run_program("runs", f"paths.runs={tmp_path / 'rnus'}", "runs=['*']", "clean=all", "yes=true")


def test_the_list_is_filtered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path / "a")
    trained(tmp_path / "b", {"seed": 2})
    ended(trained(tmp_path / "c", {"seed": 2}), "failed")
    with caplog.at_level("INFO"):
        run_program("runs", f"paths.runs={tmp_path}", "where='seed=2'", "status=failed")
    (line,) = [line for line in caplog.text.splitlines() if "old/top1" in line]
    assert line.startswith("c ")


def test_the_yaml_says_every_field_and_no_other() -> None:
    assert composed_of("runs").keys() == config_of("runs").model_fields.keys()


# --- cleaning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run with checkpoints of steps 2, 4, 6 and 8, of which 4 is the best, and a damaged one."""
    copy = tmp_path / "runs" / "a"
    shutil.copytree(tiny_run, copy)
    last = checkpoint.find(copy)
    for step in (2, 4, 6):
        shutil.copytree(last, checkpoint.step_folder(copy, step))
    shutil.copytree(last, last.with_name(f"{checkpoint.DAMAGED}step-00000005"))
    checkpoint.mark_best(copy, 4)
    return copy


@pytest.mark.parametrize(
    ("rule", "stay", "best"),
    [("best_and_last", [4, 8], True), ("last", [8], False), ("all", [], False), ("damaged", [2, 4, 6, 8], True)],
)
def test_a_rule_deletes_what_it_says_and_what_stays_is_sound(run: Path, rule: str, stay: list[int], best: bool) -> None:
    before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    deletions, left = planned(entries([run]), rule)  # type: ignore[arg-type]
    cleaned = delete(deletions, rule)  # type: ignore[arg-type]
    assert (left, cleaned.left, cleaned.gone) == ([], [], [])
    assert checkpoint.steps(run) == stay
    assert (run / "checkpoints" / "best").is_symlink() == best
    for step in stay:
        checkpoint.verify(checkpoint.step_folder(run, step))
    assert len(checkpoint.damaged(run)) == (rule != "damaged")
    assert cleaned.freed == before - sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) > 0
    assert not list((run / "checkpoints").glob(".partial-*"))
    assert planned(entries([run]), rule) == ([], [])  # type: ignore[arg-type]


def test_a_run_whose_last_checkpoint_is_damaged_keeps_the_older_ones(run: Path) -> None:
    (checkpoint.find(run) / "model.safetensors").write_bytes(b"")
    deletions, left = planned(entries([run]), "last")
    assert deletions == []
    assert "is damaged" in dict(left)["a"]


def test_nothing_of_a_live_run_is_deleted_also_if_it_has_started_meanwhile(run: Path, train: Train) -> None:
    deletions, _ = planned(entries([run]), "all")
    train(run)
    assert planned(entries([run]), "all") == ([], [("a", "is being trained")])
    (told,) = delete(deletions, "all").left
    assert "another process trains" in told
    assert checkpoint.steps(run) == [2, 4, 6, 8]


def go_on(run: Path, step: int) -> None:
    """Leave a checkpoint more, as a run does that was continued."""
    shutil.copytree(checkpoint.find(run), checkpoint.step_folder(run, step))


def test_a_run_that_went_on_after_the_question_keeps_what_its_rule_keeps_now(run: Path) -> None:
    deletions, _ = planned(entries([run]), "best_and_last")
    go_on(run, 10)
    checkpoint.mark_best(run, 6)
    shutil.rmtree(checkpoint.step_folder(run, 2))
    cleaned = delete(deletions, "best_and_last")
    assert checkpoint.steps(run) == [4, 6, 8, 10]  # 4 and 8 go by the new plan only, 6 by the old one only
    assert cleaned.freed == 0
    assert cleaned.gone == ["a: step-00000002 was gone already"]
    assert cleaned.left == ["a: step-00000006 stays: the run has gone on, and the rule keeps it now"]


def test_what_both_plans_say_is_deleted(run: Path) -> None:
    deletions, _ = planned(entries([run]), "last")
    go_on(run, 10)
    cleaned = delete(deletions, "last")
    assert checkpoint.steps(run) == [8, 10]
    assert cleaned.freed == deletions[0].size
    assert cleaned.left == []


def test_a_checkpoint_of_a_run_that_was_started_over_is_not_the_one_that_was_asked_about(run: Path) -> None:
    deletions, _ = planned(entries([run]), "all")
    again = run.with_name("again")
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(run)
    again.rename(run)
    cleaned = delete(deletions, "all")
    assert (cleaned.freed, len(cleaned.left)) == (0, 4)
    assert "another one than before" in cleaned.left[0]
    assert checkpoint.steps(run) == [2, 4, 6, 8]


def test_a_run_that_stands_otherwise_than_when_it_was_asked_about_is_left_alone(run: Path) -> None:
    deletions, _ = planned(entries([run]), "all")
    ended(run, "stopped")
    assert delete(deletions, "all").left == [f"{deletions[0]}: the run was finished and is stopped now"]
    assert checkpoint.steps(run) == [2, 4, 6, 8]


def test_the_oldest_is_kept_if_what_was_to_stay_was_damaged_after_the_question(run: Path) -> None:
    deletions, _ = planned(entries([run]), "last")
    (checkpoint.find(run) / "model.safetensors").write_bytes(b"")
    (told,) = delete(deletions, "last").left
    assert "is damaged" in told
    assert checkpoint.steps(run) == [2, 4, 6, 8]


def test_only_what_is_gone_counts_as_freed_and_what_is_left_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deletions, _ = planned(entries([run]), "best_and_last")
    assert [folder.name for folder in deletions[0].folders] == ["step-00000002", "step-00000006"]
    delete_tree = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path.name.endswith("2"):
            (path / "config.yaml").unlink()
            raise PermissionError(13, "Permission denied", str(path))
        delete_tree(path)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    before = sum(path.lstat().st_size for path in run.rglob("*") if path.is_file())
    told = r"not all was deleted:\n  a: .*old-step-00000002 cannot be deleted"
    with caplog.at_level("INFO"), pytest.raises(RunError, match=told):
        run_program("runs", f"paths.runs={run.parent}", "clean=best_and_last", "yes=true")
    freed = before - sum(path.lstat().st_size for path in run.rglob("*") if path.is_file())
    assert f"{short(freed)}B deleted" in caplog.text
    assert short(freed) != short(deletions[0].size)


def test_what_cannot_be_locked_or_read_is_told_and_the_others_are_cleaned(run: Path) -> None:
    locked, unread = (run.with_name(name) for name in ("locked", "unread"))
    for place in (locked, unread):
        shutil.copytree(run, place, symlinks=True)
    deletions, left = planned(entries([locked, run, unread]), "last")
    (locked / run_lock.NAME).mkdir()
    (unread / "config.yaml").write_bytes(b"{")
    told = delete(deletions, "last").left
    assert left == []
    assert [line.partition(":")[0] for line in told] == ["locked", "unread"]
    assert "cannot be written" in told[0]
    assert "was finished and is broken now" in told[1]
    assert [checkpoint.steps(place) for place in (locked, run, unread)] == [[2, 4, 6, 8], [8], [2, 4, 6, 8]]


def test_a_run_whose_configuration_cannot_be_read_is_not_cleaned_with_the_finished_ones(run: Path) -> None:
    shutil.copytree(run, broken := run.with_name("broken"), symlinks=True)
    (broken / "config.yaml").write_bytes(b"\xff{")
    run_program("runs", f"paths.runs={run.parent}", "clean=last", "yes=true")
    assert [checkpoint.steps(place) for place in (run, broken)] == [[8], [2, 4, 6, 8]]


def test_only_finished_runs_are_cleaned_unless_others_are_named(run: Path) -> None:
    ended(run, "stopped")
    words = ("runs", f"paths.runs={run.parent}", "clean=last", "yes=true")
    run_program(*words)
    assert checkpoint.steps(run) == [2, 4, 6, 8]
    run_program(*words, "status=stopped")
    assert checkpoint.steps(run) == [8]


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("", False), ("n", False), (None, False)])
def test_it_asks_on_a_terminal_and_refuses_without_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, gone: bool
) -> None:
    monkeypatch.setattr(loaded("runs").sys, "stdin", SimpleNamespace(isatty=lambda: answer is not None))
    monkeypatch.setattr("builtins.input", lambda question: answer)
    words = ("runs", f"paths.runs={run.parent}", "clean=best_and_last")
    if answer is None:
        with pytest.raises(RunError, match="yes=true"):
            run_program(*words)
    else:
        run_program(*words)
    assert (checkpoint.steps(run) == [4, 8]) == gone
