"""The laws of quantities of time."""

import pytest

from multimodal.units import Cadence, Duration, Timeout, Warmup

BATCH, EPOCH = 100, 40


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0steps", 0),
        ("500steps", 500),
        ("1step", 1),
        ("3 epochs", 120),
        ("1.5epochs", 60),
        ("0.01epochs", 1),
        ("2ksamples", 20),
        ("2Msamples", 20_000),
        ("1Gsamples", 10_000_000),
        ("101samples", 2),
        ("1samples", 1),
        ("0.3ksteps", 300),
        ("0.1epochs", 4),
    ],
)
def test_a_duration_is_a_whole_number_of_steps_rounded_up(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(BATCH, EPOCH) == steps


@pytest.mark.parametrize("text", ["500", "steps", "-5steps", "5 parsecs", "5ksteps ", "", "1e3steps", "5Ksteps", "nan"])
@pytest.mark.parametrize("kind", [Duration, Warmup, Cadence])
def test_what_is_no_number_with_a_unit_is_refused_with_examples(kind: type[Duration], text: str) -> None:
    with pytest.raises(ValueError, match="should be a number with a unit, such as 5steps"):
        kind.parse(text)


@pytest.mark.parametrize("text", ["500steps", "1.5epochs", "2Msamples", "0.1Gsamples", "3ksteps"])
@pytest.mark.parametrize("kind", [Duration, Warmup, Cadence])
def test_a_duration_is_written_as_it_is_read(kind: type[Duration], text: str) -> None:
    assert str(kind.parse(text)) == text
    assert kind.parse(str(kind.parse(text))) == kind.parse(text)


@pytest.mark.parametrize(("kind", "text"), [(Warmup, "5%"), (Cadence, "never"), (Cadence, "10minutes")])
def test_only_its_own_kind_knows_a_unit(kind: type[Duration], text: str) -> None:
    assert str(kind.parse(text)) == text
    for other in {Duration, Warmup, Cadence} - {kind}:
        with pytest.raises(ValueError, match="should be a number with a unit"):
            other.parse(text)


@pytest.mark.parametrize(("text", "seconds"), [("30minutes", 1800), ("1.5hours", 5400), ("20 seconds", 20)])
def test_a_timeout_is_by_the_clock(text: str, seconds: float) -> None:
    assert Timeout.parse(text).seconds == seconds
    for other in ("5steps", "never", "0minutes"):
        with pytest.raises(ValueError, match="should be"):
            Timeout.parse(other)


def test_a_share_of_warm_up_is_of_the_whole_run() -> None:
    assert Warmup.parse("5%").steps_of(1000, BATCH, EPOCH) == 50
    assert Warmup.parse("100%").steps_of(7, BATCH, EPOCH) == 7
    assert Warmup.parse("2epochs").steps_of(1000, BATCH, EPOCH) == 80
