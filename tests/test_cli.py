"""The laws of the command line: text that a user types arrives as it is."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from multimodal.cli import CONF, _explained, _quoted, plain

NAMES = (
    "a${b}c",
    r"a\${b}",
    r"a\\${b",
    "it's",
    r"it\'s",
    "cat,dog",
    "ends in \\",
    r"C:\a\b",
    "key={x}",
    "'one",
    "a=b",
    "~[1,",
)


def arrives(word: str) -> object:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("classify", [_quoted(word, ("classes",))]))["classes"]


@pytest.mark.parametrize("text", NAMES)
def test_text_arrives_as_it_was_typed(text: str) -> None:
    assert arrives(f"classes={text}") == text


@given(
    st.lists(st.sampled_from(["\\", "'", '"', "${", "}", "$", "a", ",", "=", " ", "[", "]", "(", "\n"])).map("".join)
)
def test_any_text_arrives_as_it_was_typed(text: str) -> None:
    for typed in (f"-{text}", f"-{text}\\"):  # text that is quoted, a list, null or nothing is not meant
        value = OverridesParser.create().parse_override(_quoted(f"classes={typed}", ("classes",))).value()
        assert OmegaConf.to_container(OmegaConf.create({"classes": value}), resolve=True) == {"classes": typed}


@pytest.mark.parametrize(
    ("word", "value"),
    [("classes='cat,dog'", "cat,dog"), ("classes=null", None), ("classes=[a,b]", ["a", "b"])],
)
def test_what_is_quoted_already_is_left_to_hydra(word: str, value: object) -> None:
    assert arrives(word) == value


@pytest.mark.parametrize("word", ["seed=1,2", "--help", "-m", "classes="])
def test_other_words_are_left_to_hydra(word: str) -> None:
    assert _quoted(word, ("classes",)) == word


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evals=[cifar]"], ("evals", "there is no 'cifar'. Did you mean 'cifar10'?")),
        (["evals=[xyz]"], ("evals", "there is no 'xyz'. There are: aro, cifar10, ")),
        (
            ["evals=[cifar10]", "evals.cifar10.classnames=null"],
            ("evals.cifar10.classnames", "unknown key. Did you mean 'evals.cifar10.class_names'?"),
        ),
        (["paths.rns=x"], ("paths.rns", "unknown key. Did you mean 'paths.runs'?")),
        (["suite=shape"], ("composition", "Did you mean 'shapes'?")),
    ],
)
def test_what_cannot_be_composed_is_told_with_what_was_meant(words: list[str], told: tuple[str, str]) -> None:
    with (
        pytest.raises((HydraException, OmegaConfBaseException)) as error,
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        compose("evaluate", words)
    ((path, text),) = _explained(error.value, "evaluate", words).problems
    assert path == told[0]
    assert told[1] in text
    assert "+" not in text
