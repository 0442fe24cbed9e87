"""What a decode to a file did."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.runtime.planning.plan import DecodePlan


@dataclass(frozen=True)
class DecodeReport:
    """What a decode to a file did.

    Attributes:
        path: The file.
        frames: Frames in it.
        resumed_frames: Of these, those that an earlier run had decoded.
        seconds: Time taken, opening and writing included.
        decoding_seconds: Of these, what decoding took.
        expected_seconds: What this was expected to be for the frames that were decoded now, at the rates
            that were measured on this machine; None where they were not.
        peak_bytes: Measured peak of the memory for arrays, as the plan counts it, without frames that wait.
        footprint_bytes: The most physical memory that the process ever held, by the system's count.
        plan: The plan that was run, which holds the prediction.
    """

    path: str
    frames: int
    resumed_frames: int
    seconds: float
    decoding_seconds: float
    expected_seconds: float | None
    peak_bytes: int
    footprint_bytes: int
    plan: DecodePlan

    def __str__(self) -> str:
        resumed = f" ({self.resumed_frames} of them from before)" if self.resumed_frames else ""
        predicted = self.plan.peak_bytes - self.plan.waiting_bytes
        return (
            f"{self.path}: {self.frames} frames{resumed} in {self.seconds:.1f} s, "
            f"{(self.frames - self.resumed_frames) / max(self.seconds, 1e-9):.1f} frames/s, "
            f"peak {format_bytes(self.peak_bytes)} (predicted {format_bytes(predicted)}), "
            f"process {format_bytes(self.footprint_bytes)}{self._beside_the_expected()}"
        )

    def _beside_the_expected(self) -> str:
        if not self.expected_seconds:
            return ""
        ratio = self.decoding_seconds / self.expected_seconds
        expected = f"{self.expected_seconds:.3g} s of convolutions expected"
        return f"; decoding took {self.decoding_seconds:.3g} s, {ratio:.2f} times the {expected}"
