"""The laws of the command line: text that a user types arrives as it is."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from multimodal.cli import CONF, _quoted, plain

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
