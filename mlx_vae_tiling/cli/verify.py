"""`mlx-vae-tiling verify`: how far tiles, small halos or a file of frames are from the exact frames."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from mlx_vae_tiling.cli.decoding import add_decoding, decoding_options, given_decoder, latents_for
from mlx_vae_tiling.cli.figures import matplotlib_figure, require_drawable
from mlx_vae_tiling.cli.options import parse_tiling, parse_window
from mlx_vae_tiling.cli.plan import add_planning
from mlx_vae_tiling.cli.printing import plan_fields, print_result
from mlx_vae_tiling.runtime.verification.compare import Score
from mlx_vae_tiling.runtime.verification.verification import SEAM_DB, VISIBLE_DB, Verification
from mlx_vae_tiling.runtime.verification.verify import verify_decode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PURPOSE = "compare a decode in tiles, or a file of frames, with the exact frames"
EXAMPLES = f"""
  mlx-vae-tiling verify demo --vae demo --tiling aggressive --map map.png --plot frames.png
  mlx-vae-tiling verify shot.safetensors --vae ltx-2.3 --tiling 4 --memory 8GB
  mlx-vae-tiling verify shot.latent --vae ltx-2.3 --against ComfyUI/output/shot/

Both decodes run piece by piece, together within --memory. Frames of 8 bits are compared.
Seams: where blended tiles overlap; where windows meet, a latent to each side.
Seams are visible where the worst frame has less than {VISIBLE_DB:.0f} dB at its seams, and less than the
video has elsewhere by at least {SEAM_DB:.0f} dB; other differences where a frame has less than
{VISIBLE_DB:.0f} dB, which are 2.6 levels of 255, root mean square. That is a convention: look at the
frame that is named.

exit status: 0, or 1 where seams or other differences are visible"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of this command."""
    add = command.add_argument
    add("latents", metavar="LATENTS", help='.safetensors, .latent, .npy, .npz or .pt, or "demo"')
    add(
        "--against",
        default="exact",
        metavar="FRAMES",
        help="exact, the default: the exact decode; or frames to compare the decode with: "
        "a video, .npy, frame_%%05d.png or a folder of PNG images",
    )
    add("--map", metavar="FILE", help="draw where in the frame they differ, with the figures extra")
    add("--plot", metavar="FILE", help="draw PSNR and SSIM over frames, with the figures extra")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    add_decoding(command)
    add_planning(command)


def run(args: argparse.Namespace) -> int:
    """Compares and prints the verdict; returns the exit status."""
    for path in (args.map, args.plot):
        if path is not None:
            require_drawable(path)
    decoder = given_decoder(args)
    latents = latents_for(args, decoder).latents
    from tqdm import tqdm

    # With a delay, nothing is shown before the first frame: what is wrong is one line.
    with tqdm(unit=" frame", desc="verify", disable=args.quiet, file=sys.stderr, delay=0.1) as bar:
        result = verify_decode(
            decoder,
            latents,
            tiling=parse_tiling(args.tiling, decoder.config, latents.shape),
            against=args.against,
            memory_limit=args.memory,
            window=parse_window(args.frames, args.crop),
            no_tune=args.no_tune,
            report=bar.update,
            **decoding_options(args),
        )
    print_result(args, verification_text(result), verification_fields(result))
    if args.map:
        draw_map(result, args.map)
    if args.plot:
        draw_frames(result, args.plot)
    return 1 if result.differs_visibly else 0


def verification_text(result: Verification) -> str:
    """The verdict, and the scores it comes from."""
    lines = [result.verdict, "", f"{'':<10}{'PSNR':>14}{'SSIM':>9}{'largest':>9}{'pixels':>8}"]
    parts = {"all": result.total}
    if result.seams:
        parts |= {"seams": result.seam_total, "elsewhere": result.elsewhere_total}
    for name, score in parts.items():
        if score.values:
            psnr = "no difference" if math.isinf(score.psnr) else f"{score.psnr:.2f} dB"
            share = score.values / result.total.values
            lines.append(f"{name:<10}{psnr:>14}{score.ssim:>9.4f}{score.largest:>9}{share:>8.0%}")
    return "\n".join(lines)


