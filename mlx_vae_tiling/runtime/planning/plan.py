"""`DecodePlan`: how latents will be decoded, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vae_tiling.runtime.planning.cost import Part
from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.config import Config
from mlx_vae_tiling.vae.options import DecodeOptions
from mlx_vae_tiling.vae.regions import Region, Window


@dataclass(frozen=True)
class DecodePlan:
    """How latents of one shape will be decoded, and what that costs.

    Attributes:
        latent_shape: (B, C, F, H, W).
        config: Of the decoder that it is for.
        dtype: Of the decoder's weights.
        causal: Whether it decodes causally.
        inference_steps: Denoising steps of a diffusion decoder.
        backend: What it runs on.
        output: The region of the output that is decoded.
        parts: What is decoded one after the other, or by several machines.
        latent_frames_per_step: Latent frames taken in at a time.
        max_chunk_frames: Bound of the frames of a chunk in any layer; None for none.
        tiling: None for exact windows, blended tiles, or how many latents around them windows see.
        peak_bytes: Predicted peak of the memory for arrays, weights included.
        weight_bytes, state_bytes, workspace_bytes, chunk_bytes: Of these, the weights, the frames that the
            layers keep between chunks, what the CPU computes in outside MLX, and the rest.
        memory_limit: The budget in bytes.
        operations: Multiplications and additions of all steps.
        recompute: Operations over those of the whole decode: 1.0 means that none is repeated.
        limited_by: What keeps the chunks from being larger, or "nothing".
        latents_to_first_frame: Latent frames that the first frame depends on.
        waiting_bytes: Of the peak, outside MLX, frames of several machines that wait to be put together.
        fits: Whether the prediction is within the budget.
    """

    latent_shape: tuple[int, ...]
    config: Config
    dtype: str
    causal: bool
    inference_steps: int
    backend: Backend
    output: Region
    parts: tuple[Part, ...]
    latent_frames_per_step: int
    max_chunk_frames: int | None
    tiling: TilingConfig | int | None
    peak_bytes: int
    weight_bytes: int
    state_bytes: int
    workspace_bytes: int
    memory_limit: int
    operations: int
    recompute: float
    limited_by: str
    latents_to_first_frame: int
    waiting_bytes: int = 0

    @property
    def frames(self) -> int:
        """Frames that come out."""
        return self.output.time.length

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that come out."""
        return self.output.height.length, self.output.width.length

    @property
    def windows(self) -> tuple[Window, ...]:
        """What is decoded one after the other."""
        return tuple(part.pixels.window for part in self.parts)

    @property
    def lasting_bytes(self) -> int:
        """What hardly depends on the size of chunks: weights, state, workspace and what waits."""
        return self.weight_bytes + self.state_bytes + self.workspace_bytes + self.waiting_bytes

    @property
    def chunk_bytes(self) -> int:
        return self.peak_bytes - self.lasting_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_limit

    def require_fit(self) -> None:
        """Raises a `ValueError` that says what is needed, unless the prediction is within the budget."""
        if not self.fits:
            raise ValueError(
                f"no plan fits in {format_bytes(self.memory_limit)}; the smallest needs "
                f"{format_bytes(self.peak_bytes)}, in {in_words(len(self.parts))}: raise the memory limit"
            )

    def require_fit_of_begun(self, fitting: int) -> None:
        """The same for a decode that was begun with these windows, where a fresh one in so many fits."""
        if not self.fits:
            needed, given = format_bytes(self.peak_bytes), format_bytes(self.memory_limit)
            raise ValueError(
                f"the decode was begun with {in_words(len(self.parts))}, which need {needed}, got {given}: "
                "raise the memory limit, or begin again (overwrite=True, --overwrite) with "
                f"{in_words(fitting)}, which fits"
            )

    def require_match(
        self, decoder: StreamingDecoder, latent_shape: tuple[int, ...], options: DecodeOptions
    ) -> None:
        """Raises a `ValueError` unless the plan is for this decoder, these latents and options."""
        if self.latent_shape != tuple(latent_shape):
            raise ValueError(f"the plan is for latents of shape {self.latent_shape}, got {latent_shape}")
        if self.config != decoder.config:
            raise ValueError("the plan is for a decoder of another architecture; plan this decode anew")
        for name, planned, given in (
            (f"{self.dtype} weights", self.dtype, str(decoder.dtype).removeprefix("mlx.core.")),
            (f"causal={self.causal}", self.causal, options.causal),
            (f"{self.inference_steps} inference steps", self.inference_steps, options.inference_steps),
        ):
            if planned != given:
                raise ValueError(f"the plan is for {name}, got {given}; plan this decode anew")

    def __str__(self) -> str:
        height, width = self.size
        step = f"{self.latent_frames_per_step} latent frames"
        if self.max_chunk_frames:
            step += f", at most {self.max_chunk_frames} frames in a layer"
        if self.backend.makes_keys_anew:
            step += ", keys and values of the last stage made anew for each"
        kind = "exact"
        if isinstance(self.tiling, TilingConfig):
            kind = "blended tiles"
        elif not all(part.exact for part in self.parts):
            seen = "1 latent" if self.tiling == 1 else f"{self.tiling} latents"
            kind = f"approximate: windows see {seen} around them"
        rows = {
            "output": f"{self.frames} frames of {width}x{height}, from latents {self.latent_shape}",
            "method": f"{kind}, {in_words(len(self.parts))}",
            "chunk": f"{step} (limited by {self.limited_by})",
            "peak": f"{format_bytes(self.peak_bytes)} of {format_bytes(self.memory_limit)}: "
            f"weights {format_bytes(self.weight_bytes)}, state {format_bytes(self.state_bytes)}, "
            f"chunk {format_bytes(self.chunk_bytes)}"
            + (f", outside MLX {format_bytes(self.workspace_bytes)}" if self.workspace_bytes else "")
            + (f", frames that wait {format_bytes(self.waiting_bytes)}" if self.waiting_bytes else ""),
            "work": f"{self.operations / 1e12:.3g} TFLOP, {self.recompute:.2f}x the whole decode",
            "first": f"frame after {self.latents_to_first_frame} of {self.latent_shape[2]} latent frames",
            "runs in": f"{self.dtype} on {self.backend.name}",
        }
        return "\n".join(f"{name:<8} {text}" for name, text in rows.items())


def in_words(count: int) -> str:
    """A number of windows in words."""
    return "1 window" if count == 1 else f"{count} windows"
