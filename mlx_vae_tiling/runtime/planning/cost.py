"""What a decode costs: the events of its schedule, added up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.runtime.frames import finishing_bytes
from mlx_vae_tiling.vae.backend import Backend, Taken, Where
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.options import DecodeOptions
from mlx_vae_tiling.vae.regions import Region, Span, Window
from mlx_vae_tiling.vae.schedule import (
    Deliver,
    Forget,
    HeldLengths,
    Pace,
    frames_per_latent,
    schedule,
    spans_of,
)

Counts = np.ndarray[Any, np.dtype[np.int64]]


class Part(NamedTuple):
    """A region of the output, and the latents that it is decoded from as if there were no others."""

    pixels: Region
    latents: Region

    @property
    def exact(self) -> bool:
        """Whether these are all latents, of which only those in the receptive field are used."""
        return all(span.length == span.size for span in self.latents)

    @property
    def inside(self) -> Region:
        """The region, counted from the corner of the latents that it is decoded from."""
        time, *space = self.pixels
        moved = []
        for pixels, latents in zip(space, self.latents[1:], strict=True):
            scale = pixels.size // latents.size
            origin = latents.start * scale
            moved.append(Span(pixels.start - origin, pixels.stop - origin, latents.length * scale))
        return Region(time, *moved)


class Cost(NamedTuple):
    """What a stream takes besides the weights, in bytes.

    Attributes:
        state: What lasts from chunk to chunk.
        chunk: What one chunk adds.
        workspace: Outside MLX.
        elements: Of the largest array.
    """

    state: int
    chunk: int
    workspace: int
    elements: int

    @property
    def total(self) -> int:
        return self.of_mlx + self.workspace

    @property
    def of_mlx(self) -> int:
        return self.state + self.chunk


class Chunk(NamedTuple):
    """Frames of a step that are computed at once, for all chunks with as many frames in and out."""

    step: int
    start: int
    stop: int


class Trace(NamedTuple):
    """What a schedule holds, in frames of every step, each combination once.

    Attributes:
        chunks: What is computed.
        computing: Before a chunk is computed: its index in `chunks`, then the frames of every step.
        copying: While frames are joined, or those that stay are copied out of those that go.
        between: Between two pieces of the output.
        read: Frames of its main input that each step reads, all chunks together.
    """

    chunks: Sequence[Chunk]
    computing: Counts
    copying: Counts
    between: Counts
    read: Counts


class CostModel:
    """What decoding latents of one shape costs.

    Args:
        decoder: The decoder; its weights are not looked at.
        latent_shape: (B, C, F, H, W).
        dtype: Of weights and activations.
        backend: Where it runs.
        options: Of the decode; None for the decoder's defaults.
        output_dtype: Of the frames; None for that of the weights.
    """

    def __init__(
        self,
        decoder: StreamingDecoder,
        latent_shape: tuple[int, ...],
        dtype: mx.Dtype,
        backend: Backend,
        options: DecodeOptions | None = None,
        output_dtype: mx.Dtype | None = None,
    ):
        self.decoder, self.latent_shape, self.dtype, self.backend = decoder, latent_shape, dtype, backend
        self.options = options or decoder.options()
        self.output_dtype = output_dtype or dtype
        self.steps = decoder.steps(self.options, self.output_dtype, backend)
        scale, size = frames_per_latent(self.steps)[-1], 2**20
        middle = Span(size // 2, size // 2 + 1, scale * (size - 1) + 1)
        self._lag = spans_of(self.steps, 0, middle)[0].length
        self._spans: dict[tuple[int, Span], list[Span]] = {}
        self._traces: dict[Hashable, Trace] = {}
        self._costs: dict[Hashable, Cost] = {}

    @property
    def weight_bytes(self) -> int:
        return self.decoder.config.parameters * self.dtype.size

    @property
    def everything(self) -> Region:
        """All of the output, whatever part of it is decoded."""
        return Window().region(*self.decoder.output_shape(self.latent_shape)[2:])

    def operations(self, part: Part, step: int | None = None, cap: int | None = None) -> int:
        """Multiplications and additions of all steps.

        Args:
            part: What is decoded.
            step, cap: As `cost`, on which depends how often a step makes anew what an earlier chunk has had;
                None where all of it is one chunk.
        """
        pairs = list(zip(self.steps, self._regions(part.inside), strict=True))
        operations = sum(one.operations * region.volume for one, region in pairs)
        if any(one.repeated for one in self.steps):
            frames = None if step is None else self._read(part.inside, step, cap)
            for number, (one, region) in enumerate(pairs):
                if one.repeated:
                    given = one.reads[0].need.before(region)
                    read = given.time.length if frames is None else frames[number]
                    operations += one.repeated * read * given.area
        return self.latent_shape[0] * operations

    def _read(self, pixels: Region, step: int, cap: int | None) -> list[int]:
        """Frames of its main input that each step reads in all its chunks together."""
        shortened, period = self._shortened(pixels, step).time, step * frames_per_latent(self.steps)[-1]

        def read(surplus: int) -> Counts:
            time = shortened._replace(stop=shortened.stop + surplus, size=shortened.size + surplus)
            return self._trace(tuple(self._along(0, time)), step, cap).read

        once, left_out = read(0), pixels.time.stop - shortened.stop
        # What is left out repeats itself with every step.
        frames = once + (read(period) - once) * (left_out // period) if left_out else once
        return [int(n) for n in frames]

    def latents_before(self, pixels: Region) -> Region:
        """The latents that a region of the output depends on."""
        return self._regions(pixels)[0]

    def _regions(self, pixels: Region) -> list[Region]:
        """As `regions_of`: windows of a grid share their rows and columns."""
        axes = (self._along(axis, span) for axis, span in enumerate(pixels))
        return [Region(*spans) for spans in zip(*axes, strict=True)]

    def _along(self, axis: int, span: Span) -> list[Span]:
        if (axis, span) not in self._spans:
            self._spans[axis, span] = spans_of(self.steps, axis, span)
        return self._spans[axis, span]

    def cost(self, part: Part, step: int, cap: int | None) -> Cost:
        """Memory of a stream besides the weights.

        Args:
            part: What is decoded.
            step: Latent frames per step.
            cap: Most frames of a chunk in any layer; None for no bound.
        """
        regions = self._regions(self._shortened(part.inside, step))
        times = tuple(region.time for region in regions)
        sides = tuple((region.height.length, region.width.length) for region in regions)
        key = times, sides, step, cap
        if key not in self._costs:
            self._costs[key] = self._cost(regions, self._trace(times, step, cap))
        return self._costs[key]

    def _cost(self, regions: Sequence[Region], trace: Trace) -> Cost:
        pairs = zip(self.steps, regions, strict=True)
        frame = np.array([self.latent_shape[0] * step.channels * r.area for step, r in pairs], np.int64)
        plane, itemsize = int(frame[-1]), self.output_dtype.size
        frame[:-1] *= self.dtype.size
        frame[-1] *= itemsize
        taken = [self._taken(chunk, regions) for chunk in trace.chunks]
        most = np.array([t.nbytes for t in taken])[trace.computing[:, 0]]
        at_once = [int((trace.computing[:, 1:] @ frame + most).max())]
        if len(trace.copying):
            at_once.append(int((trace.copying @ frame).max()))
        state = int((trace.between @ frame).max())
        piece = max(chunk.stop - chunk.start for chunk in trace.chunks if chunk.step == len(self.steps) - 1)
        at_once.append(state + int(frame[-1]) * piece + finishing_bytes(plane, itemsize))
        ahead = self.backend.pieces_ahead * int(frame[-1]) * piece
        workspace, elements = max(t.workspace for t in taken), max(t.elements for t in taken)
        return Cost(state, max(at_once) + ahead - state, workspace, elements)

    def _taken(self, chunk: Chunk, regions: Sequence[Region]) -> Taken:
        step, output = self.steps[chunk.step], regions[chunk.step].over(chunk.start, chunk.stop)
        inputs = tuple(need.before(output) for _, need in step.reads)
        return step.taken(Where(inputs, output, self.latent_shape[0], self.dtype, self.backend))

    def _shortened(self, pixels: Region, step: int) -> Region:
        """The region with fewer frames, of which a stream has the same chunks.

        Once every step runs, a stream repeats itself with every `step` latent frames. So those in the
        middle of a long video are left out.
        """
        scale = frames_per_latent(self.steps)[-1]
        latents = self._along(0, pixels.time)[0]
        filled = 2 * self._lag + 4 * step
        surplus = max(latents.length - filled, 0) // step * step * scale
        time = pixels.time
        return pixels._replace(time=Span(time.start, time.stop - surplus, time.size - surplus))

    def _trace(self, times: tuple[Span, ...], step: int, cap: int | None) -> Trace:
        key = times, step, cap
        if key not in self._traces:
            self._traces[key] = self._traced(*key)
        return self._traces[key]

    def _traced(self, times: tuple[Span, ...], step: int, cap: int | None) -> Trace:
        """Runs a schedule with numbers of frames in place of frames."""
        count = len(self.steps)
        held, frames = [HeldLengths(span.start) for span in times], [0] * count
        read = np.zeros(count, np.int64)
        numbers: dict[tuple[int, ...], int] = {}
        chunks: list[Chunk] = []
        computing: set[tuple[int, ...]] = set()
        copying: set[tuple[int, ...]] = set()
        between: set[tuple[int, ...]] = {(0,) * count}

        def frames_with(copied: int) -> tuple[int, ...]:
            """What is held now; of the step that has changed, with what is there twice."""
            frames[number] = held[number].frames + copied
            found = tuple(frames)
            frames[number] -= copied
            return found

        for event in schedule(self.steps, times, Pace(step, cap)):
            number = event.step
            if isinstance(event, Forget):
                if copied := held[number].forget(event.before):
                    copying.add(frames_with(copied))
                frames[number] = held[number].frames
                continue
            if isinstance(event, Deliver):
                held[number].deliver()
                between.add(frames_with(0))
                continue
            for number, _ in self.steps[event.step].reads:
                if copied := held[number].join():
                    copying.add(frames_with(copied))
            number = event.step
            output = times[number]._replace(start=event.start, stop=event.stop)
            seen = [need.along(0, output).length for _, need in self.steps[number].reads]
            read[number] += seen[0] if seen else 0
            kind = (number, output.length, *seen)
            if kind not in numbers:
                numbers[kind] = len(chunks)
                chunks.append(Chunk(*event))
            computing.add((numbers[kind], *frames_with(0)))
            held[number].add(output.length)
            frames[number] = held[number].frames
        told = [np.array(list(found), np.int64) for found in (computing, copying, between)]
        return Trace(chunks, told[0], told[1], told[2], read)
