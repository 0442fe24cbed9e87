"""Blended tiles: `decode_with_tiling` and its iterator beside the classic two-buffer method."""

import mlx.core as mx
from classic_tiling import classic_decode
from common import measure, parse_quick, print_ratios

from mlx_vae_tiling import TilingConfig, decode_with_tiling, iter_decode_with_tiling


def upscale(tile: mx.array) -> mx.array:
    """A decoder function that costs little, so that the blending shows."""
    return mx.repeat(mx.repeat(mx.repeat(tile[:, :3], 8, 2)[:, :, 7:], 32, 3), 32, 4)


def main() -> None:
    """Measure each method on the same latents and print the ratios."""
    latent_frames, side = (9, 10) if parse_quick(__doc__) else (16, 12)
    latents = mx.random.normal((1, 4, latent_frames, side, side), key=mx.random.key(0))
    config = TilingConfig.aggressive()
    rows = {
        "classic two buffers": measure(lambda: mx.eval(classic_decode(upscale, latents, config)), 3),
        "decode_with_tiling": measure(lambda: mx.eval(decode_with_tiling(upscale, latents, config)), 3),
        "iter_decode_with_tiling": measure(
            lambda: _drain(iter_decode_with_tiling(upscale, latents, config)), 3
        ),
    }
    frames, pixels = 1 + (latent_frames - 1) * 8, 32 * side
    print_ratios(f"Blending {frames} frames of {pixels}x{pixels}, tiles of 256/64 px and 32/8 frames", rows)


def _drain(pieces):
    for piece in pieces:
        del piece


if __name__ == "__main__":
    main()
