"""`mlx-vae-tiling fetch`: only the decoder of a published version or of a repository."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_vae_tiling.checkpoints.fetch import plan_fetch
from mlx_vae_tiling.checkpoints.fetch_plan import FetchPlan
from mlx_vae_tiling.checkpoints.locate import Located, parse_source
from mlx_vae_tiling.checkpoints.sources import SOURCES
from mlx_vae_tiling.cli.printing import print_news, print_result, print_warning
from mlx_vae_tiling.runtime.planning.memory import format_bytes

PURPOSE = "transfer only the decoder of a published version or of a repository of the Hub"
EXAMPLES = f"""
  mlx-vae-tiling fetch ltx-2.3
  mlx-vae-tiling fetch ltx-2 --dry-run
  mlx-vae-tiling fetch Lightricks/LTX-2.3/ltx-2.3-22b-dev.safetensors

Versions: {", ".join(SOURCES)}. Prints the path of the file. An interrupted transfer is continued by
the same command. Of a repository that asks for consent, accept its terms on huggingface.co, then log
in with `hf auth login`. HF_HUB_OFFLINE=1 finds what was fetched before, HF_ENDPOINT names a mirror."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of this command alone."""
    add = command.add_argument
    add("source", metavar="SOURCE", help="a version, owner/name, or owner/name/file.safetensors")
    add("--revision", help="branch, tag or commit of a repository; default: its main branch")
    add("--dry-run", action="store_true", help="say what would be transferred, from headers alone")
    add("-q", "--quiet", action="store_true", help="no announcement and no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Fetches it and prints where it is; returns the exit status."""
    found = parse_source(args.source)
    if isinstance(found, Path):
        print_result(args, found, {"path": str(found), "transfer_bytes": 0})
        return 0
    plan = plan_fetch(found.source, filename=found.filename, revision=args.revision)
    _announce(plan, args.quiet)
    path = plan.path if args.dry_run else _transferred(plan, args.quiet)
    print_result(args, path, _fields(plan))
    return 0


def locate_aloud(source: str, quiet: bool = False) -> Located:
    """What `load_decoder` does with a source, after saying what will be transferred from where."""
    found = parse_source(source)
    if isinstance(found, Path):
        return Located(found)
    plan = plan_fetch(found.source, filename=found.filename)
    _announce(plan, quiet)
    return Located(_transferred(plan, quiet), found.version)


def _transferred(plan: FetchPlan, quiet: bool) -> Path:
    """Transfers it. The message of an interrupt says what is kept."""
    try:
        return plan.run(progress=not quiet)
    except KeyboardInterrupt as stop:
        kept = plan.extract.kept_bytes if plan.extract else 0
        text = f"; {format_bytes(kept)} are kept, the same command continues"
        raise KeyboardInterrupt(text) from stop


def _announce(plan: FetchPlan, quiet: bool) -> None:
    for note in plan.notes:
        print_warning(note)
    if not quiet:
        print_news(fetch_text(plan))


def fetch_text(plan: FetchPlan) -> str:
    """What a plan will transfer, from where and to where, in a line."""
    place = f"{plan.repository}/{plan.files[0]} at {plan.commit[:7]}"
    if not plan.transfer_bytes:
        return f"{place} is there: {plan.path}"
    what = "the whole file" if len(plan.files) == 1 else f"all {len(plan.files)} shards"
    if plan.extract is not None:
        what = f"only the decoder, of {format_bytes(plan.file_bytes)}"
    kept = f", after {format_bytes(plan.kept_bytes)} that are there" if plan.kept_bytes else ""
    return f"{format_bytes(plan.transfer_bytes)} from {place}: {what}{kept}; to {plan.path}"


def _fields(plan: FetchPlan) -> dict[str, Any]:
    names = ("repository", "commit", "files", "file_bytes", "transfer_bytes", "kept_bytes", "notes")
    return {"path": str(plan.path), **{name: getattr(plan, name) for name in names}}
