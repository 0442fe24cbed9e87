"""`DecodingStage`: the interface of FastVideo's decoding stage, on the planned, exact decode."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.runtime.autotune import plan_to_run
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.planning.memory import format_bytes, memory_budget
from mlx_vae_tiling.stage.arguments import (
    Array,
    DecodeBatch,
    DecodingArgs,
    PipelineConfig,
    option,
    precision_of,
    require_timesteps,
)
from mlx_vae_tiling.stage.scaling import denormalized
from mlx_vae_tiling.stage.verification import VerificationResult, array_of_rank, describe, without_nan
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.tiny import TinyDecoder


class DecodingStage:
    """Decodes the latents of a batch in a pipeline, with the interface of FastVideo's stage.

    It reads attributes only, so FastVideo's batches and arguments fit once their tensors are MLX or
    NumPy arrays. An attribute that is missing or None has the default of `DecodingArgs` or `DecodeBatch`.

    Of FastVideo's stage it does not have `streaming_decode`, which hands the cache of a causal VAE from
    call to call: `decode` streams within the memory limit by itself, and `VideoDecoder.stream` gives
    pieces. Nor does it unpack Flux2's latents or crop LongCat's padding, which LTX has none of.

    Args:
        vae: A `VideoDecoder`; an object whose `decode(latents)` returns an array, something with one as
            `sample`, or a tuple or list that begins with one; or such a function. None if `forward` is
            to load it.
        pipeline: Told of a VAE that `forward` loads or frees. The stage does not keep it alive.

    Example:
        >>> stage = DecodingStage(load_decoder("demo"))
        >>> stage.decode(mx.zeros((1, 128, 2, 3, 4)), DecodingArgs()).shape
        (1, 3, 9, 96, 128)
    """

    def __init__(self, vae: Any, pipeline: Any = None):
        self.vae, self._loaded = vae, None
        self.pipeline = None if pipeline is None else weakref.ref(pipeline)

    def __call__(self, batch: Any, args: Any) -> Any:
        """Runs `forward` between `verify_input` and `verify_output`.

        Raises:
            ValueError: If a verification fails; it names the fields.
        """
        verify = option(args, "enable_stage_verification", DecodingArgs)
        if verify:
            self.verify_input(batch, args).require("input of DecodingStage")
        batch = self.forward(batch, args)
        if verify:
            self.verify_output(batch, args).require("output of DecodingStage")
        return batch

    def verify_input(self, batch: Any, args: Any) -> VerificationResult:
        """Checks that the latents, and a trajectory to decode, are arrays without NaN."""
        result = VerificationResult()
        latents = option(batch, "latents", DecodeBatch)
        result.add_check("latents", latents, [array_of_rank(5), without_nan])
        if option(batch, "return_trajectory_decoded", DecodeBatch):
            trajectory = option(batch, "trajectory_latents", DecodeBatch)
            result.add_check("trajectory_latents", trajectory, array_of_rank(6))
            if result.is_valid():
                for step in range(trajectory.shape[1]):
                    result.add_check(f"trajectory_latents[:, {step}]", trajectory[:, step], without_nan)
        return result

    def verify_output(self, batch: Any, args: Any) -> VerificationResult:
        """Checks that the output, and the steps of a decoded trajectory, are arrays of rank 5 without NaN."""
        result = VerificationResult()
        output = option(batch, "output", DecodeBatch)
        result.add_check("output", output, [array_of_rank(5), without_nan])
        if option(batch, "return_trajectory_decoded", DecodeBatch):
            decoded = option(batch, "trajectory_decoded", DecodeBatch)
            for step, frames in enumerate(decoded or ()):
                result.add_check(f"trajectory_decoded[{step}]", frames, [array_of_rank(5), without_nan])
        return result

    def forward(self, batch: Any, args: Any) -> Any:
        """Loads the VAE if need be, decodes the batch, and frees the VAE if asked to.

        A trajectory is decoded step by step into NumPy arrays, so that MLX never holds more than one
        step. What was decoded before an error is in the batch. Only a VAE that the stage has loaded
        itself is freed: memory is unified on a Mac, so moving another one to the CPU would free nothing.

        Args:
            batch: As `DecodeBatch`.
            args: As `DecodingArgs`.

        Returns:
            The batch, with `output` and, if asked for, `trajectory_decoded`.

        Raises:
            ValueError: If there is no VAE and no path to load one from, or something does not fit it.
        """
        trajectory = option(batch, "return_trajectory_decoded", DecodeBatch)
        passed_through = option(args, "output_type", DecodingArgs) == "latent"
        if trajectory or not passed_through:
            self._load(args)
        latents = option(batch, "latents", DecodeBatch)
        batch.output = _as_float32(latents) if passed_through else self.decode(latents, args)
        if trajectory:
            self._decode_trajectory(batch, args)
        if option(args, "vae_cpu_offload", DecodingArgs):
            self._free(args)
        return batch

    def decode(self, latents: Array, args: Any) -> mx.array:
        """Decodes latents: (x / 2 + 1/2) of what the VAE makes of them, clamped to [0, 1].

        They are denormalised as the VAE asks (`stage.scaling`), then cast to `vae_decode_precision`, or
        to `vae_precision` where there is none. The weights of a `VideoDecoder` are cast to it in place,
        once, unless `disable_autocast`; casting them back does not undo the rounding.

        Args:
            latents: (B, C, F, H, W); for a `VideoDecoder`, normalised.
            args: As `DecodingArgs`.

        Returns:
            (B, 3, F', H', W') float32, an `mx.array`.

        Raises:
            ValueError: If latents, factors or precision make no sense or do not fit the VAE, or no
                plan fits in the memory limit.
        """
        if self.vae is None:
            raise ValueError(
                "decode needs a VAE, got None; pass one to DecodingStage, or let forward load it"
            )
        if not array_of_rank(5)(latents):
            raise ValueError(f"latents must be an array (B, C, F, H, W), got {describe(latents)}")
        precision, autocast = precision_of(args), not option(args, "disable_autocast", DecodingArgs)
        given = latents if isinstance(latents, mx.array) else mx.array(latents)
        latents = denormalized(given, self.vae).astype(precision or given.dtype)
        if autocast and precision and isinstance(self.vae, StreamingDecoder) and self.vae.dtype != precision:
            self.vae.cast(precision)
        config = option(args, "pipeline_config", DecodingArgs)
        tiling = option(config, "vae_tiling", PipelineConfig)
        if tiling and isinstance(self.vae, StreamingDecoder):
            checked = option(args, "enable_stage_verification", DecodingArgs)
            no_tune = option(args, "no_tune", DecodingArgs)
            memory_limit = option(args, "memory_limit", DecodingArgs)
            return _decode_planned(self.vae, latents, memory_limit, checked, no_tune)
        if tiling and hasattr(self.vae, "enable_tiling"):
            self.vae.enable_tiling()
        frames = _decode_whole(self.vae, latents)
        video, view = _new_video(frames.shape)
        _write(view, frames)
        return video

    def _decode_trajectory(self, batch: Any, args: Any) -> None:
        trajectory = option(batch, "trajectory_latents", DecodeBatch)
        if not array_of_rank(6)(trajectory):
            raise ValueError(
                "trajectory_latents must be an array (B, steps, C, F, H, W) when return_trajectory_decoded "
                f"is set, got {describe(trajectory)}"
            )
        timesteps, steps = option(batch, "trajectory_timesteps", DecodeBatch), trajectory.shape[1]
        require_timesteps(timesteps, steps)
        batch.trajectory_decoded = []
        preview = option(args, "model_paths", DecodingArgs).get("preview")
        stage = self if preview is None else DecodingStage(_tiny_decoder(preview))
        for step in range(steps):
            try:
                batch.trajectory_decoded.append(np.array(stage.decode(trajectory[:, step], args)))
            except Exception as error:
                kind = ValueError if isinstance(error, ValueError) else RuntimeError
                timestep = "" if timesteps is None else f" (timestep {timesteps[step]})"
                raise kind(
                    f"trajectory step {step}{timestep} failed: {error}; "
                    f"the {step} steps before it are in batch.trajectory_decoded"
                ) from error

    def _load(self, args: Any) -> None:
        loaded = option(args, "model_loaded", DecodingArgs)
        if self.vae is not None and loaded.get("vae", True):
            return
        paths = option(args, "model_paths", DecodingArgs)
        if "vae" not in paths:
            raise ValueError(
                f"args.model_paths must have 'vae' when the VAE is not loaded, got {sorted(paths)}; "
                "or pass a VAE to DecodingStage and leave args.model_loaded empty"
            )
        autocast = not option(args, "disable_autocast", DecodingArgs)
        self.vae = self._loaded = None
        self.vae = load_decoder(paths["vae"], dtype=precision_of(args) if autocast else None)
        self._loaded = self.vae
        pipeline = None if self.pipeline is None else self.pipeline()
        if pipeline is not None and hasattr(pipeline, "add_module"):
            pipeline.add_module("vae", self.vae)
        loaded["vae"] = True

    def _free(self, args: Any) -> None:
        mx.clear_cache()
        if self.vae is None:
            return
        if self.vae is not self._loaded or "vae" not in option(args, "model_paths", DecodingArgs):
            warnings.warn(
                "vae_cpu_offload keeps the VAE: it was not loaded from args.model_paths['vae'], so the next "
                "call could not load it again",
                stacklevel=3,
            )
            return
        self.vae = self._loaded = None
        modules = getattr(None if self.pipeline is None else self.pipeline(), "modules", None)
        if isinstance(modules, dict):
            modules.pop("vae", None)
        option(args, "model_loaded", DecodingArgs)["vae"] = False
        mx.clear_cache()


def _as_float32(latents: Any) -> Any:
    if isinstance(latents, np.ndarray):
        return latents.astype(np.float32, copy=False)
    narrow = isinstance(latents, mx.array) and latents.dtype != mx.float32
    return latents.astype(mx.float32) if narrow else latents


def _tiny_decoder(source: str | os.PathLike[str]) -> TinyDecoder:
    decoder = load_decoder(source)
    if not isinstance(decoder, TinyDecoder):
        raise ValueError(f"args.model_paths['preview'] must be a tiny decoder (TAEHV), and {source} is none")
    return decoder


def _decode_planned(
    decoder: StreamingDecoder, latents: mx.array, memory_limit: Any, checked: bool, no_tune: bool
) -> mx.array:
    """Every frame of every part of a plan, written to its place in the video."""
    budget, shape = memory_budget(memory_limit), decoder.output_shape(latents.shape)
    frame_bytes = 4 * int(np.prod(shape, dtype=np.int64))
    room = max(budget - frame_bytes, 1)
    plan = plan_to_run(decoder, latents.shape, memory_limit=room, no_tune=no_tune)
    if not plan.fits:
        raise ValueError(
            f"no plan fits in {format_bytes(budget)}; the smallest needs {format_bytes(plan.peak_bytes)}, "
            f"and the frames {format_bytes(frame_bytes)}: raise args.memory_limit, or use decode_to_file, "
            "which does not hold the frames"
        )
    job = Job.prepare(decoder, latents, decoder.options(), "unit", plan, checked)
    video, view = _new_video(shape)
    for part in plan.parts:
        start, (time, rows, columns) = 0, part.pixels
        for frames in job.decode(part):
            stop = start + frames.shape[2]
            view[:, :, start:stop, rows.slice, columns.slice] = frames
            start = stop
        if start != time.length:
            raise RuntimeError(f"a window must have {time.length} frames, got {start}")
    return video


def _decode_whole(vae: Any, latents: mx.array) -> mx.array:
    decode = getattr(vae, "decode", vae)
    if not callable(decode):
        raise ValueError(f"the VAE must be a function or have one as decode, got {describe(vae)}")
    result = decode(latents)
    frames = getattr(result, "sample", result)
    if isinstance(frames, (tuple, list)) and frames:
        frames = frames[0]
    if not array_of_rank(5)(frames):
        raise ValueError(f"the VAE must return an array (B, 3, F, H, W), got {describe(frames)}")
    frames = frames if isinstance(frames, mx.array) else mx.array(frames)
    mx.eval(frames)
    return frames


def _new_video(shape: tuple[int, ...]) -> tuple[mx.array, npt.NDArray[np.float32]]:
    """A float32 array and NumPy's view of it: filled through the view, it is in memory only once."""
    video = mx.zeros(shape)
    mx.eval(video)
    return video, np.asarray(video)


def _write(view: npt.NDArray[np.float32], piece: mx.array) -> None:
    """Writes a piece in [-1, 1] as [0, 1], frame by frame: its intermediates are one frame large."""
    for index in range(piece.shape[2]):
        frame = piece[:, :, index].astype(mx.float32)
        view[:, :, index] = np.asarray(mx.clip(frame / 2 + 0.5, 0, 1))
