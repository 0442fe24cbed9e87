"""The layers of the diffusion decoder: attribute names are the original checkpoints', axes channels-last.

A block of a stage is two steps. The first makes keys and values, which are held as long as a later window
reaches them; the second attends to them and runs the MLP. Both work on a few frames at a time, evaluated
before the next, so that what a step takes hardly grows with its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.attention import attention_calls, block_for
from mlx_vae_tiling.vae.backend import Backend, Taken, Where
from mlx_vae_tiling.vae.backend_layers import KEY_COPY_QUERIES, AttentionSize, MLPWeights
from mlx_vae_tiling.vae.diffusion_config import MODULATIONS, DiffusionDecoderConfig
from mlx_vae_tiling.vae.regions import Attention, Region, Same, Stride
from mlx_vae_tiling.vae.rotary import rotary_factors, rotated
from mlx_vae_tiling.vae.schedule import Read, Step

EPS = 1e-6
Inputs = Sequence[mx.array]
Compute = Callable[[Inputs, Where], mx.array]
Modulation = tuple[mx.array, mx.array]
"""What a normalised input is multiplied by, less 1, and what is added to it: (C,) each."""


class NeighbourhoodAttention(nn.Module):
    """Queries, keys and values of one linear layer, of which q and k are normalised by head and rotated."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim, EPS), nn.RMSNorm(head_dim, EPS)
        self._channels, self._head_dim = channels, head_dim

    def queries(self, x: mx.array, region: Region, backend: Backend) -> mx.array:
        """(B, T, H, W, C) to (B, T, H, W, heads, D), scaled."""
        computed = backend.computed
        q = computed(self._projected(x, 0, 1, region, backend)[..., 0, :, :])
        q = computed(self.q_norm(q) * self._head_dim**-0.5)
        return computed(rotated(q, rotary_factors(region, self._head_dim)))

    def keys_and_values(self, x: mx.array, region: Region, backend: Backend) -> mx.array:
        """(B, T, H, W, C) to (B, T, H, W, 2, heads, D)."""
        computed = backend.computed
        kv = computed(self._projected(x, 1, 3, region, backend))
        k = computed(self.k_norm(kv[..., 0, :, :]))
        k = computed(rotated(k, rotary_factors(region, self._head_dim)))
        return mx.stack([k, kv[..., 1, :, :]], axis=-3)

    def _projected(self, x: mx.array, first: int, last: int, region: Region, backend: Backend) -> mx.array:
        rows = slice(first * self._channels, last * self._channels)
        y = backend.linear(x, self.qkv.weight[rows], self.qkv.bias[rows], region)
        return y.reshape(*x.shape[:-1], last - first, -1, self._head_dim)


