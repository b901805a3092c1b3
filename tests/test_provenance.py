"""Secrets do not get into a run's folder, and what is not a secret stays as it is."""

import pytest

from multimodal.provenance import facts, redact, uncommitted


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("train.py --token abc123 seed=1", "train.py --token *** seed=1"),
        ("WANDB_API_KEY=abc123", "WANDB_API_KEY=***"),
        ("AWS_ACCESS_KEY_ID=abc123 x=1", "AWS_ACCESS_KEY_ID=*** x=1"),
        ("aws_secret: abc123", "aws_secret: ***"),
        ('{"api_key": "abc 123", "x": 1}', '{"api_key": ***, "x": 1}'),
        ("password='abc 123' x", "password=*** x"),
        ("Authorization: Bearer abc123", "Authorization: Bearer ***"),
        ("https://me:abc/123@host/path", "https://***@host/path"),
    ],
)
def test_secrets_are_replaced(text: str, kept: str) -> None:
    assert redact(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "towers.text.tokenizer.vocab_size=8000",
        "tokenizer: Tokenizer",
        "tokens = self.vocabulary.encode(text)",
        "num_tokens=5",
        "keys: list[str] = []",
        "basic training",
        "https://host/path",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_facts_name_versions_and_the_revision_if_there_is_one() -> None:
    found = facts()
    assert {"torch", "multimodal"} <= {name.lower() for name in found["packages"]}
    assert found["revision"] is None or len(found["revision"]) == 40
    assert isinstance(uncommitted(), str)
