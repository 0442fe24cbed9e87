"""`mlx-vae-tiling plan`: what a decode will take; and the arguments that `decode` shares."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.cli.options import SOURCE, parse_config, parse_size, parse_tiling, parse_window
from mlx_vae_tiling.cli.printing import plan_fields, plan_text, print_error, print_result
from mlx_vae_tiling.dtypes import FLOAT_TYPES, parse_dtype
from mlx_vae_tiling.media.latents import SavedLatents, read_latents
from mlx_vae_tiling.runtime.planning.forms import expected_seconds
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import plan_decode
from mlx_vae_tiling.runtime.ranks.simulation import require_divisible, simulate
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.config import Config
from mlx_vae_tiling.vae.published import NAMES, AnyConfig, published_version

PURPOSE = "say what a decode will take, without decoding"
EXAMPLES = """
  mlx-vae-tiling plan demo --vae demo --memory 400MB
  mlx-vae-tiling plan --shape 16x34x60 --vae ltx-2.3 --memory 8GB   (121 frames of 1920x1088)
  mlx-vae-tiling plan shot.safetensors --vae ltx-2.3-vae.safetensors --json

exit status: 0, or 1 where no plan fits in the memory"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of this command alone."""
    command.add_argument("latents", nargs="?", metavar="LATENTS", help='saved latents, or "demo"')
    command.add_argument("--shape", metavar="FxHxW", help="size in latents, in their place")
    command.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="also how N machines like this one would share it: counted only",
    )
    add_planning(command)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status."""
    if args.vae in NAMES and not Path(args.vae).exists():
        config, stored = published_version(args.vae).config, "bfloat16"
    else:
        info = describe_checkpoint(args.vae, config=parse_config(args.config))
        config, stored = info.config, info.dtype
    size = parse_size("--shape", args.shape)
    if (args.latents is None) == (size is None):
        raise ValueError("a plan is for LATENTS or for --shape FxHxW, give one of them")
    shape = (1, config.latent_channels, *size) if size else read_given_latents(args, config).latents.shape
    plan = plan_for(args, config, shape, parse_dtype(args.dtype or stored))
    decoder = build_decoder(config)
    seconds = expected_seconds(decoder, plan)
    text, fields = plan_text(plan, seconds), {**plan_fields(plan), "seconds": seconds}
    if args.ranks is not None:
        require_divisible(plan, args.ranks)
    try:
        if args.ranks is not None:
            divided = simulate(decoder, plan, args.ranks)
            text, fields = f"{text}\n\n{divided}", {**fields, "divided": divided.fields}
        else:
            plan.require_fit()
    except ValueError as error:
        print_result(args, text, fields)
        print_error(str(error))
        return 1
    print_result(args, text, fields)
    return 0


def add_planning(command: argparse.ArgumentParser, required: bool = True) -> None:
    """Declares the arguments that a plan needs, for `plan` and for `decode`."""
    add = command.add_argument
    add("--vae", required=required, metavar="SOURCE", help=f"{SOURCE}; versions: {', '.join(NAMES)}")
    add("--memory", metavar="BYTES", help="budget, as 8GB or 6.5GiB; default: 70 %% of what is available")
    add(
        "--tiling",
        default="none",
        metavar="KIND",
        help="none: exact, the default; default, aggressive, "
        "conservative, auto: blended tiles; a number: windows that see this many latents around them",
    )
    add("--no-tune", action="store_true", help="measure no form of convolution, and take none for that")
    add("--frames", metavar="A:B", help="only frames A to B-1; A or B may be left out")
    add("--crop", metavar="TOP:BOTTOM,LEFT:RIGHT", help="only these rows and columns of pixels")
    add("--dtype", choices=[kind.name for kind in FLOAT_TYPES], help="of the weights; default: as stored")
    add("--key", help="which tensor of LATENTS, where it holds several")
    add("--latent-size", metavar="FxHxW", help="of packed latents (B, F*H*W, C)")


def read_given_latents(args: argparse.Namespace, config: Config) -> SavedLatents:
    """Reads LATENTS as the arguments say."""
    size = parse_size("--latent-size", args.latent_size)
    return read_latents(args.latents, key=args.key, latent_size=size, channels=config.latent_channels)


def plan_for(
    args: argparse.Namespace,
    decoder: StreamingDecoder | AnyConfig,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    inference_steps: int | None = None,
    planner: Callable[..., DecodePlan] = plan_decode,
) -> DecodePlan:
    """Plans a decode as the arguments say."""
    config = decoder.config if isinstance(decoder, StreamingDecoder) else decoder
    return planner(
        decoder,
        shape,
        memory_limit=args.memory,
        dtype=dtype,
        tiling=parse_tiling(args.tiling, config, shape),
        window=parse_window(args.frames, args.crop),
        no_tune=args.no_tune,
        num_inference_steps=inference_steps,
    )