class SwiGLU(nn.Module):
    """`w_down(silu(w_gate(x)) * w_up(x))`."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.w_up = nn.Linear(channels, hidden, bias=False)
        self.w_gate = nn.Linear(channels, hidden, bias=False)
        self.w_down = nn.Linear(hidden, channels, bias=False)

    @property
    def weights(self) -> MLPWeights:
        return MLPWeights(self.w_up.weight, self.w_gate.weight, self.w_down.weight)


class NABlock(nn.Module):
    """Neighbourhood attention, then an MLP, each normalised beforehand and added to its input.

    Args:
        channels: Width of the block.
        kernel: Positions of an attention window.
        config: Of the decoder.
    """

    def __init__(self, channels: int, kernel: Stride, config: DiffusionDecoderConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(channels, EPS), nn.RMSNorm(channels, EPS)
        self.attn = NeighbourhoodAttention(channels, config.head_dim)
        self._hidden = config.hidden_channels(channels)
        self.mlp = SwiGLU(channels, self._hidden)
        self._channels, self._kernel, self._heads = channels, kernel, channels // config.head_dim

    def steps(
        self,
        producer: int,
        modulations: tuple[Modulation, Modulation] | None = None,
        addend: tuple[Read, nn.Linear] | None = None,
        recompute: bool = False,
    ) -> list[Step]:
        """Keys and values, then the block; or both as one step, which holds its input in their place.

        Args:
            producer: Number of the step that makes its input.
            modulations: Of the attention's and of the MLP's input; None for none.
            addend: What is read and turned into an addend of the block's output; None for nothing.
            recompute: Whether keys and values are made anew for every chunk.
        """
        first, second = modulations or (None, None)
        c = self._channels
        window = Attention(self._kernel)
        reads = Read(producer, Same()), *([addend[0]] if addend else [])
        # Also the products that a block of queries computes because its windows differ.
        block = block_for(self._kernel, (8, 16, 16), KEY_COPY_QUERIES)
        attention = 4 * c * math.prod(b + k - 1 for b, k in zip(block, self._kernel, strict=True))
        operations = 4 * c * c + attention + 6 * c * self._hidden + (2 * c * c if addend else 0)
        keys = partial(self._keys, modulation=first)
        mixed = partial(self._block, modulations=(first, second), add=addend and addend[1])
        if recompute:
            both = partial(self._both, keys=keys, block=mixed)
            reads = Read(producer, window), *reads
            return [Step(both, self._both_taken, reads, c, operations, repeated=4 * c * c)]
        return [
            Step(keys, self._keys_taken, reads[:1], 2 * c, 4 * c * c),
            Step(mixed, self._block_taken, (Read(producer + 1, window), *reads), c, operations),
        ]

    def _keys(self, inputs: Inputs, where: Where, modulation: Modulation | None) -> mx.array:
        def compute(part: Region) -> mx.array:
            x = inputs[0][:, part.time.inside(where.output.time)]
            normed = where.backend.computed(modulated(self.norm1(x), modulation))
            kv = self.attn.keys_and_values(normed, part, where.backend)
            return kv.reshape(*x.shape[:-1], -1)

        return by_frames(compute, where.output, self._frames_at_once(where))

    def _keys_taken(self, where: Where) -> Taken:
        made, few = self._positions(where, self._frames_at_once(where))
        c, size = self._channels, where.dtype.size
        nbytes = by_frames_bytes(2 * c * size, made, few, where.backend.keys_bytes(few * c, size))
        return Taken(nbytes, 2 * c * made, where.backend.linear_workspace(c, 2 * c, size))

    def _block(
        self,
        inputs: Inputs,
        where: Where,
        modulations: tuple[Modulation | None, Modulation | None],
        add: nn.Linear | None,
    ) -> mx.array:
        kv = inputs[0].reshape(*inputs[0].shape[:-1], 2, self._heads, -1)
        block, backend = self._attention_block(where), where.backend

        def compute(part: Region) -> mx.array:
            frames = part.time.inside(where.output.time)
            x = inputs[1][:, frames]
            normed = where.backend.computed(modulated(self.norm1(x), modulations[0]))
            q = self.attn.queries(normed, part, where.backend)
            mx.eval(q)
            del normed
            a = backend.attention(q, kv, self._kernel, part, where.inputs[0], block)
            proj = self.attn.proj
            x = x + backend.linear(a.reshape(x.shape), proj.weight, proj.bias, part)
            mx.eval(x)
            del q, a
            x = backend.mlp(x, lambda x: modulated(self.norm2(x), modulations[1]), self.mlp.weights, part)
            if add is None:
                return x
            return x + backend.linear(inputs[2][:, frames], add.weight, add.bias, part)

        return by_frames(compute, where.output, block[0])

    def _block_taken(self, where: Where) -> Taken:
        block, backend = self._attention_block(where), where.backend
        made, few = self._positions(where, block[0])
        c, size, heads = self._channels, where.dtype.size, self._heads * where.batch
        frames, width = where.output.time, c * where.batch
        rest = frames.length % block[0] or block[0]
        calls = (
            AttentionSize(2 * keys * width, queries * width)
            for start in {frames.start, frames.stop - rest}
            for _, keys, queries in attention_calls(
                self._kernel,
                where.output.over(start, min(start + block[0], frames.stop)),
                block,
                heads,
                backend.tile_elements,
            )
        )
        result = few * c * size
        attending = 2 * result + backend.attention_bytes(calls, few * c, size)
        mixing = backend.mlp_bytes(few, c, self._hidden, size)
        phases = backend.queries_bytes(few * c, size), attending, 4 * result, mixing
        kept = 2 * width * where.inputs[0].volume
        copied = kept * size * (where.batch > 1)
        workspace = max(
            backend.linear_workspace(c, c, size),
            backend.mlp_workspace(c, self._hidden, size),
            backend.attention_workspace(self._kernel, where.output, self._heads, c),
        )
        return Taken(copied + by_frames_bytes(c * size, made, few, max(phases)), kept, workspace)

    def _both(self, inputs: Inputs, where: Where, keys: Compute, block: Compute) -> mx.array:
        kv = keys(inputs[:1], _of_keys(where))
        mx.eval(kv)
        return block([kv, *inputs[1:]], where)

    def _both_taken(self, where: Where) -> Taken:
        keys, block = self._keys_taken(_of_keys(where)), self._block_taken(where)
        kept = 2 * self._channels * where.batch * where.inputs[0].volume * where.dtype.size
        pairs = zip(keys, block._replace(nbytes=kept + block.nbytes), strict=True)
        return Taken(*(max(pair) for pair in pairs))

    def _attention_block(self, where: Where) -> Stride:
        t, h, w = (span.length for span in where.output)
        return block_for(self._kernel, (t, h, w), where.backend.queries_per_key_copy)

    def _frames_at_once(self, where: Where) -> int:
        area = where.batch * where.output.area * self._channels
        return min(where.output.time.length, max(1, where.backend.tile_elements // area))

    @staticmethod
    def _positions(where: Where, frames: int) -> tuple[int, int]:
        """Positions of the step's output, and of so many frames of it."""
        return where.batch * where.output.volume, where.batch * where.output.area * frames


