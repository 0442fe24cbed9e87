"""Hundreds of calls with odd arguments: what the argument means, or one clear error that names it."""

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fuzzing import bounded
from vae_cases import random_latents, small_decoder

import mlx_vae_tiling as mvt
from mlx_vae_tiling import SpatialTilingConfig, TilingConfig, Window

pytestmark = pytest.mark.fuzz

CALLS = 400
TILES = TilingConfig(SpatialTilingConfig(64, 32))
SHAPE = (1, 8, 3, 2, 3)


class Opaque:
    """Something of a type that nobody knows."""

    def __repr__(self):
        return "Opaque()"


NUMBERS = [-1, 0, 1, 2, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1.0, -0.0, True, False]
NUMBERS += [float("nan"), float("inf"), np.int64(2), np.uint8(1), np.float32(1.5), np.bool_(True), 1j]
WORDS = [
    "",
    "x",
    "1",
    "tpu",
    "float16",
    "bf16",
    "8 GB",
    "-8GB",
    "1e9",
    "0",
    "auto",
    "demo",
    "a\nb",
    "x" * 5000,
]
WORDS += [b"bytes", Path("nowhere"), "/dev/null", "no/such/file.safetensors"]
OTHERS = [
    None,
    [],
    (),
    {},
    [1, 2],
    (1, 2, 3),
    {"a": 1},
    set(),
    slice(0, 5),
    slice(None),
    range(3),
    Opaque(),
    Opaque,
]
OTHERS += [mx.array(1.0), mx.array([1, 2]), np.zeros((2, 2)), np.array(3), mx.float16, mx.int32, print, len]
OTHERS += [Window(), Window(frames=slice(2, 4)), TILES, TilingConfig(), mx.zeros(SHAPE), np.zeros(SHAPE)]
OTHERS += [
    mx.zeros((2, *SHAPE[1:])),
    mx.zeros(SHAPE[1:]),
    mx.zeros((1, 9, 3, 2, 3)),
    mx.zeros(SHAPE, mx.int32),
]
OTHERS += [
    mx.zeros((1, 8, 0, 2, 3)),
    mx.full(SHAPE, float("nan")),
    slice(5, 2),
    slice(0, 9, 2),
    slice("a", None),
]
ODD = [*NUMBERS, *WORDS, *OTHERS]

DECODER = small_decoder("ltx-2.3", base_channels=4)
SHAPE_OF_LATENTS = (1, DECODER.config.latent_channels, 2, 2, 3)


def latents():
    return random_latents(DECODER, *(n for i, n in enumerate(SHAPE_OF_LATENTS) if i != 1))


def decode_frames(folder, **arguments):
    frames = np.concatenate(list(mvt.decode_frames(DECODER, arguments.pop("latents"), **arguments)))
    assert frames.ndim == 4 and frames.dtype in (np.uint8, np.uint16, np.float32)
    return frames


def decode_to_file(folder, **arguments):
    path = folder / "out.npy"
    path.unlink(missing_ok=True)
    mvt.decode_to_file(DECODER, arguments.pop("latents"), arguments.pop("path", path), **arguments)
    return np.load(path) if path.exists() else None


def stream(folder, **arguments):
    return np.array(mx.concatenate(list(DECODER.stream(arguments.pop("latents"), **arguments)), axis=2))


def call(folder, **arguments):
    return np.array(DECODER(arguments.pop("latents"), **arguments))


def blended(folder, **arguments):
    return np.array(mvt.decode_with_tiling(DECODER, **arguments))


def plan(folder, **arguments):
    return str(mvt.plan_decode(DECODER, **arguments))


def limits(folder, **arguments):
    with mvt.memory_limits(**arguments):
        pass


def staged(folder, **arguments):
    given = mvt.DecodingArgs(memory_limit=arguments.pop("memory_limit", None))
    given.pipeline_config.vae_precision = arguments.pop("vae_precision", None)
    return np.array(mvt.DecodingStage(DECODER).decode(arguments.pop("latents"), given))


