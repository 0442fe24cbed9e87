"""Where the processor's time goes in a decode on the CPU: convolutions, what they read, kernels, the rest.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/profile_decode.py --version ltx-2 --latents 5x8x12

One thread, full width, random weights. A part counts what it calls, too.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_vae_tiling import decode_frames
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.cpu import CPUBackend
from mlx_vae_tiling.vae.kernels import winograd
from mlx_vae_tiling.vae.kernels.rows import Rows
from mlx_vae_tiling.vae.published import published_version

PARTS = (
    (CPUBackend, "convolution", "convolutions"),
    (Rows, "read", "  of which norm, SiLU and padding"),
    (winograd, "transform", "  of which kernels transformed"),
    (CPUBackend, "upsample", "channels to positions"),
)


def timed(function: Callable[..., Any], name: str, seconds: Counter[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.process_time() - start

    return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", default="ltx-2")
    parser.add_argument("--latents", default="5x8x12", help="frames x height x width")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    mx.set_default_device(mx.cpu)
    seconds: Counter[str] = Counter()
    for owner, attribute, name in PARTS:
        setattr(owner, attribute, timed(getattr(owner, attribute), name, seconds))
    decoder = build_decoder(published_version(args.version).config).init_random()
    size = [int(number) for number in args.latents.split("x")]
    latents = mx.random.normal([1, decoder.config.latent_channels, *size], key=mx.random.key(1))
    mx.eval(latents, decoder.parameters())
    start = time.process_time()
    for _ in decode_frames(decoder, latents):
        pass
    total = time.process_time() - start
    print(f"{args.version}, {args.latents}: {total:.1f} processor seconds")
    for _, _, name in PARTS:
        print(f"{name:36} {seconds[name]:6.2f} s  {seconds[name] / total:6.1%}")


if __name__ == "__main__":
    main()
