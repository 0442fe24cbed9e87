"""A stream equals the whole decode, takes bounded chunks, does its work once and leaves nothing behind."""

import gc
import random
from contextlib import suppress
from functools import lru_cache
from itertools import islice, product, zip_longest

import mlx.core as mx
import pytest
from streaming import held_bytes, state_bytes
from vae_cases import (
    VERSIONS,
    expected_operations,
    joined,
    operations,
    random_latents,
    recording,
    reference_decoder,
    relative_error,
    small_decoder,
)

from mlx_vae_tiling.vae.schedule import Pace

# Of the output's range, in float32. Measured: 0 with NumPy's BLAS; others may sum in another order.
TOLERANCE = 1e-5
SHAPES = [(1, 1, 3, 2), (2, 3, 2, 2), (1, 5, 2, 3)]
PADDINGS = ["zeros", "reflect"]


@lru_cache(maxsize=1)
def whole(version, padding, causal, shape):
    decoder = small_decoder(version, padding)
    latents = random_latents(decoder, *shape)
    video = joined(decoder.stream(latents, latent_frames_per_step=shape[1], causal=causal))
    assert video.shape == decoder.output_shape(latents.shape)
    return decoder, latents, video


def cases():
    """Every version, padding, direction and shape; steps and caps drawn so that all of them occur."""
    draw = random.Random(0)
    for version, padding, causal, shape in product(VERSIONS, PADDINGS, (False, True), SHAPES):
        steps = range(1, shape[1] + 2)
        for step, cap in draw.sample(list(product(steps, (None, 1, 2, 3, 5))), min(shape[1], 2)):
            yield version, padding, causal, shape, step, cap


@pytest.mark.parametrize(("version", "padding", "causal", "shape", "step", "cap"), list(cases()))
def test_stream_equals_whole(version, padding, causal, shape, step, cap):
    decoder, latents, expected = whole(version, padding, causal, shape)
    options = {"latent_frames_per_step": step, "max_chunk_frames": cap, "causal": causal}
    assert relative_error(joined(decoder.stream(latents, **options)), expected) <= TOLERANCE


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_stream_equals_whole_with_every_published_layer(version, step):
    decoder = small_decoder(version, num_layers=None)
    latents = random_latents(decoder, 1, 4, 2, 3)
    expected = decoder(latents)
    assert relative_error(joined(decoder.stream(latents, latent_frames_per_step=step)), expected) <= TOLERANCE


def frames_per_latent(config):
    """Frames that each convolution computes per latent frame."""
    frames, bounds = 1, []
    for layer in config.layers():
        bounds.append(frames)
        frames *= layer.stride[0]
    return bounds