def plain(function):
    return lambda folder, **arguments: function(**arguments)


OPTIONS = {"causal": None, "timestep": None, "noise_scale": None, "seed": 0, "normalized": True}
PLANNING = {"memory_limit": None, "tiling": None, "window": None, "num_inference_steps": None}
STEPS = {
    "latent_frames_per_step": 1,
    "max_chunk_frames": None,
    "window": None,
    "backend": None,
    "noise": None,
}
TARGETS = {
    decode_frames: {"latents": latents(), **OPTIONS, **PLANNING, "plan": None, "bits": 8, "noise": None},
    decode_to_file: {"latents": latents(), **OPTIONS, **PLANNING, "fps": 24, "codec": None, "quality": None}
    | {"audio": None, "plan": None, "resume": False},
    stream: {"latents": latents(), **OPTIONS, **STEPS, "num_inference_steps": None},
    call: {"latents": latents(), "causal": None, "timestep": None},
    blended: {"latents": latents(), "tiling_config": None, "spatial_scale": 32, "temporal_scale": 8},
    plan: {"latent_shape": SHAPE_OF_LATENTS, **PLANNING, "dtype": None, "backend": None, "causal": None}
    | {"parts": None, "chunk": None},
    limits: {"memory": None, "cache": None},
    staged: {"latents": latents(), "vae_precision": None, "memory_limit": None},
    plain(mvt.load_decoder): {"source": "demo", "dtype": None, "config": None},
    plain(mvt.load_latents): {"path": "demo", "key": None, "latent_size": None, "channels": 128},
    plain(SpatialTilingConfig): {"tile_size_in_pixels": 64, "tile_overlap_in_pixels": 32},
    plain(mvt.TemporalTilingConfig): {"tile_size_in_frames": 16, "tile_overlap_in_frames": 8},
    plain(mvt.split_in_spatial): {"size": 4, "overlap": 1, "dimension_size": 9},
    plain(mvt.split_in_temporal): {"size": 4, "overlap": 1, "dimension_size": 9},
    plain(mvt.compute_trapezoidal_mask_1d): {"length": 9, "ramp_left": 2, "ramp_right": 3},
}
DECIDE_FRAMES = {"latents", "window", "tiling", "causal", "normalized", "bits", "vae_precision", "path"}
"""Others may only be refused, or leave the frames of this decoder as they are."""

ALIASES = {"memory_limit": "memory", "cache": "memory", "latent_frames_per_step": "latent_frames"}
ALIASES["latents"] = "latent"


def cases():
    draw = random.Random(14)
    everything = [(target, name) for target, base in TARGETS.items() for name in base]
    found = [(*draw.choice(everything), draw.choice(ODD)) for _ in range(CALLS)]
    # What names a file is shown as it is, whatever is in it.
    return [case for case in found if case[1:] not in (("source", "a\nb"), ("path", "a\nb"))]


@pytest.mark.parametrize("part", range(4))
def test_odd_arguments(part, tmp_path):
    expected = {}
    for number, (target, name, odd) in enumerate(cases()):
        if number % 4 != part:
            continue
        base = TARGETS[target]
        outcome = bounded(lambda target=target, given={**base, name: odd}: target(tmp_path, **given))
        where = f"{number}: {target.__name__}({name}={odd!r:.60}): {outcome.error!r:.400}"
        outcome.check(where)
        if outcome.error is not None:
            text, value = str(outcome.error), " ".join(repr(odd).split())[:20]
            assert ALIASES.get(name, name) in text or value in text or str(odd)[:20] in text, where
        elif target in (decode_frames, decode_to_file, stream, staged) and name not in DECIDE_FRAMES:
            if target not in expected:
                expected[target] = target(tmp_path, **base)
            assert np.array_equal(outcome.value, expected[target]), where
