"""The command `mlx-vae-tiling`: decode saved latents, plan a decode, describe a checkpoint.

Results go to stdout, progress and warnings to stderr. Exit status: 0; 1 from `plan` where nothing fits; 2
after one line that says what is wrong; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from mlx_vae_tiling import __version__
from mlx_vae_tiling.media.latents import SavedLatents, looks_denormalized, read_latents
from mlx_vae_tiling.runtime.describe import checkpoint_fields, checkpoint_text, plan_fields, report_fields
from mlx_vae_tiling.runtime.plan import DecodePlan, plan_decode
from mlx_vae_tiling.runtime.run import decode_to_file, kept_frames
from mlx_vae_tiling.runtime.words import VERSIONS, parse_config, parse_size, parse_tiling, parse_window
from mlx_vae_tiling.vae.checkpoint import describe_checkpoint, load_decoder
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import PUBLISHED

NAME = "mlx-vae-tiling"
SOURCE = 'VAE: a file, a directory, owner/name on the Hugging Face Hub, or "demo"'
EXAMPLES = {
    "decode": """
  mlx-vae-tiling decode demo --vae demo -o demo.mp4
  mlx-vae-tiling decode shot.safetensors --vae ltx-2.3-vae.safetensors -o shot.mp4 --memory 8GB
  mlx-vae-tiling decode shot.latent --vae Kijai/LTX2.3_comfy -o shot.mov --fps 24000/1001
  mlx-vae-tiling decode shot.npy --vae ltx-2-vae/ -o part.npy --frames 24:48 --crop 0:256,128:384
  mlx-vae-tiling decode packed.pt --vae vae.safetensors -o frames/ --latent-size 16x17x30""",
    "plan": """
  mlx-vae-tiling plan demo --vae demo --memory 400MB
  mlx-vae-tiling plan --shape 16x34x60 --vae ltx-2.3 --memory 8GB   (121 frames of 1920x1088)
  mlx-vae-tiling plan shot.safetensors --vae ltx-2.3-vae.safetensors --json