def verification_fields(result: Verification) -> dict[str, Any]:
    """The fields of a verification in types that JSON has; a PSNR is null where nothing differs."""
    seams = result.seams
    return {
        "verdict": result.verdict,
        "seams_visible": result.seams_visible,
        "differs_visibly": result.differs_visibly,
        "compared_with": result.compared_with,
        "worst_frame": result.worst_frame,
        "all": score_fields(result.total),
        "at_seams": score_fields(result.seam_total),
        "elsewhere": score_fields(result.elsewhere_total),
        "seams": {name: getattr(seams, name) for name in ("frames", "rows", "columns")},
        "frames": [
            {"all": score_fields(frame), "at_seams": score_fields(one), "elsewhere": score_fields(other)}
            for frame, one, other in zip(result.frames, result.at_seams, result.elsewhere, strict=True)
        ],
        "peak_bytes": result.peak_bytes,
        "plan": plan_fields(result.plan),
    }


def score_fields(score: Score) -> dict[str, Any]:
    """The fields of a score; null where there are no pixels, or, of a PSNR, no differences."""
    if not score.values:
        return {"psnr": None, "ssim": None, "largest": None, "pixels": 0}
    return {
        "psnr": score.psnr if math.isfinite(score.psnr) else None,
        "ssim": score.ssim if score.windows else None,
        "largest": score.largest,
        "pixels": score.values // 3,
    }


def draw_map(result: Verification, path: str) -> None:
    """Draws the root mean square difference of each pixel over all frames, and where seams are.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    height, width = result.rms.shape
    figure = matplotlib_figure().Figure(figsize=(8, 8 * height / width + 1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(result.rms, cmap="magma", interpolation="nearest", vmin=0)
    text, share = "root mean square difference, levels of 255", 0.05 * height / width
    figure.colorbar(image, ax=axes, fraction=share, pad=0.03, label=text)
    for bounds, line in ((result.seams.rows, axes.axhline), (result.seams.columns, axes.axvline)):
        for edge in (edge - 0.5 for pair in bounds for edge in pair):
            line(edge, color="white", lw=0.6, ls=":")
    axes.set(xlabel="pixels; dotted: borders of seams")
    axes.set_title(_title(result), fontsize="medium")
    figure.savefig(path, dpi=150)


def draw_frames(result: Verification, path: str) -> None:
    """Draws PSNR and SSIM of each frame, at the seams and elsewhere.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    figure = matplotlib_figure().Figure(figsize=(8, 6), layout="constrained")
    psnr, ssim = figure.subplots(2, sharex=True)
    parts = {"all": result.frames}
    if result.seams:
        parts = {"at the seams": result.at_seams, "elsewhere": result.elsewhere}
    for name, scores in parts.items():
        # Where nothing differs, or no pixel is, there is no point.
        psnr.plot([s.psnr if math.isfinite(s.psnr) else math.nan for s in scores], ".-", lw=1, label=name)
        ssim.plot([s.ssim for s in scores], ".-", lw=1, label=name)
    psnr.axhline(VISIBLE_DB, color="grey", lw=0.8, ls="--", label="visible below")
    psnr.set(ylabel="PSNR, dB")
    psnr.set_title(_title(result), fontsize="medium")
    ssim.set(ylabel="SSIM", xlabel="frame")
    for axes in (psnr, ssim):
        _mark(axes, result.seams.frames)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _title(result: Verification) -> str:
    return result.verdict.replace(", worst", "\nworst")


def _mark(axes: Axes, seams: tuple[tuple[int, int], ...]) -> None:
    """Shades the frames in which two tiles overlap."""
    for start, stop in seams:
        axes.axvspan(start - 0.5, stop - 0.5, color="grey", alpha=0.15, lw=0)