@pytest.mark.parametrize(
    ("version", "causal", "step", "cap"),
    [(v, c, s, m) for v in VERSIONS for c, s, m in [(False, 1, None), (True, 2, None), (False, 2, 3)]],
)
def test_no_chunk_is_larger_than_the_step_asks_for(version, causal, step, cap):
    decoder = small_decoder(version)
    latents = random_latents(decoder, 1, 7, 2, 2)
    bounds = [min(step * frames, cap or 1000) for frames in frames_per_latent(decoder.config)]
    options = {"latent_frames_per_step": step, "max_chunk_frames": cap, "causal": causal}
    backend = recording(decoder)
    for piece in decoder.stream(latents, backend=backend, **options):
        assert piece.shape[2] <= bounds[-1]
    calls = backend.calls
    assert all(call.shape[1] <= bounds[call.layer] for call in calls)
    assert {call.layer for call in calls if call.shape[1] == bounds[call.layer]} == set(range(len(bounds)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_stream_does_the_work_of_the_whole_decode(version, causal):
    decoder, latents, _ = whole(version, "zeros", causal, SHAPES[1])
    counts = []
    for step, cap in [(3, None), (1, None), (2, 3)]:
        options = {"latent_frames_per_step": step, "max_chunk_frames": cap, "causal": causal}
        backend = recording(decoder)
        mx.eval(list(decoder.stream(latents, backend=backend, **options)))
        counts.append(operations(backend.calls))
    assert counts == [expected_operations(decoder.config, latents.shape, causal=causal)] * 3


@pytest.mark.parametrize("version", VERSIONS)
def test_shapes_are_fixed_in_the_steady_state(version):
    decoder = small_decoder(version)
    lag = int(decoder.config.receptive_field[0]) + 1
    latents = random_latents(decoder, 1, lag + 6, 2, 2)
    per_piece, count, backend = [], 0, recording(decoder)
    for piece in decoder.stream(latents, backend=backend):
        del piece
        per_piece.append([(call.layer, call.shape) for call in backend.calls[count:]])
        count = len(backend.calls)
    # The first pieces fill the layers, of which each lags a frame, and the last come from the flush.
    steady = per_piece[2:-lag]
    assert len(steady) == 4 and all(shapes == steady[0] for shapes in steady)
    assert [layer for layer, _ in steady[0]] == list(range(len(list(decoder.config.layers()))))


def active_bytes():
    mx.synchronize()
    return mx.get_active_memory()


@pytest.fixture
def without_collector():
    """Memory has to go by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def interrupt_after(pieces, count):
    for index, piece in enumerate(pieces):
        if index == count:
            raise KeyboardInterrupt
        del piece


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_stream_holds_two_frames_per_convolution(version, causal):
    decoder = small_decoder(version)
    frames = int(2 * decoder.config.receptive_field[0]) + 4
    stream = decoder.open(random_latents(decoder, 2, frames, 2, 3), decoder.options(causal=causal))
    for piece in islice(stream.run(Pace()), 2):
        del piece
    expected = {level: 2 * size for level, size in state_bytes(decoder.config, 2, 3, itemsize=4).items()}
    assert held_bytes(stream) == expected


@pytest.mark.parametrize("pieces_taken", [1, 4])
@pytest.mark.parametrize("version", ["0.9.1", "ltx-2.3"])
@pytest.mark.parametrize("end", ["close", "exception", "exhaustion"])
def test_stream_leaves_no_memory_behind(version, end, pieces_taken, without_collector):
    decoder = small_decoder(version)
    latents = random_latents(decoder, 1, 14, 3, 3)
    mx.eval(latents, decoder.parameters())
    before = active_bytes()
    stream = decoder.stream(latents)
    for piece in islice(stream, pieces_taken):
        del piece
    assert active_bytes() >= before + sum(state_bytes(decoder.config, 3, 3, itemsize=4).values())
    if end == "close":
        stream.close()
    elif end == "exhaustion":
        interrupt_after(stream, 100)
    else:
        with suppress(KeyboardInterrupt):
            interrupt_after(stream, 1)
    del stream
    assert active_bytes() == before


def test_streams_interleave():
    first, second = (small_decoder("0.9.1"), small_decoder("0.9.1"))
    assert first is second
    latents = [random_latents(first, 1, 4, 2, 3, seed) for seed in (0, 1)]
    alone = [joined(first.stream(array, seed=seed)) for seed, array in enumerate(latents)]
    streams = [first.stream(array, seed=seed) for seed, array in enumerate(latents)]
    together = list(zip_longest(*streams))
    for expected, pieces in zip(alone, zip(*together, strict=True), strict=True):
        assert mx.array_equal(joined(pieces), expected)


def test_pieces_outlive_their_stream():
    """A piece that is kept holds itself and nothing that the stream reuses."""
    decoder, latents, expected = whole("ltx-2.3", "zeros", False, SHAPES[1])
    pieces = list(decoder.stream(latents, latent_frames_per_step=2))
    again = list(decoder.stream(latents, latent_frames_per_step=2))
    assert all(mx.array_equal(a, b) for a, b in zip(pieces, again, strict=True))
    assert relative_error(joined(pieces), expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_streams_equal_whole(dtype):
    """Rounding happens per element, so chunks change it by what the convolution's sums differ."""
    decoder = reference_decoder("ltx-2", dtype)
    latents = random_latents(decoder, 1, 3, 2, 3).astype(dtype)
    whole_video, streamed = decoder(latents), joined(decoder.stream(latents))
    assert streamed.dtype == dtype
    assert relative_error(streamed, whole_video) <= 16 * mx.finfo(dtype).eps
