"""Decode a few frames and put them in one picture; the README's is made by the command without arguments.

python examples/contact_sheet.py [LATENTS [VAE [OUT.png]]]
"""

import sys

import numpy as np
from matplotlib.image import imsave

from mlx_vae_tiling import decode_frames, load_decoder, load_latents

COLUMNS, ROWS, SHRINK = 2, 2, 2


def main(latents_file="demo", vae="demo", out="examples/demo.png"):
    pieces = decode_frames(load_decoder(vae), load_latents(latents_file))
    frames = np.concatenate(list(pieces))
    chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS * ROWS).astype(int)]
    count, height, width, _ = chosen.shape
    height, width = height // SHRINK, width // SHRINK
    cropped = chosen[:, : height * SHRINK, : width * SHRINK].astype(np.float32)
    small = cropped.reshape(count, height, SHRINK, width, SHRINK, 3).mean(axis=(2, 4))
    grid = small.reshape(ROWS, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
    imsave(out, grid.reshape(ROWS * height, COLUMNS * width, 3).round().astype(np.uint8))


if __name__ == "__main__":
    main(*sys.argv[1:])
