"""`plan_decode`: the fewest windows and the largest chunks that fit into a budget."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import require, told
from mlx_vae_tiling.dtypes import parse_dtype
from mlx_vae_tiling.runtime.frames import finishing_bytes
from mlx_vae_tiling.runtime.planning.cost import Cost, CostModel, Part
from mlx_vae_tiling.runtime.planning.forms import (
    fewest_windows,
    in_blocks,
    or_making_keys_anew,
    tuned_backend,
)
from mlx_vae_tiling.runtime.planning.grids import ARRAY_ELEMENTS, ChunkSize, choose_parts, chunks, fits
from mlx_vae_tiling.runtime.planning.memory import memory_budget
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.tiling.plan import blending_bytes, plan_tiles
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import AnyConfig
from mlx_vae_tiling.vae.regions import Region, Span, Window, as_window
from mlx_vae_tiling.vae.schedule import Pace

MEMORY = "the memory limit"
"""What limits the chunks where memory does."""


def plan_decode(
    decoder: StreamingDecoder | AnyConfig,
    latent_shape: tuple[int, ...],
    *,
    memory_limit: int | float | str | None = None,
    dtype: mx.Dtype | str | None = None,
    backend: Backend | str | None = None,
    tiling: TilingConfig | int | None = None,
    window: Window | None = None,
    causal: bool | None = None,
    num_inference_steps: int | None = None,
    parts: tuple[Part, ...] | None = None,
    chunk: ChunkSize | None = None,
    no_tune: bool = False,
) -> DecodePlan:
    """Plans a decode: the fewest windows whose smallest chunk fits, then the largest useful chunk.

    Args:
        decoder: A decoder, or the config of one.
        latent_shape: (B, C, F, H, W).
        memory_limit: Bytes, or a string such as "8GB"; by default 70 % of what is available.
        dtype: Of the weights; by default the decoder's, or bfloat16 for a config.
        backend: "cpu", "metal", "cuda" or a `Backend`; by default that of the default device.
        tiling: None for an exact decode; a `TilingConfig` for blended tiles; an integer below the
            receptive field for windows that see this many latents around them, and no more.
        window: The part of the output that is wanted; None for all of it.
        causal: Overrides the config's.
        num_inference_steps: Of a diffusion decoder; None for its config's.
        parts: Those of an earlier plan for the same window, to be kept.
        chunk: Latent frames per step and the bound on the frames of a layer, in place of the largest
            useful ones that fit.
        no_tune: Takes no form of convolution for having been measured on this machine.

    Returns:
        The plan. Where nothing fits, the smallest there is, with `fits` False.

    Raises:
        ValueError: If the shape or the limit makes no sense.
    """
    if not isinstance(decoder, StreamingDecoder):
        decoder, dtype = build_decoder(decoder), dtype or mx.bfloat16
    require("dtype", dtype, "a dtype, its name or None", str, mx.Dtype, None)
    _require_kinds(latent_shape, window, parts, chunk)
    _require_shape(latent_shape, decoder.config.latent_channels)
    dtype = parse_dtype(dtype or decoder.dtype)
    options = decoder.options(causal=causal, num_inference_steps=num_inference_steps)
    model = CostModel(decoder, tuple(latent_shape), dtype, decoder.policy(backend), options)
    budget = memory_budget(memory_limit)
    wanted = as_window(window).region(*decoder.output_shape(latent_shape)[2:])
    if isinstance(tiling, TilingConfig):
        if window is not None:
            raise ValueError(
                "blended tiles decode all of the output; crop its frames, without a window (--frames, --crop)"
            )
        # Tiles are blended in float32.
        model = CostModel(decoder, tuple(latent_shape), dtype, model.backend, options, mx.float32)
        return _plan_blended(model, wanted, tiling, budget)
    halo = _halo(tiling)

    modelled = partial(CostModel, decoder, tuple(latent_shape), dtype, options=options)

    def planned(backend: Backend) -> DecodePlan:
        return _plan_exact(modelled(backend), wanted, budget, halo, parts, chunk)

    if isinstance(backend, Backend):
        return planned(model.backend)
    tuned = model.backend if no_tune else tuned_backend(model)
    backends = dict.fromkeys([*in_blocks(tuned, model.everything, budget), model.backend])
    best = fewest_windows(planned, list(backends))
    return or_making_keys_anew(best, planned, modelled)


def plan_anew(
    decoder: StreamingDecoder,
    plan: DecodePlan,
    parts: tuple[Part, ...],
    memory_limit: int,
    backend: Backend | None = None,
) -> DecodePlan:
    """The plan of the same decode for these parts, under this limit, fitting or not.

    Args:
        decoder: For which the plan was made; its weights are not looked at.
        plan: Of the same latents and window.
        parts: Those of an earlier run, or of one of several machines.
        memory_limit: In bytes.
        backend: In place of the plan's.
    """
    return plan_decode(
        decoder,
        plan.latent_shape,
        memory_limit=memory_limit,
        dtype=plan.dtype,
        backend=backend or plan.backend,
        tiling=plan.tiling,
        window=None if isinstance(plan.tiling, TilingConfig) else plan.output.window,
        causal=plan.causal,
        num_inference_steps=plan.inference_steps,
        parts=parts,
    )


def _halo(tiling: int | None) -> int | None:
    if tiling is not None and (not isinstance(tiling, Integral) or isinstance(tiling, bool) or tiling < 0):
        raise ValueError(
            "tiling must be None, a TilingConfig such as TilingConfig.default(), or, for a halo, a number of "
            f"latents from 0 on, got {told(tiling)}"
        )
    return None if tiling is None else int(tiling)


def _require_shape(latent_shape: tuple[int, ...], channels: int) -> None:
    if len(latent_shape) != 5 or latent_shape[1] != channels or min(latent_shape) < 1:
        raise ValueError(
            f"latent_shape must be (B, {channels}, F, H, W) without empty axes, got {latent_shape}"
        )


def _require_kinds(latent_shape: Any, window: object, parts: Any, chunk: object) -> None:
    require("latent_shape", latent_shape, "(B, C, F, H, W)", tuple, list)
    for size in latent_shape:
        require("latent_shape", size, "five whole numbers", Integral)
    require("window", window, "a Window or None", Window, None)
    require("parts", parts, "those of an earlier plan, or None", tuple, None)
    for part in parts or ():
        require("parts", part, "those of an earlier plan", Part)
    require("chunk", chunk, "(latent frames, most frames of a layer) or None", tuple, None)
    if isinstance(chunk, tuple) and len(chunk) != 2:
        raise ValueError(f"chunk must be (latent frames, most frames of a layer), got {told(chunk)}")
    if isinstance(chunk, tuple):
        Pace(*chunk)  # which says what is wrong with it


def _plan_exact(
    model: CostModel,
    wanted: Region,
    budget: int,
    halo: int | None,
    parts: tuple[Part, ...] | None,
    chunk: ChunkSize | None,
) -> DecodePlan:
    parts = parts or choose_parts(model, wanted, budget, halo)
    steps = [chunk] if chunk else list(chunks(model))
    if not all(fits(model, part, budget, steps[-1]) for part in parts):
        steps = steps[-1:]
    return _plan_chunks(model, wanted, budget, halo, parts, steps)


def _plan_chunks(
    model: CostModel,
    wanted: Region,
    budget: int,
    halo: int | None,
    parts: tuple[Part, ...],
    steps: list[ChunkSize],
) -> DecodePlan:
    """The largest of these chunks with which these windows fit."""
    everything = steps[0] == (model.latent_shape[2], None)
    limited_by = "the number of latent frames" if everything else "what is useful"
    for step, cap in steps:
        costs = [model.cost(part, step, cap) for part in parts]
        largest = max(costs, key=lambda cost: cost.total)
        if max(cost.elements for cost in costs) >= ARRAY_ELEMENTS:
            limited_by = "2**31 elements per array"
        elif model.weight_bytes + largest.total > budget:
            limited_by = MEMORY
        else:
            break
    return _assemble(model, wanted, parts, step, cap, halo, budget, largest, limited_by)


def _plan_blended(model: CostModel, wanted: Region, tiling: TilingConfig, budget: int) -> DecodePlan:
    """Blended tiles: each decoded whole, beside the float32 buffers that it is added to."""
    config, (batch, _, *size) = model.decoder.config, model.latent_shape
    tiles = plan_tiles(model.latent_shape, tiling, config.spatial_scale, config.temporal_scale)
    lengths = [[tile.latents.stop - tile.latents.start for tile in axis] for axis in tiles]
    largest = [max(axis) for axis in lengths]
    cost = model.cost(_whole(model, largest), largest[0], None)
    planes, itemsize = batch * config.out_channels, model.dtype.size

    def decoding(*tile: int) -> int:
        return model.cost(_whole(model, list(tile)), tile[0], None).of_mlx

    finishing = finishing_bytes(planes * wanted.area, itemsize)
    blending = blending_bytes(tiles, planes, itemsize, decoding, finishing)
    operations = sum(
        model.operations(_whole(model, [t, h, w])) for t in lengths[0] for h in lengths[1] for w in lengths[2]
    )
    part = _whole(model, size)
    chunk = cost._replace(chunk=blending - cost.state)
    plan = _assemble(model, wanted, (part,), largest[0], None, tiling, budget, chunk, "the tile size")
    return replace(plan, operations=operations, recompute=operations / plan.operations)


def _whole(model: CostModel, size: list[int]) -> Part:
    """All that latents of this size decode to."""
    latents = Region(*(Span(0, length, length) for length in size))
    pixels = model.decoder.output_shape((*model.latent_shape[:2], *size))[2:]
    return Part(Window().region(*pixels), latents)


def _assemble(
    model: CostModel,
    wanted: Region,
    parts: tuple[Part, ...],
    step: int,
    cap: int | None,
    tiling: TilingConfig | int | None,
    budget: int,
    largest: Cost,
    limited_by: str,
) -> DecodePlan:
    operations = sum(model.operations(part, step, cap) for part in parts)
    at_once = model.operations(Part(wanted, _whole(model, list(model.latent_shape[2:])).latents))
    first = wanted.over(wanted.time.start, wanted.time.start + 1)
    return DecodePlan(
        latent_shape=model.latent_shape,
        config=model.decoder.config,
        dtype=str(model.dtype).removeprefix("mlx.core."),
        causal=model.options.causal,
        inference_steps=model.options.inference_steps,
        backend=model.backend,
        output=wanted,
        parts=parts,
        latent_frames_per_step=step,
        max_chunk_frames=cap,
        tiling=tiling,
        peak_bytes=model.weight_bytes + largest.total,
        weight_bytes=model.weight_bytes,
        state_bytes=largest.state,
        workspace_bytes=largest.workspace,
        memory_limit=budget,
        operations=operations,
        recompute=operations / at_once,
        limited_by=limited_by,
        latents_to_first_frame=min(model.latents_before(first).time.length, model.latent_shape[2]),
    )
