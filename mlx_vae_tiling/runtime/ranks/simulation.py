"""What machines that are alike would compute, hold and send for a plan: counted, where there is only one."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlx_vae_tiling.dtypes import parse_dtype
from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import plan_anew
from mlx_vae_tiling.runtime.ranks.division import Division, halo_of
from mlx_vae_tiling.runtime.ranks.shares import divide
from mlx_vae_tiling.runtime.ranks.waiting import ranges_of, room_for
from mlx_vae_tiling.vae.base import StreamingDecoder


class Simulation(NamedTuple):
    """A division over machines that are alike, by the planner's numbers.

    Attributes:
        division: Who computes what.
        peak_bytes: Of each rank, as `DecodePlan`'s.
        recompute: Operations of all ranks over those of the whole decode.
        speedup: Operations of the whole decode over those of the busiest rank.
        sent_bytes: What rank 0 is sent for a frame of the output, on average, of 8 bits.
    """

    division: Division
    peak_bytes: tuple[int, ...]
    recompute: float
    speedup: float
    sent_bytes: float

    @property
    def fields(self) -> dict[str, Any]:
        """In types that JSON has; slices as [start, stop]."""
        return {
            "ranks": [
                {
                    "operations": operations,
                    "peak_bytes": peak,
                    "windows": [
                        {name: [span.start, span.stop] for name, span in vars(window).items()}
                        for window in self.division.windows(rank)
                    ],
                }
                for rank, (operations, peak) in enumerate(
                    zip(self.division.operations, self.peak_bytes, strict=True)
                )
            ],
            "recompute": self.recompute,
            "speedup": self.speedup,
            "sent_bytes": self.sent_bytes,
        }

    def __str__(self) -> str:
        lines = zip(str(self.division).splitlines(), self.peak_bytes, strict=True)
        return "\n".join(
            [
                f"{len(self.peak_bytes)} machines alike, counted by the planner and not measured:",
                *(f"{line}; peak {format_bytes(peak)}" for line, peak in lines),
                f"together {self.recompute:.2f}x the whole decode, {self.speedup:.2f} times as fast at best",
                f"traffic  {format_bytes(self.sent_bytes)} for each frame to rank 0",
            ]
        )


def require_divisible(plan: DecodePlan, ranks: int) -> None:
    """Raises a `ValueError` if there is no machine, or if tiles are blended, which one decodes."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    halo_of(plan.tiling)


def simulate(decoder: StreamingDecoder, plan: DecodePlan, ranks: int) -> Simulation:
    """Divides a decode over so many machines like the one that it was planned for.

    Args:
        decoder: For which the plan was made; its weights are not looked at.
        plan: Of one machine, which need not fit.
        ranks: Number of machines.

    Raises:
        ValueError: If no window fits in the memory of one, or as `require_divisible`.
    """
    require_divisible(plan, ranks)
    halo, dtype = halo_of(plan.tiling), parse_dtype(plan.dtype)
    options = decoder.options(causal=plan.causal, num_inference_steps=plan.inference_steps)
    model = CostModel(decoder, plan.latent_shape, dtype, plan.backend, options)
    room = room_for(model, plan.output, 1, plan.memory_limit) if ranks > 1 else None
    division = divide(model, plan.output, [plan.memory_limit] * ranks, halo, room)
    waiting = [room.nbytes(ranges_of(division.parts)) if room else 0, *[0] * (ranks - 1)]
    peaks = [model.weight_bytes + nbytes for nbytes in waiting]
    for rank, nbytes in enumerate(waiting):
        if numbers := division.of(rank):
            parts = tuple(division.parts[number] for number in numbers)
            peaks[rank] = nbytes + plan_anew(decoder, plan, parts, plan.memory_limit - nbytes).peak_bytes
    sent = sum(
        3 * part.pixels.volume for part, owner in zip(division.parts, division.owners, strict=True) if owner
    )
    once = plan.operations / plan.recompute
    return Simulation(
        division,
        tuple(peaks),
        sum(division.operations) / once,
        once / division.most,
        sent / plan.frames,
    )
