"""Quantities of training time as one value with a unit: `500steps`, `10epochs`, `2Msamples`, `5minutes`."""

import re
from dataclasses import dataclass
from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

MULTIPLIERS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Duration:
    """So many steps, epochs or samples."""

    value: float
    unit: str
    multiplier: str = ""

    @classmethod
    def units(cls) -> tuple[str, ...]:
        return ("steps", "epochs", "samples")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "500steps", "1.5epochs", "2Msamples" (singular and a space are accepted)."""
        units = "|".join(unit.removesuffix("s") for unit in cls.units())
        match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?([kMG]?)({units})s?", text)
        if match is None:
            examples = ", ".join(f"5{unit}" for unit in cls.units())
            raise ValueError(
                f"should be a number with a unit, such as {examples} (k, M, G multiply: 2Msamples), got '{text}'"
            )
        return cls(float(match[1]), match[3] + "s", match[2])

    def __str__(self) -> str:
        return f"{self.value:g}{self.multiplier}{self.unit}"

    @property
    def amount(self) -> float:
        """The number of units."""
        return self.value * MULTIPLIERS[self.multiplier]

    def steps(self, global_batch_size: int, steps_per_epoch: int) -> int:
        """In whole optimisation steps, rounded up (0 stays 0)."""
        per_step = {"steps": 1.0, "epochs": 1 / steps_per_epoch, "samples": float(global_batch_size)}[self.unit]
        return -int(-round(self.amount / per_step, 6) // 1)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def _validate(cls, value: object) -> Self:
        return value if isinstance(value, cls) else cls.parse(str(value))


@dataclass(frozen=True)
class Warmup(Duration):
    """A duration, or a share of the run's: "5%"."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """As a duration, or a percentage."""
        if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text):
            return cls(float(match[1]), "%")
        return super().parse(text)

    def steps_of(self, total_steps: int, global_batch_size: int, steps_per_epoch: int) -> int:
        """In whole optimisation steps of a run of `total_steps`."""
        if self.unit == "%":
            return round(total_steps * self.value / 100)
        return self.steps(global_batch_size, steps_per_epoch)


@dataclass(frozen=True)
class Timeout(Duration):
    """How long to wait, by the clock."""

    @classmethod
    def units(cls) -> tuple[str, ...]:
        return ("seconds", "minutes", "hours")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "30minutes"."""
        timeout = super().parse(text)
        if timeout.value == 0:
            raise ValueError(f"should be more than 0, got '{text}'")
        return timeout

    @property
    def seconds(self) -> float:
        """In seconds."""
        return self.amount * {"seconds": 1, "minutes": 60, "hours": 3600}[self.unit]


@dataclass(frozen=True)
class Cadence(Duration):
    """How often: every so many steps, epochs or samples, or minutes of wall time; `never` for only at the end."""

    @classmethod
    def units(cls) -> tuple[str, ...]:
        return ("steps", "epochs", "samples", "minutes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """As a duration, or "never"."""
        if text == "never":
            return cls(0, "never")
        cadence = super().parse(text)
        if cadence.value == 0:
            raise ValueError(f"should be more than 0, or never, got '{text}'")
        return cadence

    def is_due(self, step: int, global_batch_size: int, steps_per_epoch: int) -> bool:
        """Whether it is after this step; what goes by the clock never is."""
        if self.unit in ("never", "minutes"):
            return False
        return step % max(1, self.steps(global_batch_size, steps_per_epoch)) == 0

    def __str__(self) -> str:
        return "never" if self.unit == "never" else super().__str__()
