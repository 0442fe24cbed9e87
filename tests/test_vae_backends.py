"""The policies that only a GPU has, run on the CPU: they give the same frames."""

from concurrent.futures import ThreadPoolExecutor

import diffusion_cases
import mlx.core as mx
import pytest
import tiny_cases
from mlx.utils import tree_flatten
from vae_cases import VERSIONS, joined, made_and_taken, random_latents, small_decoder

from mlx_vae_tiling.vae.backend import Where
from mlx_vae_tiling.vae.backends import CPU, CUDA, METAL, backend_of, current_backend
from mlx_vae_tiling.vae.layers import DepthToSpaceUpsample
from mlx_vae_tiling.vae.regions import Region, Span
from mlx_vae_tiling.vae.schedule import Pace

GPUS = [METAL, CUDA]


@pytest.mark.parametrize("backend", GPUS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_gpu_policies_give_the_same_frames(version, causal, backend):
    small = small_decoder(version)
    latents = random_latents(small, 1, 3, 2, 3)
    streamed = joined(small.stream(latents, latent_frames_per_step=1, causal=causal, backend=backend))
    whole = small(latents, causal=causal)
    assert mx.abs(streamed - whole).max().item() <= 1e-5 * (whole.max() - whole.min()).item()


def test_default_forms():
    for backend, form in ((METAL, "folded"), (CUDA, "stock")):
        assert all(backend.default_form(dtype) == form for dtype in (mx.float32, mx.float16, mx.bfloat16))


@pytest.mark.parametrize(("system", "form"), [("Linux", "numpy"), ("Darwin", "blocked")])
def test_default_form_on_the_cpu(system, form, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: system)
    assert all(CPU.default_form(dtype) == form for dtype in (mx.float32, mx.float16, mx.bfloat16))


@pytest.mark.parametrize(
    ("device", "metal", "backend"), [(mx.gpu, True, METAL), (mx.gpu, False, CUDA), (mx.cpu, True, CPU)]
)
def test_the_default_backend_is_that_of_the_default_device(device, metal, backend, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert current_backend() is backend is backend_of(None)


def test_backends_by_name():
    assert [backend_of(name) for name in ("cpu", "metal", "cuda")] == [CPU, METAL, CUDA]
    with pytest.raises(ValueError, match="backend must be one of cpu, metal, cuda, got 'tpu'"):
        backend_of("tpu")


def test_a_stream_on_cuda_is_one_piece_ahead():
    """The next piece is already computing while the consumer has the last one, and no further."""
    scheduled = []
    small = small_decoder("ltx-2.3")
    stream = small.open(random_latents(small, 1, 9, 1, 1), small.options(), backend=CUDA)
    carry_out = stream.carry_out

    def spy(event):
        frames = carry_out(event)
        scheduled.extend([1] * len(frames))
        return frames

    stream.carry_out = spy
    for received, _ in enumerate(stream.run(Pace()), 1):
        assert len(scheduled) in (received, received + 1)
    assert received == len(scheduled) > 2


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("version", ["0.9.1", "ltx-2.3"])
def test_a_stream_of_one_thread_is_consumed_in_another(version, tiled):
    """Latents, weights and timestep embeddings are not left for the thread that began to compute."""
    small = small_decoder(version)
    small.load_weights([(name, value + 0) for name, value in tree_flatten(small.parameters())])
    latents = random_latents(small, 1, 2, 2, 3)
    pieces = (small.stream_tiled if tiled else small.stream)(latents + 0)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(list, pieces).result()
    assert mx.array_equal(joined(received), joined((small.stream_tiled if tiled else small.stream)(latents)))


@pytest.mark.cpu
@pytest.mark.parametrize("version", ["ltx-2", "0.9.0"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(0, 17), (3, 12)], ids=["all", "cut"])
def test_an_upsampling_on_the_cpu_takes_what_is_said(version, dtype, window):
    """With and without a residual; a window keeps a copy of a part."""
    decoder = small_decoder(version, base_channels=16)
    steps = decoder.steps(decoder.options())
    (*_, step) = (s for s in steps if isinstance(getattr(s.compute, "__self__", None), DepthToSpaceUpsample))
    start, stop = window
    output = Region(Span(start, stop, 17), *(Span(3 * start, 64 - 3 * start, 64) for _ in range(2)))
    inputs = tuple(need.before(output) for _, need in step.reads)
    where = Where(inputs, output, 1, dtype, CPU.opened())
    given = [
        mx.ones((1, *(span.length for span in part), steps[read.producer].channels), dtype)
        for part, read in zip(inputs, step.reads, strict=True)
    ]
    made, taken = made_and_taken(step, given, where)
    assert made.shape[1:4] == tuple(span.length for span in output)
    assert taken == pytest.approx(step.taken(where).nbytes, rel=0.02)


KINDS = {
    "convolutional": lambda: small_decoder("ltx-2.3"),
    "diffusion": diffusion_cases.small_decoder,
    "tiny": lambda: tiny_cases.reference_decoder(tiny_cases.NAMES[0]),
}


@pytest.mark.cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(0, 128), (3, 64)], ids=["all", "cut"])
def test_the_last_step_on_the_cpu_takes_what_is_said(kind, dtype, window):
    """A window that cuts patches keeps a copy of a part; float32 frames of half precision are another."""
    decoder = KINDS[kind]()
    step = decoder.steps(decoder.options(), mx.float32)[-1]
    output = Region(Span(1, 9, 17), Span(*window, 128), Span(*window, 128))
    inputs = tuple(need.before(output) for _, need in step.reads)
    where = Where(inputs, output, 1, dtype, CPU.opened())
    patches = mx.ones((1, *(span.length for span in inputs[0]), 3 * decoder.config.patch_size**2), dtype)
    made, taken = made_and_taken(step, [patches], where)
    assert made.shape[2:] == tuple(span.length for span in output) and made.dtype == mx.float32
    said = step.taken(where).nbytes
    assert taken <= 1.02 * said
    # Of three arrays or more, the first goes before the last is there, or not, as threads have it.
    if dtype == mx.float32 and (kind != "tiny" or window == (0, 128)):
        assert taken >= 0.98 * said
