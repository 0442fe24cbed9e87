"""What each rank of the tests runs: a small decode, as the JSON arguments say."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_vae_tiling
from mlx_vae_tiling import VideoDecoder, Window, decode_frames, decode_to_file, plan_decode
from mlx_vae_tiling.runtime import job
from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.ranks.shares import divide
from mlx_vae_tiling.vae.blocks import ResBlocks
from mlx_vae_tiling.vae.published import PUBLISHED

WINDOWS = {"whole": None, "part": Window(slice(3, 15), slice(9, 90), slice(1, 120))}


def decoder_of(settings):
    config = PUBLISHED["ltx-2.3"].config
    blocks = (replace(b, num_layers=1) if isinstance(b, ResBlocks) else b for b in config.decoder_blocks)
    config = replace(config, decoder_blocks=tuple(blocks), base_channels=settings["width"], latent_channels=8)
    decoder = VideoDecoder(config).init_random(seed=settings.get("weights", 1))
    decoder.set_dtype(getattr(mx, settings["dtype"]))
    return decoder


def latents_of(settings):
    size = settings["size"]
    latents = mx.random.normal((1, 8, *size), key=mx.random.key(settings.get("latents", 0)))
    if settings.get("bad"):
        latents[:, :, 1] = float("nan")
    return latents.astype(getattr(mx, settings["dtype"]))


def plan_alone(decoder, latents, ranks, **planning):
    """The plan of one process for the windows of so many ranks."""
    plan = plan_decode(decoder, latents.shape, **planning)
    model = CostModel(decoder, latents.shape, decoder.dtype, plan.backend)
    parts = divide(model, plan.output, [plan.memory_limit] * ranks).parts
    return plan_decode(decoder, latents.shape, parts=parts, **planning)


def fail_after(pieces):
    """From then on, nothing that this rank computes can be used."""
    finish = job.finish
    counts = itertools.count()

    def failing(piece, kind):
        frames, faults = finish(piece, kind)
        return frames, [(0, "not finite")] if next(counts) >= pieces else faults

    job.finish = failing


def main():
    settings = {}
    for text in sys.argv[1:]:
        settings |= json.loads(text)
    if "version" in settings:
        mlx_vae_tiling.__version__ = settings["version"]
    if "fails_after" in settings:
        fail_after(settings["fails_after"])
    decoder, latents = decoder_of(settings), latents_of(settings)
    options = {
        "memory_limit": settings.get("memory", "2GB"),
        "window": WINDOWS[settings.get("window", "whole")],
    }
    group = None
    if "windows_of" in settings:
        if settings["windows_of"] > 1:
            options = {"plan": plan_alone(decoder, latents, settings["windows_of"], **options)}
    else:
        group = mx.distributed.init(strict=True, backend="ring")
    output = Path(settings["output"])
    if settings.get("frames"):
        pieces = list(decode_frames(decoder, latents, bits=settings.get("bits", 8), group=group, **options))
        if group is None or group.rank() == 0:
            np.save(output, np.concatenate(pieces))
        else:
            assert not pieces
    else:
        decode_to_file(
            decoder, latents, output, fps=4, group=group, resume=settings.get("resume", False), **options
        )


if __name__ == "__main__":
    main()
