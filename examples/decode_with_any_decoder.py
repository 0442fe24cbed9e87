"""Blended tiles over a decoder that is not LTX: any function of latents (B, C, F, H, W).

This one scales space by 8 and time by 4, and blurs, so that tiles without overlap would show seams.

python examples/decode_with_any_decoder.py
"""

import mlx.core as mx

from mlx_vae_tiling import SpatialTilingConfig, TemporalTilingConfig, TilingConfig, iter_decode_with_tiling

SPACE, TIME = 8, 4


def decoder(latents):
    """(B, 3, F, H, W) to (B, 3, 4(F-1)+1, 8H, 8W): repeats every latent, then averages neighbours."""
    x = mx.repeat(mx.repeat(latents, SPACE, axis=3), SPACE, axis=4)
    x = mx.repeat(x, TIME, axis=2)[:, :, TIME - 1 :]
    for axis in (3, 4):
        x = (mx.roll(x, 1, axis) + x + mx.roll(x, -1, axis)) / 3
    return x


def main():
    f, h, w = 9, 20, 32
    ramp = mx.linspace(-1, 1, f * h * w).reshape(1, 1, f, h, w)
    latents = mx.concatenate([ramp, ramp**2, mx.sin(9 * ramp)], axis=1)
    tiles = TilingConfig(SpatialTilingConfig(96, 32), TemporalTilingConfig(16, 8))
    pieces = []
    for piece in iter_decode_with_tiling(decoder, latents, tiles, spatial_scale=SPACE, temporal_scale=TIME):
        print(f"{piece.shape[2]} frames of {piece.shape[4]}x{piece.shape[3]} are finished")
        pieces.append(piece)
    video = mx.concatenate(pieces, axis=2)
    inner = (..., slice(1, -1), slice(1, -1))
    difference = mx.abs(video - decoder(latents))[inner].max().item()
    print(f"largest difference from the decode without tiles: {difference:.3f}")
    return difference


if __name__ == "__main__":
    main()
