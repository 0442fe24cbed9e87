"""The layers of the tiny decoders: attribute names are those of the published files, axes channels-last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import Taken, Where
from mlx_vae_tiling.vae.operations import Padding, cut, surround
from mlx_vae_tiling.vae.regions import Convolution, Region, Same, Upsampling
from mlx_vae_tiling.vae.schedule import Read, Step

Inputs = Sequence[mx.array]
HERE, PAST = Convolution((0, 0)), Convolution((1, 0))
"""What a convolution of single frames needs, and one that sees also the frame before."""

GROWTH = Upsampling((2, 2, 2), drops_first=False)


class FrameConvolution(nn.Module):
    """A convolution of single frames, 3x3 with zeros beyond the borders of the frame, or 1x1.

    Args:
        in_channels, out_channels: Of the kernel.
        side: Of the kernel: 1 or 3.
        groups: Into which the channels fall.
        bias: Whether it has one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, side: int = 3, groups: int = 1, bias: bool = True
    ):
        super().__init__()
        self.weight = mx.zeros((out_channels, side, side, in_channels // groups))
        if bias:
            self.bias = mx.zeros((out_channels,))
        self._in, self._out, self._side, self._groups = in_channels, out_channels, side, groups

    def __call__(self, x: mx.array, source: Region, where: Where) -> mx.array:
        """x at the positions of `source`, to the positions of the step's output."""
        if self._side == 1:
            y = x @ self.weight.reshape(self._out, self._in).T
        else:
            padding = Padding.between(source, where.output, HERE.reach, "zeros")
            x = surround(x, padding.rows, padding.columns)
            y = where.backend.convolve_frames(x, self.weight, self._groups)
        return y + self.bias if "bias" in self else y

    @property
    def operations(self) -> int:
        """Multiplications and additions per position."""
        return 2 * self.weight.size

    def bytes_taken(self, where: Where) -> int:
        """What a 3x3 call takes, its result included."""
        t, h, w = (span.length for span in where.output)
        padded, made = where.batch * t * (h + 2) * (w + 2) * self._in, where.batch * t * h * w * self._out
        weights, itemsize = self.weight.size, where.dtype.size
        return where.backend.frame_convolution_bytes(where.batch * t, padded, made, weights, itemsize)


class MemoryBlock(nn.Module):
    """Three 3x3 convolutions of a frame and the one before, beside a skip."""

    def __init__(self, channels: int):
        super().__init__()
        sides = [FrameConvolution(2 * channels, channels)]
        sides += [FrameConvolution(channels, channels) for _ in range(2)]
        self.conv = [sides[0], nn.ReLU(), sides[1], nn.ReLU(), sides[2]]
        self._channels = channels

    def steps(self, producer: int) -> list[Step]:
        first, _, second, _, third = self.conv
        c = self._channels
        return [
            Step(self._first, self._taken(first, 4), (Read(producer, PAST),), c, first.operations),
            Step(self._second, self._taken(second, 0), (Read(producer + 1, HERE),), c, second.operations),
            Step(
                self._third,
                self._taken(third, 0),
                (Read(producer + 2, HERE), Read(producer, Same())),
                c,
                third.operations,
            ),
        ]

    def _first(self, inputs: Inputs, where: Where) -> mx.array:
        return nn.relu(self.conv[0](with_past(inputs[0], where), where.inputs[0], where))

    def _second(self, inputs: Inputs, where: Where) -> mx.array:
        return nn.relu(self.conv[2](inputs[0], where.inputs[0], where))

    def _third(self, inputs: Inputs, where: Where) -> mx.array:
        return nn.relu(self.conv[4](inputs[0], where.inputs[0], where) + inputs[1])

    def _taken(self, layer: FrameConvolution, copies: int) -> Callable[[Where], Taken]:
        return partial(_convolution_taken, layer=layer, channels=self._channels, copies=copies)


class WideMemoryBlock(nn.Module):
    """A 1x1 and a grouped 3x3 convolution of a frame and the one before, twice, beside a skip."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.conv = [
            FrameConvolution(2 * channels, channels, side=1),
            nn.ReLU(),
            FrameConvolution(channels, channels, groups=groups),
            nn.ReLU(),
            FrameConvolution(channels, channels, side=1),
            nn.ReLU(),
            FrameConvolution(channels, channels, groups=groups),
        ]
        self._channels = channels

    def steps(self, producer: int) -> list[Step]:
        mix, _, first, _, mix_again, _, second = self.conv
        c = self._channels
        reads = (Read(producer + 1, HERE), Read(producer, Same()))
        operations = [mix.operations + first.operations, mix_again.operations + second.operations]
        taken = [
            partial(_convolution_taken, layer=layer, channels=c, copies=1, before=3)
            for layer in (first, second)
        ]
        return [
            Step(self._first, taken[0], (Read(producer, PAST),), c, operations[0]),
            Step(self._second, taken[1], reads, c, operations[1]),
        ]

    def _first(self, inputs: Inputs, where: Where) -> mx.array:
        x = nn.relu(self.conv[0](with_past(inputs[0], where), where.inputs[0], where))
        return nn.relu(self.conv[2](where.backend.computed(x), where.inputs[0], where))

    def _second(self, inputs: Inputs, where: Where) -> mx.array:
        x = where.backend.computed(nn.relu(self.conv[4](inputs[0], where.inputs[0], where)))
        return nn.relu(self.conv[6](x, where.inputs[0], where) + inputs[1])


class Grow(nn.Module):
    """Every frame becomes two, by a 1x1 convolution, and every position four, by repetition."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConvolution(channels, 2 * channels, side=1, bias=False)
        self._channels = channels

    def step(self, producer: int) -> Step:
        reads = (Read(producer, GROWTH),)
        return Step(self._grown, self._taken, reads, self._channels, self.conv.operations // 8)

    def _grown(self, inputs: Inputs, where: Where) -> mx.array:
        x = where.backend.computed(self.conv(inputs[0], where.inputs[0], where))
        b, t, h, w, _ = x.shape
        x = x.reshape(b, t, h, w, 2, -1).transpose(0, 1, 4, 2, 3, 5)[:, :, :, :, None, :, None]
        x = mx.broadcast_to(x, (b, t, 2, h, 2, w, 2, self._channels))
        x = x.reshape(b, 2 * t, 2 * h, 2 * w, -1)
        return cut(where.backend.computed(x), GROWTH.slices(where.inputs[0], where.output))

    def _taken(self, where: Where) -> Taken:
        given = where.batch * where.inputs[0].volume * self._channels
        made, kept = 8 * given, where.batch * where.output.volume * self._channels
        return Taken((made + max(2 * given, kept * (kept < made))) * where.dtype.size, made)


def with_past(x: mx.array, where: Where) -> mx.array:
    """Beside every frame the one before it, and beside the first of all zeros."""
    if where.inputs[0].time.start == where.output.time.start:
        x = mx.concatenate([mx.zeros_like(x[:, :1]), x], axis=1)
    return where.backend.computed(mx.concatenate([x[:, 1:], x[:, :-1]], axis=-1))


def convolution_step(
    layer: FrameConvolution,
    producer: int,
    before: Callable[[mx.array], mx.array] | None = None,
    after: Callable[[mx.array], mx.array] | None = None,
) -> Step:
    """A convolution as a step of its own, with an activation before or after it."""

    def compute(inputs: Inputs, where: Where) -> mx.array:
        x = inputs[0] if before is None else where.backend.computed(before(inputs[0]))
        y = layer(x, where.inputs[0], where)
        return y if after is None else after(y)

    channels = layer._in if before else 0
    taken = partial(_convolution_taken, layer=layer, channels=channels, copies=1)
    return Step(compute, taken, (Read(producer, HERE),), layer._out, layer.operations)


def _convolution_taken(
    where: Where, layer: FrameConvolution, channels: int, copies: int, before: int = 0
) -> Taken:
    """What a convolution takes.

    Args:
        where: Where it computes.
        layer: The convolution.
        channels: Of what is held.
        copies: Of that, how many lie beside it, and
        before: how many there are before it begins.
    """
    given = where.batch * where.inputs[0].volume * channels
    held = given * where.dtype.size
    made = where.batch * where.output.volume * layer._out
    return Taken(max(before * held, copies * held + layer.bytes_taken(where)), max(2 * given, made))
