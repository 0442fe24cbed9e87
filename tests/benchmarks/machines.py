"""What several machines would compute and send, by the planner: the table of examples/several_machines.md.

Nothing is decoded, and nothing is measured.
"""

import argparse

import mlx.core as mx

from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.planning.grids import part_around
from mlx_vae_tiling.runtime.ranks.shares import divide
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import NAMES, published_version
from mlx_vae_tiling.vae.regions import Window

SIZES = {"1080p": (16, 34, 60), "4K": (16, 68, 120)}
RANKS = (2, 4, 8)
PLENTY = 10**12


def rows(version):
    """A row of the table for each size and number of machines."""
    decoder = build_decoder(published_version(version).config)
    for name, size in SIZES.items():
        shape = (1, decoder.config.latent_channels, *size)
        model = CostModel(decoder, shape, mx.bfloat16, decoder.policy("metal"))
        output = Window().region(*decoder.output_shape(shape)[2:])
        once = model.operations(part_around(model, output, None))
        for ranks in RANKS:
            division = divide(model, output, [PLENTY] * ranks)
            sent = sum(
                3 * part.pixels.volume
                for part, owner in zip(division.parts, division.owners, strict=True)
                if owner
            )
            cuts = [len({part.pixels[axis] for part in division.parts}) for axis in range(3)]
            work = [count / 1e12 for count in division.operations]
            yield (
                name,
                ranks,
                "x".join(map(str, cuts)),
                f"{min(work):.0f} to {max(work):.0f}",
                f"{sum(division.operations) / once:.2f}",
                f"{once / division.most:.2f}",
                f"{max(model.cost(part, 1, None).total for part in division.parts) / 1e9:.2f}",
                f"{sent / output.time.length / 1e6:.1f}",
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", default="ltx-2.3", choices=NAMES)
    version = parser.parse_args().version
    head = ("output", "machines", "cut (time x rows x columns)", "TFLOP each", "work", "speed at best")
    print("|", " | ".join((*head, "GB each beside weights", "MB sent per frame")), "|")
    print("|" + " --- |" * 8)
    for row in rows(version):
        print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
