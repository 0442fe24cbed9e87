"""What several machines would compute and send, by the planner: the table of examples/several_machines.md.

Nothing is decoded, and nothing is measured.
"""

import argparse

import mlx.core as mx

from mlx_vae_tiling import plan_decode
from mlx_vae_tiling.runtime.ranks.simulation import simulate
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import NAMES, published_version

SIZES = {"1080p": (16, 34, 60), "4K": (16, 68, 120)}
RANKS = (2, 4, 8)
MEMORY = "1000GB"


def rows(version):
    """A row of the table for each size and number of machines."""
    decoder = build_decoder(published_version(version).config)
    for name, size in SIZES.items():
        shape = (1, decoder.config.latent_channels, *size)
        plan = plan_decode(decoder, shape, memory_limit=MEMORY, dtype=mx.bfloat16, backend="metal")
        for ranks in RANKS:
            found = simulate(decoder, plan, ranks)
            division = found.division
            cuts = [len({part.pixels[axis] for part in division.parts}) for axis in range(3)]
            work = [count / 1e12 for count in division.operations]
            yield (
                name,
                ranks,
                "x".join(map(str, cuts)),
                f"{min(work):.0f} to {max(work):.0f}",
                f"{found.recompute:.2f}",
                f"{found.speedup:.2f}",
                f"{found.peak_bytes[0] / 1e9:.2f}, {max(found.peak_bytes[1:]) / 1e9:.2f}",
                f"{found.sent_bytes / 1e6:.1f}",
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", default="ltx-2.3", choices=NAMES)
    version = parser.parse_args().version
    head = ("output", "machines", "cut (time x rows x columns)", "TFLOP each", "work", "speed at best")
    print("|", " | ".join((*head, "GB rank 0, others", "MB sent per frame")), "|")
    print("|" + " --- |" * 8)
    for row in rows(version):
        print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