exit status: 0, or 1 where no plan fits in the memory""",
    "info": """
  mlx-vae-tiling info demo
  mlx-vae-tiling info ltx-2-19b-dev.safetensors --json
  mlx-vae-tiling info vae/ --config ltx-2""",
}


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; None for those of the process.

    Returns:
        The exit status.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted{_kept(args) or ', nothing was kept'}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        kept = "" if isinstance(error, (ValueError, FileExistsError)) else _kept(args)
        print(f"{NAME}: error: {_one_line(error)}{kept}", file=sys.stderr)
        return 2


def _decode(args: argparse.Namespace) -> int:
    decoder = load_decoder(args.vae, dtype=args.dtype, config=parse_config(args.config))
    saved = _read_latents(args, decoder.config)
    statistics = decoder.per_channel_statistics
    if not args.denormalized and looks_denormalized(saved.latents, statistics.mean, statistics.std):
        _warn("the latents look denormalized; if the video comes out wrong, pass --denormalized")
    plan = _plan_for(args, decoder, saved.latents.shape, decoder.dtype)
    if not args.quiet:
        print(plan, file=sys.stderr)
    plan.require_fit()
    report = decode_to_file(
        decoder,
        saved.latents,
        args.output,
        fps=args.fps or saved.fps or 24,
        resume=args.resume,
        codec=args.codec,
        quality=args.quality,
        plan=plan,
        timestep=args.timestep,
        noise_scale=args.noise_scale,
        seed=args.seed,
        normalized=not args.denormalized,
        progress=not args.quiet,
    )
    _print(args, report, report_fields(report))
    return 0


def _plan(args: argparse.Namespace) -> int:
    if args.vae in VERSIONS and not Path(args.vae).exists():
        config, stored = PUBLISHED[VERSIONS[args.vae]], "bfloat16"
    else:
        info = describe_checkpoint(args.vae, config=parse_config(args.config))
        config, stored = info.config, info.dtype
    size = parse_size("--shape", args.shape)
    if (args.latents is None) == (size is None):
        raise ValueError("a plan is for LATENTS or for --shape FxHxW, give one of them")
    shape = (1, config.latent_channels, *size) if size else _read_latents(args, config).latents.shape
    plan = _plan_for(args, config, shape, getattr(mx, args.dtype or stored))
    _print(args, plan, plan_fields(plan))
    try:
        plan.require_fit()
    except ValueError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _info(args: argparse.Namespace) -> int:
    info = describe_checkpoint(args.source, config=parse_config(args.config))
    _print(args, checkpoint_text(info), checkpoint_fields(info))
    return 0


def _read_latents(args: argparse.Namespace, config: DecoderConfig) -> SavedLatents:
    size = parse_size("--latent-size", args.latent_size)
    return read_latents(args.latents, key=args.key, latent_size=size, channels=config.latent_channels)


def _plan_for(
    args: argparse.Namespace, decoder: VideoDecoder | DecoderConfig, shape: tuple[int, ...], dtype: mx.Dtype
) -> DecodePlan:
    config = decoder if isinstance(decoder, DecoderConfig) else decoder.config
    return plan_decode(
        decoder,
        shape,
        memory_limit=args.memory,
        dtype=dtype,
        tiling=parse_tiling(args.tiling, config, shape),
        window=parse_window(args.frames, args.crop),
    )


def _print(args: argparse.Namespace, text: object, fields: dict[str, Any]) -> None:
    print(json.dumps(fields, indent=1) if args.json else text)


def _warn(text: str) -> None:
    print(f"{NAME}: warning: {text}", file=sys.stderr)


def _kept(args: argparse.Namespace) -> str:
    """What of a decode that ended early can be resumed."""
    kept = kept_frames(args.output) if "output" in args else None
    return f"; {kept[1]:.0%} of the decode is kept in {kept[0]}, --resume continues it" if kept else ""


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, ImportError, ArithmeticError)
    return text if isinstance(error, expected) else f"{type(error).__name__}: {text}; --debug says where"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(NAME, description="Decode LTX video latents with MLX, exactly, within a memory budget.")
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for run, name, purpose in (
        (_decode, "decode", "decode saved latents to a video, an image sequence or an array"),
        (_plan, "plan", "say what a decode will take, without decoding"),
        (_info, "info", "say what a checkpoint holds, from its header alone"),
    ):
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        if run == _decode:
            _add_decoding(command)
        elif run == _plan:
            command.add_argument("latents", nargs="?", metavar="LATENTS", help='saved latents, or "demo"')
            command.add_argument("--shape", metavar="FxHxW", help="size in latents, in their place")
        if run == _info:
            command.add_argument("source", metavar="SOURCE", help=SOURCE)
        else:
            _add_planning(command, named="" if run == _decode else f", or one of {', '.join(VERSIONS)}")
        command.add_argument(
            "--config",
            help=f"for a VAE that tells no version: {', '.join(VERSIONS)}, or its config in a .json file",
        )
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_decoding(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("latents", metavar="LATENTS", help='.safetensors, .latent, .npy, .npz or .pt, or "demo"')
    add(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help=".mp4, .mov, .npy, frame_%%05d.png, or frames/ for PNG",
    )
    add("--fps", help="frames per second, also as 24000/1001; default: what LATENTS says, or 24")
    add("--codec", help="h264 (.mp4), hevc, or prores (.mov)")
    add("--quality", type=float, help="of h264 and hevc: 1, best, to 51; default 18")
    add("--timestep", type=float, help="of versions with timestep conditioning; default 0.05")
    add("--noise-scale", type=float, help="noise in the latents of those versions, 0 to 1; default 0.025")
    add("--seed", type=int, default=0, help="of that noise; default 0")
    add(
        "--denormalized", action="store_true", help="LATENTS were denormalized, as by diffusers' LTX2Pipeline"
    )
    add("--resume", action="store_true", help="continue a decode that ended early, from OUT.partial")
    add("-q", "--quiet", action="store_true", help="no plan and no progress on stderr")


def _add_planning(command: argparse.ArgumentParser, named: str) -> None:
    add = command.add_argument
    add("--vae", required=True, metavar="SOURCE", help=SOURCE + named)
    add("--memory", metavar="BYTES", help="budget, as 8GB or 6.5GiB; default: 70 %% of what is available")
    add(
        "--tiling",
        default="none",
        metavar="KIND",
        help="none: exact, the default; default, aggressive, "
        "conservative, auto: blended tiles; a number: windows that see this many latents around them",
    )
    add("--frames", metavar="A:B", help="only frames A to B-1; A or B may be left out")
    add("--crop", metavar="TOP:BOTTOM,LEFT:RIGHT", help="only these rows and columns of pixels")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; default: as stored")
    add("--key", help="which tensor of LATENTS, where it holds several")
    add("--latent-size", metavar="FxHxW", help="of packed latents (B, F*H*W, C)")