class DiffusionNABlock(NABlock):
    """A block beside which the context enters, modulated by the timestep."""

    def __init__(self, channels: int, kernel: Stride, config: DiffusionDecoderConfig):
        super().__init__(channels, kernel, config)
        self.context_proj = nn.Linear(channels, channels)
        self.scale_shift_table = mx.zeros((MODULATIONS, channels))

    def modulations(self, shared: mx.array) -> tuple[Modulation, Modulation]:
        """Those of a timestep, of which `shared` (7, C) is what all blocks have in common."""
        scale1, shift1, _, scale2, shift2, _, _ = shared + self.scale_shift_table
        return (scale1, shift1), (scale2, shift2)


def _of_keys(where: Where) -> Where:
    """Where a step that makes keys and values by itself makes them."""
    return where._replace(inputs=where.inputs[:1], output=where.inputs[0])


def modulated(x: mx.array, modulation: Modulation | None) -> mx.array:
    """A normalised input, scaled and shifted if asked to."""
    return x if modulation is None else x * (1 + modulation[0]) + modulation[1]


def by_frames(compute: Callable[[Region], mx.array], region: Region, frames: int) -> mx.array:
    """The frames of a region, so many at a time, each evaluated before the next."""
    done = []
    for part in _parts(region, frames):
        done.append(compute(part))
        mx.eval(done[-1])
    return mx.concatenate(done, axis=1) if len(done) > 1 else done[0]


def by_frames_bytes(result: int, made: int, few: int, computing: int) -> int:
    """What `by_frames` takes.

    Args:
        result: Bytes of the result per position.
        made: Positions in all, of which
        few: are computed at a time.
        computing: What computing those takes, their result included.
    """
    return max(result * (made - few) + computing, 2 * result * made if few < made else 0)


def _parts(region: Region, frames: int) -> Iterator[Region]:
    for start in range(region.time.start, region.time.stop, frames):
        yield region.over(start, min(start + frames, region.time.stop))
