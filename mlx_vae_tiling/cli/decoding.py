"""What commands that decode have in common: the options of a decode, its decoder and its latents."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.cli.fetch import locate_aloud
from mlx_vae_tiling.cli.options import parse_config
from mlx_vae_tiling.cli.plan import read_given_latents
from mlx_vae_tiling.cli.printing import print_warning
from mlx_vae_tiling.media.latents import SavedLatents, looks_denormalized
from mlx_vae_tiling.vae.base import StreamingDecoder


def add_decoding(command: argparse.ArgumentParser) -> None:
    """Declares the options that frames depend on."""
    add = command.add_argument
    add("--timestep", type=float, help="of versions with timestep conditioning; default 0.05")
    add("--noise-scale", type=float, help="noise in the latents of those versions, 0 to 1; default 0.025")
    add("--seed", type=int, default=0, help="of that noise, and of a diffusion decoder's; default 0")
    add(
        "--steps", type=int, metavar="N", help="denoising steps of a diffusion decoder; default: its config's"
    )
    add(
        "--denormalized", action="store_true", help="LATENTS were denormalized, as by diffusers' LTX2Pipeline"
    )


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `decode_frames` takes of them."""
    return {
        "timestep": args.timestep,
        "noise_scale": args.noise_scale,
        "seed": args.seed,
        "normalized": not args.denormalized,
        "num_inference_steps": args.steps,
    }


def given_decoder(args: argparse.Namespace) -> StreamingDecoder:
    """Loads the decoder of --vae."""
    source = locate_aloud(args.vae, args.quiet)
    return load_decoder(source, dtype=args.dtype, config=parse_config(args.config))


def latents_for(args: argparse.Namespace, decoder: StreamingDecoder) -> SavedLatents:
    """Reads LATENTS, and warns of what does not seem to fit the decoder."""
    for name in ("timestep", "noise_scale"):
        if getattr(args, name) is not None and not getattr(decoder.config, "timestep_conditioning", True):
            option = name.replace("_", "-")
            print_warning(f"--{option} does nothing: this decoder is not conditioned on a timestep")
    saved = read_given_latents(args, decoder.config)
    statistics = getattr(decoder, "per_channel_statistics", None)
    if (
        statistics is not None
        and not args.denormalized
        and looks_denormalized(saved.latents, statistics.mean, statistics.std)
    ):
        print_warning("the latents look denormalized; if the video comes out wrong, pass --denormalized")
    return saved
