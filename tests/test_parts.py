"""The laws of parts: only what is allowed is found, before anything is imported; what is found says what it is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose, TinyConfig
from hydra.core.plugins import Plugins
from pydantic import ValidationError

from multimodal.cli import CONF, PartsSearchPath
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.losses.infonce import InfoNCE
from multimodal.parts import (
    Augment,
    Dataset,
    Eval,
    Loss,
    Optimizer,
    Part,
    Schedule,
    Tokenizer,
    Tower,
    Tracker,
)
from multimodal.resolve import allowed_packages, find_part, resolve

GOOD = "multimodal.losses.infonce.InfoNCE"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be imported, and must not be: its target."""
    (tmp_path / "canary_package").mkdir()
    (tmp_path / "canary_package" / "__init__.py").write_text("from multimodal.losses.infonce import InfoNCE as Song\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "canary_package.Song"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("os.system", "outside the packages that parts may come from (multimodal"),
        ("builtins.eval", "outside the packages"),
        ("subprocess.Popen", "outside the packages"),
        ("multimodal_evil.Loss", "outside the packages"),
        ("this.s", "outside the packages"),
        ("multimodal.parts.importlib.import_module", "there is no module 'multimodal.parts.importlib'"),
        ("multimodal.parts.importlib", "has no part 'importlib'"),
        ("multimodal.config.TrainConfig", "has no part 'TrainConfig'"),
        ("multimodal.losses.infonce.info_nce", "has no part 'info_nce'"),
        ("multimodal.losses.infonce.InfoNCS", "has no part 'InfoNCS'. Did you mean 'InfoNCE'?"),
        ("multimodal.losses.infonse.InfoNCE", "there is no module 'multimodal.losses.infonse'"),
        ("multimodal.optim.AdamW", "wrong kind of part: wanted is one of kind Loss, this is of kind Optimizer"),
        ("multimodal.parts.Loss", "what parts derive from"),
        ("multimodal.parts.Part", "wrong kind of part"),
        ("../x", "not a dotted path"),
        ("", "not a dotted path"),
        (".", "not a dotted path"),
        ("InfoNCE", "not a dotted path"),
        (".multimodal.losses.infonce.InfoNCE", "not a dotted path"),
        ("multimodal..losses.infonce.InfoNCE", "not a dotted path"),
        ("multimodal.losses.infonce.Info NCE", "not a dotted path"),
        (" multimodal.losses.infonce.InfoNCE", "not a dotted path"),
        ("multimodal.losses.infonce.InfoNCE\n", "not a dotted path"),
        ("multimodal/losses/infonce.InfoNCE", "not a dotted path"),
        ("multimodal.losses.infonce:InfoNCE", "not a dotted path"),
        ("multimodal.losses.infonce.InfoNCE()", "not a dotted path"),
    ],
)
def test_what_is_no_allowed_part_is_refused_and_nothing_is_imported(target: str, text: str) -> None:
    import multimodal.config
    import multimodal.optim  # noqa: F401

    before = set(sys.modules)
    with pytest.raises(ValidationError) as caught:
        resolve({"_target_": target, "weight": 1.0}, Loss)
    [line] = caught.value.errors()
    assert line["loc"] == ("_target_",)
    assert text in line["msg"]
    assert set(sys.modules) == before


def test_a_package_that_does_not_announce_itself_is_not_imported(canary: str) -> None:
    with pytest.raises(ValueError, match="outside the packages"):
        find_part(canary, Loss)
    assert "canary_package" not in sys.modules
    __import__("canary_package")  # it could have been
    del sys.modules["canary_package"]


@pytest.mark.parametrize(
    "value", [None, 3, "multimodal.losses.infonce.InfoNCE", [], {}, {"_target_": 3}, {"weight": 1}]
)
def test_what_names_no_part_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="should be a Loss: a mapping whose `_target_` names one"):
        resolve(value, Loss)


def test_a_module_that_lacks_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "announced_package").mkdir()
    (tmp_path / "announced_package" / "__init__.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("multimodal.resolve.allowed_packages", lambda: frozenset({"announced_package"}))
    with pytest.raises(ValueError, match="needs the package 'no_such_package_at_all', which is not installed"):
        find_part("announced_package.Some", Loss)


def test_a_part_is_found_by_its_target_and_is_left_as_it_is_when_it_is_one() -> None:
    found = resolve({"_target_": GOOD, "weight": 2.0, "pair": ["image", "audio"]}, Loss)
    assert found == InfoNCE(weight=2.0, pair=("image", "audio"))
    assert resolve(found, Loss) is found


def test_an_instance_of_another_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="should be a Optimizer"):
        resolve(InfoNCE(), Optimizer)


# --- all of ours ----------------------------------------------------------------------------------------------------


def inner_parts(value: object) -> Iterator[Part]:
    if isinstance(value, Part):
        yield value
    fields = value if isinstance(value, dict) else dict(value) if isinstance(value, TrainConfig | Part) else {}
    for item in fields.values():
        yield from inner_parts(item)


