"""What a machine can do, as numbers: for planning without having it."""

from typing import Literal

from pydantic import Field

from multimodal.parts import Section


class Speed(Section):
    """Peak TFLOP/s (10^12 multiplications and additions a second) of dense products, by the precision of a run."""

    fp32: float = Field(gt=0)
    """As towers multiply float32: in TF32, where the hardware has it."""
    bf16: float | None = Field(gt=0)
    """Under autocast to bf16, sums in float32; null where the hardware has none."""
    fp16: float | None = Field(gt=0)
    """Likewise of fp16."""


class Hardware(Section):
    """One device: a GPU, or a machine that trains on its processor. Its YAML says where the numbers are from."""

    name: str = Field(min_length=1)
    """As its maker calls it."""
    device: Literal["cuda", "cpu"]
    """What it is for torch; autocast keeps other operations in float32 on each."""
    memory_gb: float = Field(gt=0)
    """Of one device, in GB of 10^9 bytes, as makers count."""
    tflops: Speed
    """At its best; a run reaches a share of it, `utilisation`."""
    price_per_hour: float = Field(ge=0)
    """Of one device, in dollars; an assumption."""

    def precision(self, wanted: Literal["auto", "fp32", "bf16", "fp16"]) -> Literal["fp32", "bf16", "fp16"]:
        """What `precision` means on it; ValueError for what it does not have."""
        if wanted == "auto":
            return "fp32" if self.tflops.bf16 is None else "bf16"
        if getattr(self.tflops, wanted) is None:
            raise ValueError(f"{self.name} has no {wanted}: auto or fp32")
        return wanted

    def flops_per_s(self, precision: Literal["fp32", "bf16", "fp16"]) -> float:
        """Operations a second, at its best."""
        peak: float | None = getattr(self.tflops, precision)
        assert peak is not None
        return peak * 1e12
