"""Keys and values of the diffusion decoder's last stage, held between chunks or made anew for each."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from diffusion_cases import small_decoder
from planning import measured_peak
from test_runtime_kinds import DIFFUSION, new_decoder
from vae_cases import joined

from mlx_vae_tiling import DiffusionDecoderConfig, Window, decode_frames, plan_decode
from mlx_vae_tiling.vae.backends import CPU, METAL
from mlx_vae_tiling.vae.transformer import NeighbourhoodAttention

pytestmark = pytest.mark.cpu

ANEW = replace(CPU, makes_keys_anew=True)
LATENTS = (1, 8, 6, 3, 4)
DEEP = replace(
    DIFFUSION, stage_depths=(1, 1, 1, 1, 6), stage_kernels=(*DIFFUSION.stage_kernels[:-1], (11, 3, 3))
)
"""Its last stage holds most, as the published one's does."""


def random_latents(shape=LATENTS):
    return mx.random.normal(shape, key=mx.random.key(0))


@pytest.mark.parametrize(("step", "cap"), [(8, None), (2, 3)])
@pytest.mark.parametrize("window", [Window(), Window(slice(20, 40), slice(40, 90), slice(0, 70))])
def test_they_are_the_same_bytes(window, step, cap):
    decoder, latents = small_decoder(), random_latents()
    options = {"window": window, "num_inference_steps": 2}
    expected = joined(decoder.stream(latents, backend=CPU, **options))
    options |= {"latent_frames_per_step": step, "max_chunk_frames": cap}
    assert mx.array_equal(joined(decoder.stream(latents, backend=ANEW, **options)), expected)


@pytest.mark.parametrize(("dtype", "chunk"), [(mx.float32, (1, None)), (mx.bfloat16, (1, 4))])
def test_predicted_peak(dtype, chunk):
    decoder, latents = new_decoder(DEEP, dtype), random_latents().astype(dtype)
    states = {}
    for backend in (CPU, ANEW):
        opened = backend.opened()
        plan = plan_decode(decoder, LATENTS, memory_limit="1GB", backend=opened, chunk=chunk)
        assert 0.9 <= measured_peak(decoder, latents, plan) / plan.peak_bytes <= 1.1
        assert opened.held_workspace_bytes == plan.workspace_bytes
        states[backend] = plan.state_bytes
    assert states[ANEW] < 0.6 * states[CPU]


@pytest.mark.parametrize(("frames", "step", "cap"), [(9, 1, None), (20, 1, None), (20, 2, 5), (9, 11, None)])
def test_the_work_of_making_them_is_counted(frames, step, cap, monkeypatch):
    decoder, shape = new_decoder(DIFFUSION), (1, 8, frames, 2, 2)
    made, original = [], NeighbourhoodAttention.keys_and_values

    def counting(self, x, region, backend):
        made.append(region.volume * (self is decoder.diff_blocks[0].attn))
        return original(self, x, region, backend)

    monkeypatch.setattr(NeighbourhoodAttention, "keys_and_values", counting)
    operations = {}
    for backend in (CPU, ANEW):
        made.clear()
        options = {"latent_frames_per_step": step, "max_chunk_frames": cap, "backend": backend}
        for piece in decoder.stream(random_latents(shape), **options):
            del piece
        plan = plan_decode(decoder, shape, memory_limit="1GB", backend=backend, chunk=(step, cap))
        operations[backend] = plan.operations, sum(made)
    (held, once), (anew, often) = operations[CPU], operations[ANEW]
    assert anew - held == 4 * DIFFUSION.stage_channels[-1] ** 2 * (often - once)
    assert (anew > held) == (step < frames)


def test_they_are_made_anew_where_that_is_expected_to_be_faster():
    """In half of the windows that held ones take; with as many windows or one less it is not."""
    config, shape = DiffusionDecoderConfig(), (1, 128, 16, 34, 60)
    plans = {}
    for limit in ("24GB", "20GB", "9.95GB", "8GB"):
        held = plan_decode(config, shape, memory_limit=limit, backend=METAL)
        plans[limit] = plan_decode(config, shape, memory_limit=limit, backend="metal")
        assert plans[limit].fits
        if limit != "9.95GB":
            assert plans[limit] == held
    assert plans["9.95GB"].backend.makes_keys_anew and "made anew" in str(plans["9.95GB"])
    assert (len(plans["9.95GB"].parts), len(plans["8GB"].parts)) == (2, 4)
    assert plans["9.95GB"].operations < plans["8GB"].operations


def test_a_plan_that_makes_them_anew_is_carried_out():
    decoder, latents = new_decoder(DEEP), random_latents()
    limit = plan_decode(decoder, LATENTS, memory_limit="1GB", backend=ANEW, chunk=(1, 1)).peak_bytes - 1
    plan = plan_decode(decoder, LATENTS, memory_limit=limit, backend=ANEW)
    assert plan.fits and plan.backend.makes_keys_anew and len(plan.parts) > 1
    expected = np.concatenate(list(decode_frames(decoder, latents, memory_limit="1GB")))
    assert np.array_equal(np.concatenate(list(decode_frames(decoder, latents, plan=plan))), expected)
