"""The laws of checkpoints: whole or not at all, and the same when they are read."""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyConfig
from safetensors.torch import save_file
from torch import Tensor

from multimodal import checkpoint, checksums
from multimodal.assemble import assemble, load
from multimodal.batch import Batch
from multimodal.checkpoint import TrainerState, find, mark_best, prune, save, step_folder, steps
from multimodal.config import DamagedCheckpoint, TrainConfig
from multimodal.ema import Ema
from multimodal.files import write_json
from multimodal.model import Model
from multimodal.optim import parameter_groups
from multimodal.step import training_step

NOWHERE = Path("nowhere")

RUN = {"run_id": "abc", "num_samples": 64, "precision": "fp32", "total_steps": 8}


class Run:
    """A tiny model with its optimizer, some steps old."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.assembled = assemble(config, config.dataset.build(NOWHERE), None)
        self.model: Model = self.assembled.model
        self.optimizer = config.optimizer.build(parameter_groups(self.model, config.optimizer, {}))
        self.ema = Ema(self.model, config.ema.decay)
        self.train()

    def train(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator),
            "text": torch.randint(1, 200, (4, 32), generator=generator),
        }
        batch = Batch(inputs, torch.arange(4))
        context = self.assembled.context
        measured = training_step(self.model, self.config.loss, self.optimizer, batch, context, 1.0, None, (0, 0))
        self.ema.update(measured["updated"])

    def save(self, step: int) -> None:
        import yaml

        text = yaml.safe_dump(self.config.model_dump(mode="json"))
        state = TrainerState(**RUN, step=step, best=0.25, broken=3, log_bytes=77)
        files = checkpoint.whole_tensors(self.ema, self.optimizer)
        save(self.folder, state, files, self.assembled.readers, text)

    def tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        flat = {f"{place}/{name}": value for place, entries in state.items() for name, value in entries.items()}
        return {**self.model.state_dict(), **flat}


@pytest.fixture
def run(tiny_config: TinyConfig, tmp_path: Path) -> Run:
    return Run(tiny_config(), tmp_path / "run")


def assert_equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name in ours:
        assert ours[name].dtype == others[name].dtype
        assert torch.equal(ours[name], others[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_what_is_loaded_is_what_was_saved_to_the_last_bit(
    tiny_config: TinyConfig, tmp_path: Path, optimizer: str
) -> None:
    run = Run(tiny_config(f"optimizer={optimizer}"), tmp_path / "run")
    run.save(5)
    folder = find(run.folder)
    other = Run(tiny_config("seed=2", f"optimizer={optimizer}"), run.folder)
    assert not torch.equal(other.model.towers["text"].projection.weight, run.model.towers["text"].projection.weight)
    checkpoint.load_model(folder, other.model)
    checkpoint.load_optimizer(folder, other.model, other.optimizer)
    assert_equal(other.tensors(), run.tensors())
    assert len(run.optimizer.state) == len(list(run.model.parameters()))
    stored = TrainerState(**RUN, step=5, best=0.25, broken=3, log_bytes=77, checksums=True)
    assert checkpoint.load_state(folder) == stored
    run.train()
    other.train()
    assert_equal(other.tensors(), run.tensors())


def test_the_optimizer_is_loaded_by_the_names_of_parameters_not_by_their_order(run: Run) -> None:
    run.save(1)
    again = run.config.optimizer.build([{"params": list(reversed(list(run.model.parameters())))}])
    checkpoint.load_optimizer(find(run.folder), run.model, again)
    for parameter in run.model.parameters():
        for name, value in run.optimizer.state[parameter].items():
            assert torch.equal(again.state[parameter][name], value)


def test_a_checkpoint_is_a_model_by_itself(run: Run) -> None:
    run.save(1)
    config, assembled = load(find(run.folder), workers=3)
    assert (config.workers, config.seed) == (3, run.config.seed)
    assert_equal(assembled.model.state_dict(), run.model.state_dict())
    text = "a large striped red circle"
    assert torch.equal(
        assembled.readers["text"].preprocessor(text, None), run.assembled.readers["text"].preprocessor(text, None)
    )


def test_the_mean_of_the_weights_is_a_model_of_its_own(tiny_config: TinyConfig, tmp_path: Path) -> None:
    run = Run(tiny_config("ema.decay=0.5"), tmp_path / "run")
    run.save(1)
    _, assembled = load(find(run.folder), "ema")
    with run.ema.in_place("ema"):
        assert_equal(assembled.model.state_dict(), run.model.state_dict())
    _, raw = load(find(run.folder))
    assert_equal(raw.model.state_dict(), run.model.state_dict())
    name = "towers.text.projection.weight"
    assert not torch.equal(raw.model.state_dict()[name], assembled.model.state_dict()[name])


def test_a_mean_that_was_not_kept_or_does_not_fit_is_refused(run: Run, tiny_config: TinyConfig) -> None:
    run.save(1)
    with pytest.raises(ValueError, match=r"has no ema\.safetensors: its run has kept no mean"):
        load(find(run.folder), "ema")
    with pytest.raises(ValueError, match="weights should be raw or ema, got 'mean'"):
        load(find(run.folder), "mean")  # type: ignore[arg-type]
    save_file({"x": torch.zeros(1)}, find(run.folder) / "ema.safetensors")
    checksums.write(find(run.folder))
    with pytest.raises(ValueError, match=r"ema\.safetensors does not hold the weights of its config.yaml"):
        load(find(run.folder), "ema")


def test_a_weight_too_many_or_too_few_is_refused(run: Run, tiny_config: TinyConfig) -> None:
    run.save(1)
    for override in ("towers.image.layers=2", "model.logit_bias=-10.0"):
        with pytest.raises(ValueError, match=r"does not hold the weights of its config.yaml: .* missing"):
            checkpoint.load_model(find(run.folder), Run(tiny_config(override), run.folder).model)


def test_nothing_in_a_checkpoint_is_a_pickle(run: Run) -> None:
    run.save(1)
    kinds = {path.suffix for path in find(run.folder).rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".yaml", ""}


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


FILES = [
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.yaml",
    "text/tokenizer.json",
    "SHA256SUMS",
]


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_a_file_that_was_cut_changed_or_lost_is_found_and_named(
    tiny_config: TinyConfig, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    run = Run(tiny_config("ema.decay=0.5"), tmp_path / "run")
    run.save(1)
    checkpoint.verify(find(run.folder))
    for file in FILES:
        folder = shutil.copytree(find(run.folder), tmp_path / file.replace("/", "-"))
        harm(folder / file)
        named = "" if file == "SHA256SUMS" else file
        with pytest.raises(DamagedCheckpoint, match=rf"{folder} is damaged: .*{named}"):
            checkpoint.verify(folder)
        if file == "optimizer.safetensors":  # which is for training only
            load(folder)
        elif file != "SHA256SUMS":
            with pytest.raises((ValueError, FileNotFoundError), match=str(folder)):
                load(folder)


def test_a_file_that_was_not_written_is_found_and_hidden_ones_are_nobodys_business(run: Run) -> None:
    run.save(1)
    (find(run.folder) / ".nfs0001").touch()
    checkpoint.verify(find(run.folder))
    (find(run.folder) / "ema.safetensors").touch()
    with pytest.raises(DamagedCheckpoint, match=r"ema\.safetensors is not in SHA256SUMS"):
        checkpoint.verify(find(run.folder))


def test_the_checksums_are_those_of_sha256sum(run: Run) -> None:
    run.save(1)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    said = subprocess.run(command, cwd=find(run.folder), capture_output=True, text=True, check=True).stdout
    assert said.count(": OK") == len([path for path in find(run.folder).rglob("*") if path.is_file()]) - 1


def test_a_checkpoint_from_before_there_were_checksums_is_opened(run: Run) -> None:
    run.save(1)
    folder = find(run.folder)
    write_json(folder / "state.json", {**RUN, "step": 1})
    (folder / "SHA256SUMS").unlink()
    checkpoint.verify(folder)
    load(folder)


@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_while_a_step_is_saved_again_loses_neither(
    run: Run, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    run.save(1)
    rename, calls = Path.rename, []

    def crash(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            run.save(1)
    checkpoint.clean(run.folder)
    checkpoint.verify(find(run.folder))
    assert [path.name for path in (run.folder / checkpoint.FOLDER).iterdir()] == ["step-00000001"]
    run.save(1)
    assert [path.name for path in (run.folder / checkpoint.FOLDER).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("call", ["rename", "fsync", "copymode"])
def test_a_crash_while_saving_leaves_the_checkpoint_before_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run.save(1)
    before = {path: path.read_bytes() for path in find(run.folder).rglob("*") if path.is_file()}

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr({"rename": Path, "fsync": os, "copymode": shutil}[call], call, crash)
        with pytest.raises(KeyboardInterrupt):
            run.save(2)
    assert steps(run.folder) == [1]
    assert find(run.folder) == step_folder(run.folder, 1)
    assert all(path.read_bytes() == content for path, content in before.items())
    run.save(2)
    assert steps(run.folder) == [1, 2]
    assert not list((run.folder / checkpoint.FOLDER).glob(".partial*"))


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    rename, flush = Path.rename, checkpoint._flush

    def check(path: Path, target: Path) -> Path:
        assert flushed == {path.name, *(inner.name for inner in path.rglob("*"))}
        flushed.clear()
        return rename(path, target)

    def note(path: Path) -> None:
        flushed.add(path.name)
        flush(path)

    monkeypatch.setattr(Path, "rename", check)
    monkeypatch.setattr(checkpoint, "_flush", note)
    run.save(1)
    assert flushed == {checkpoint.FOLDER}


def test_the_same_step_may_be_saved_again(run: Run) -> None:
    run.save(1)
    before = find(run.folder).joinpath("model.safetensors").read_bytes()
    run.train()
    run.save(1)
    assert steps(run.folder) == [1]
    assert find(run.folder).joinpath("model.safetensors").read_bytes() != before


def make_folders(run: Path, *numbers: int) -> None:
    for number in numbers:
        step_folder(run, number).mkdir(parents=True)
        (step_folder(run, number) / "state.json").write_text("{}")


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    make_folders(tmp_path, 100, 200, 300, 400, 99_999_999, 100_000_000)
    mark_best(tmp_path, 200)
    prune(tmp_path, 2)
    assert steps(tmp_path) == [200, 99_999_999, 100_000_000]
    assert find(tmp_path, "best").name == "step-00000200"
    prune(tmp_path, 7)
    assert len(steps(tmp_path)) == 3


def test_without_a_best_only_the_newest_are_kept(tmp_path: Path) -> None:
    make_folders(tmp_path, 1, 2, 3)
    prune(tmp_path, 1)
    assert steps(tmp_path) == [3]


def test_the_mark_of_the_best_moves_and_travels_with_the_folder(tmp_path: Path) -> None:
    make_folders(tmp_path / "run", 1, 2)
    mark_best(tmp_path / "run", 1)
    mark_best(tmp_path / "run", 2)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert find(tmp_path / "moved", "best") == (step_folder(tmp_path / "moved", 2)).resolve()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_readable_by_whom_the_umask_lets(run: Run, mask: int) -> None:
    before = os.umask(mask)
    try:
        run.save(1)
    finally:
        os.umask(before)
    files = [path for path in find(run.folder).rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_a_checkpoint_is_found_by_step_last_and_best(tmp_path: Path) -> None:
    make_folders(tmp_path, 5, 40)
    mark_best(tmp_path, 5)
    assert [find(tmp_path, which).name[-2:] for which in ("last", "best", "5", "40")] == ["40", "05", "05", "40"]


def test_what_is_not_found_is_told_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint 'last'; steps with one: none"):
        find(tmp_path)
    make_folders(tmp_path, 5, 40)
    (tmp_path / checkpoint.FOLDER / ".partial-step-00000050").mkdir()
    (tmp_path / checkpoint.FOLDER / "step-notes").mkdir()
    for which in ("6", "best", "newest", ""):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint '{which}'; steps with one: 5, 40"):
            find(tmp_path, which)


def test_json_is_replaced_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_deleting_is_not_seen_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path, 1, 2)

    def crash(path: Path, *_: object, **__: object) -> None:
        for inner in Path(path).iterdir():
            inner.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert steps(tmp_path) == [2]
