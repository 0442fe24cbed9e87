"""`mlx-vae-tiling decode`: saved latents to a video, an image sequence or an array."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from functools import partial

import mlx.core as mx

from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.cli.decoding import add_decoding, decoding_options, given_decoder, latents_for
from mlx_vae_tiling.cli.fetch import locate_aloud
from mlx_vae_tiling.cli.plan import add_planning, plan_for
from mlx_vae_tiling.cli.printing import plan_text, print_error, print_news, print_result, report_fields
from mlx_vae_tiling.media.places import same_file
from mlx_vae_tiling.runtime.autotune import plan_to_run
from mlx_vae_tiling.runtime.planning.forms import expected_seconds
from mlx_vae_tiling.runtime.ranks.crew import Crew, joined
from mlx_vae_tiling.runtime.ranks.meeting import launched
from mlx_vae_tiling.runtime.resuming.output import kept_frames
from mlx_vae_tiling.runtime.run import decode_to_file
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.tiny import TinyDecoder

PURPOSE = "decode saved latents to a video, an image sequence or an array"
EXAMPLES = """
  mlx-vae-tiling decode demo --vae demo -o demo.mp4
  mlx-vae-tiling decode shot.safetensors --vae ltx-2.3-vae.safetensors -o shot.mp4 --memory 8GB
  mlx-vae-tiling decode shot.latent --vae Kijai/LTX2.3_comfy -o shot.mov --fps 24000/1001
  mlx-vae-tiling decode shot.npy --vae ltx-2-vae/ -o part.npy --frames 24:48 --crop 0:256,128:384
  mlx-vae-tiling decode shot.safetensors --preview taeltx2_3.safetensors -o preview.mp4
  mlx-vae-tiling decode packed.pt --vae vae.safetensors -o frames/ --latent-size 16x17x30
  mlx.launch --hosts a,b -- mlx-vae-tiling decode shot.safetensors --vae ltx-2.3 -o shot.mp4"""

STEP_SECONDS = 15
"""After the failure of another rank; by then most steps of a decoder have come to their end."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of this command."""
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
    add(
        "--preview",
        metavar="SOURCE",
        help="a tiny decoder (TAEHV) to decode with in place of --vae, far faster and blurrier",
    )
    add("--resume", action="store_true", help="continue a decode that ended early")
    add("--overwrite", action="store_true", help="replace OUT, if there is one, once the new one is complete")
    add("--audio", metavar="FILE", help="the clip's sound, for .mp4 and .mov; cut and shifted for --frames")
    add("-q", "--quiet", action="store_true", help="no plan and no progress on stderr")
    add_decoding(command)
    add_planning(command, required=False)


def run(args: argparse.Namespace) -> int:
    """Decodes and prints the report; returns the exit status.

    Where a launcher has started several processes, each computes its part, and rank 0 writes and prints.
    """
    group = mx.distributed.init() if launched() else None
    if group is None or group.size() == 1:
        return _decode(args, None)
    with joined(group) as crew:
        threading.Thread(target=_end_in_time, args=[crew], daemon=True).start()
        args.quiet = args.quiet or crew.rank > 0
        return _decode(args, crew)


def _end_in_time(crew: Crew) -> None:
    """Ends the process some time after another one has failed, however long its step takes.

    What is kept is complete at any moment.
    """
    error = crew.failure()
    time.sleep(STEP_SECONDS)
    print_error(str(error))
    os._exit(2)


def _decode(args: argparse.Namespace, crew: Crew | None) -> int:
    if same_file(args.latents, args.output):
        raise ValueError(f"LATENTS and --output must be different files, got {args.output} for both")
    decoder = _decoder(args)
    saved = latents_for(args, decoder)
    planner = partial(plan_to_run, tell=None if args.quiet else print_news)
    plan = plan_for(args, decoder, saved.latents.shape, decoder.dtype, args.steps, planner)
    if crew is None:
        if not args.quiet:
            print(plan_text(plan, expected_seconds(decoder, plan)), file=sys.stderr)
        plan.require_fit()
    report = decode_to_file(
        decoder,
        saved.latents,
        args.output,
        fps=args.fps or saved.fps or 24,
        resume=args.resume,
        overwrite=args.overwrite,
        audio=args.audio,
        codec=args.codec,
        quality=args.quality,
        plan=plan,
        progress=not args.quiet,
        group=crew,
        **decoding_options(args),
    )
    if crew is None or crew.rank == 0:
        print_result(args, report, report_fields(report))
    return 0


def _decoder(args: argparse.Namespace) -> StreamingDecoder:
    if args.preview is None:
        if args.vae is None:
            raise ValueError("a decode needs --vae SOURCE, or --preview SOURCE for a tiny decoder")
        return given_decoder(args)
    decoder = load_decoder(locate_aloud(args.preview, args.quiet), dtype=args.dtype)
    if not isinstance(decoder, TinyDecoder):
        raise ValueError(
            f"--preview takes a tiny decoder (TAEHV), and {args.preview} is none; pass it as --vae"
        )
    return decoder


def resumable(args: argparse.Namespace) -> str:
    """What of a decode that ended early can be resumed."""
    kept = kept_frames(args.output) if "output" in args else None
    return f"; {kept[1]:.0%} of the decode is kept in {kept[0]}, --resume continues it" if kept else ""
