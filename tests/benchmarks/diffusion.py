"""The full-width diffusion decoder decodes a small latent on the CPU: whole, streamed, and both compared.

    python tests/benchmarks/diffusion.py --latent-frames 2 --height 7 --width 7

Prints seconds, those of processor time, and the peak of MLX's memory, beside the plan. Weights are random:
the frames show nothing, but are those of 417 million parameters.
"""

from __future__ import annotations

import argparse
import time

import mlx.core as mx

from mlx_vae_tiling import plan_decode
from mlx_vae_tiling.vae.diffusion import DiffusionDecoder
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent-frames", type=int, default=2)
    parser.add_argument("--height", type=int, default=7, help="in latents")
    parser.add_argument("--width", type=int, default=7, help="in latents")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(0)
    decoder = DiffusionDecoder(DiffusionDecoderConfig())
    decoder.set_dtype(DTYPES[arguments.dtype])
    decoder.init_random()
    shape = (1, 128, arguments.latent_frames, arguments.height, arguments.width)
    latents = mx.random.normal(shape, key=mx.random.key(1)).astype(decoder.dtype)
    mx.eval(latents, decoder.parameters())
    plan = plan_decode(decoder, shape, memory_limit="16GB", backend="cpu")
    print(plan)
    decoded = {}
    for name, frames in (("whole", shape[2]), ("streamed", 1)):
        mx.reset_peak_memory()
        start, busy = time.perf_counter(), time.process_time()
        pieces = list(decoder.stream(latents, latent_frames_per_step=frames, backend="cpu"))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        peak = mx.get_peak_memory() / 1e9
        decoded[name] = mx.concatenate(pieces, axis=2)
        print(
            f"{name:9} {decoded[name].shape}: {seconds:.1f} s, {busy:.1f} core seconds, peak {peak:.2f} GB",
            flush=True,
        )
    finite = mx.isfinite(decoded["whole"]).all().item()
    print("finite:", finite, "| same bytes:", mx.array_equal(decoded["whole"], decoded["streamed"]).item())


if __name__ == "__main__":
    main()
