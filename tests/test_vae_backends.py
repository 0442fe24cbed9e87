"""The paths that only a GPU takes, run on the CPU: they give the same frames."""

import mlx.core as mx
import pytest
from vae_cases import VERSIONS, joined, random_latents, small_decoder

from mlx_vae_tiling.vae import convolution, decoder, layers


@pytest.fixture(params=["metal", "cuda"])
def gpu_backend(request, monkeypatch):
    for module in (convolution, decoder, layers):
        monkeypatch.setattr(module, "current_backend", lambda: request.param)
    return request.param


@pytest.mark.parametrize("version", VERSIONS)
def test_gpu_paths_give_the_same_frames(version, gpu_backend, monkeypatch):
    small = small_decoder(version)
    latents = random_latents(small, 1, 3, 2, 3)
    streamed = joined(small.stream(latents, latent_frames_per_step=1))
    monkeypatch.undo()
    whole = small(latents)
    assert mx.abs(streamed - whole).max().item() <= 1e-5 * (whole.max() - whole.min()).item()


def test_default_forms(gpu_backend):
    half = "folded" if gpu_backend == "metal" else "stock"
    assert convolution.default_form(mx.bfloat16) == convolution.default_form(mx.float16) == half
    assert convolution.default_form(mx.float32) == "stock"


def test_a_gpu_stream_is_one_piece_ahead(gpu_backend, monkeypatch):
    """The next piece is already computing while the consumer has the last one, and no further."""
    scheduled = []
    small = small_decoder("ltx-2.3")
    unpatchify = decoder.unpatchify
    monkeypatch.setattr(decoder, "unpatchify", lambda *given: scheduled.append(1) or unpatchify(*given))
    pieces = small.stream(random_latents(small, 1, 9, 1, 1))
    for received, _ in enumerate(pieces, 1):
        assert len(scheduled) in (received, received + 1)
    assert received == len(scheduled) > 2