CONTRACTS = (Tower, Tokenizer, Loss, Dataset, Augment, Optimizer, Schedule, Eval, Tracker)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("tower@towers.image=resnet_tiny", "tokenizer@towers.text.tokenizer=clip_bpe", "augment=crop_flip"),
        (
            "dataset=arrays",
            "dataset.path=x.npz",
            "tracker=none",
            "evals=[shapes_retrieval,cifar10]",
            "checkpoint.best=null",
        ),
        ("dataset=shards", "dataset.urls=[a.tar,b.tar]", "tracker.tags=[one,two]"),
        ("dataset=manifest", "dataset.path=x.csv", "loss.infonce.pair=[text,image]"),
        ("dataset=image_folder", "dataset.path=x"),
    ],
)
def test_every_part_is_written_with_its_target_and_read_as_the_same_part(
    compose: Compose, overrides: tuple[str, ...]
) -> None:
    config = check(compose(*overrides), TrainConfig)
    found = list(inner_parts(config))
    assert {part.contract() for part in found} == set(CONTRACTS)
    for part in found:
        written: dict[str, Any] = part.model_dump(mode="json")
        assert written["_target_"] == f"{type(part).__module__}.{type(part).__qualname__}"
        assert resolve(written, part.contract()) == part


def test_a_part_is_the_same_whatever_the_spelling_of_its_numbers(tiny_config: TinyConfig) -> None:
    assert tiny_config().loss == tiny_config("loss.infonce.weight=1").loss


# --- parts from elsewhere -------------------------------------------------------------------------------------------

SOFTER = '''
from multimodal.batch import Features
from multimodal.losses.infonce import info_nce
from multimodal.parts import Loss


class Softer(Loss):
    """InfoNCE at a lower scale."""

    weight: float
    softness: float

    def needs(self):
        return frozenset({"image_features", "text_features"})

    def __call__(self, features: Features):
        tensors = features.tensors
        return info_nce(tensors["image_features"], tensors["text_features"], features.logit_scale / self.softness)
'''


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An installed package with one loss, which announces itself."""
    package, info = tmp_path / "its_parts", tmp_path / "its_parts-0.1.dist-info"
    (package / "conf" / "loss").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "softer.py").write_text(SOFTER)
    (package / "conf" / "loss" / "softer.yaml").write_text(
        "softer:\n  _target_: its_parts.softer.Softer\n  weight: 1.0\n  softness: 2.0\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: its-parts\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[multimodal.parts]\nits_parts = its_parts\n")
    return tmp_path


@pytest.fixture
def installed(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(elsewhere)
    allowed_packages.cache_clear()
    yield elsewhere
    allowed_packages.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "its_parts"]:
        del sys.modules[name]


def test_an_installed_package_that_announces_itself_brings_parts_and_their_yaml(
    installed: Path, compose: Compose
) -> None:
    Plugins.instance().register(PartsSearchPath)
    raw = compose("loss=[infonce,softer]", "loss.softer.softness=4.0")
    assert "its_parts" not in sys.modules
    loss = check(raw, TrainConfig).loss
    assert type(loss["softer"]).__module__ == "its_parts.softer"
    assert loss["softer"].model_dump() == {"_target_": "its_parts.softer.Softer", "weight": 1.0, "softness": 4.0}
    raw["loss"]["softer"]["sofness"] = 1
    with pytest.raises(ConfigError, match=r"loss\.softer\.sofness: unknown key. Did you mean 'softness'\?"):
        check(raw, TrainConfig)


def test_without_the_announcement_it_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(elsewhere)
    for path in elsewhere.glob("*.dist-info/entry_points.txt"):
        path.unlink()
    allowed_packages.cache_clear()
    with pytest.raises(ValueError, match="outside the packages"):
        find_part("its_parts.softer.Softer", Loss)
    assert "its_parts" not in sys.modules


def test_a_package_inside_another_opens_itself_alone(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a namespace that several share, or of a package whose other parts are not announced."""
    space = elsewhere / "shared_space"
    space.mkdir()
    (elsewhere / "its_parts").rename(space / "its_parts")
    (space / "others.py").write_text(SOFTER)
    (space / "its_parts_too.py").write_text(SOFTER)
    for path in elsewhere.glob("*.dist-info/entry_points.txt"):
        path.write_text("[multimodal.parts]\nits_parts = shared_space.its_parts\n")
    monkeypatch.syspath_prepend(elsewhere)
    allowed_packages.cache_clear()
    try:
        for target in ("shared_space.others.Softer", "shared_space.its_parts_too.Softer"):
            with pytest.raises(ValueError, match=r"outside the packages .*shared_space\.its_parts\)"):
                find_part(target, Loss)
        assert "shared_space" not in sys.modules
        assert find_part("shared_space.its_parts.softer.Softer", Loss).__name__ == "Softer"
    finally:
        allowed_packages.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "shared_space"]:
            del sys.modules[name]


@pytest.mark.slow
def test_the_program_trains_with_a_part_from_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    overrides = ["loss=[softer]", "run.name=x", "dataset.size=64", "global_batch_size=16", "duration=2steps"]
    overrides += ["evals=[]", "checkpoint.best=null", "tracker=none", "workers=0", "device=cpu", "precision=fp32"]
    done = subprocess.run(
        [sys.executable, str(CONF.parent / "train.py"), *overrides, f"paths.runs={tmp_path / 'runs'}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(elsewhere), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "its_parts.softer.Softer" in (tmp_path / "runs" / "x" / "config.yaml").read_text()
