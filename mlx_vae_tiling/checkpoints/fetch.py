"""`fetch_vae`: only the video decoder of a repository of the Hugging Face Hub, or of a published version.

What it will transfer is known before it does: `plan_fetch`, then `FetchPlan.run`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.checkpoints.configs import CheckpointWarning
from mlx_vae_tiling.checkpoints.fetch_plan import Access, FetchPlan, plan_cached, plan_download
from mlx_vae_tiling.checkpoints.hub import is_offline
from mlx_vae_tiling.checkpoints.hub_errors import HubError, NotThere, Unreachable, cannot_fetch
from mlx_vae_tiling.checkpoints.sources import SOURCES, HubFile


def fetch_vae(
    repo_id: str,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Downloads only the video decoder of a published version or of a repository of the Hugging Face Hub.

    Only the header and the decoder's bytes of a file are transferred, and kept as a file of their own
    beside huggingface_hub's cache; a file that is little more than a decoder goes whole into that cache.
    What is there already is not fetched again, and what a broken transfer left is continued. Without
    the Hub, or with HF_HUB_OFFLINE=1, what was fetched before is found.

    Args:
        repo_id: The name of a published version such as "ltx-2.3", or "owner/name".
        filename: The file in the repository; None for the one with a video decoder in `vae/decoder`,
            `decoder`, `vae` or at the top. Not for a version, whose files are known.
        revision: Branch, tag or commit; None for the main branch.
        token: As in huggingface_hub; None for the one that is logged in.
        cache_dir: Replaces huggingface_hub's cache.
        progress: Whether to show a bar, on a terminal.

    Returns:
        The local file, or the first of its shards, to be given to `load_decoder`.

    Raises:
        OSError: If the repository or file cannot be reached, or the file not be written.
        ValueError: If no file has a video decoder, or several have one and `filename` must choose.

    Warns:
        CheckpointWarning: If another place, or what was fetched before, has to do.
    """
    plan = plan_fetch(repo_id, filename=filename, revision=revision, token=token, cache_dir=cache_dir)
    warn_of(plan)
    return plan.run(progress=progress)


def warn_of(plan: FetchPlan) -> None:
    """Warns of what goes otherwise than asked."""
    for note in plan.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=3)


def plan_fetch(
    repo_id: str,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> FetchPlan:
    """Says what `fetch_vae` will transfer; takes the same arguments and raises the same errors.

    Of each file that may have the decoder, the header is transferred.
    """
    require("repo_id", repo_id, "text: the name of a version, or owner/name", str)
    for name, value in (("filename", filename), ("revision", revision)):
        require(name, value, "text or None", str, None)
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("token must be one word of ASCII characters; it is not shown here")
    access = Access(revision, token, Path(cache_dir) if cache_dir else None)
    if repo_id not in SOURCES:
        return _plan_any([HubFile(repo_id, filename)], repo_id, access, version=None)
    if filename is not None:
        raise ValueError(f"filename is for a repository, the files of {repo_id} are known; got {filename!r}")
    return _plan_any(SOURCES[repo_id], repo_id, access, version=repo_id)


def _plan_any(places: Sequence[HubFile], asked: str, access: Access, version: str | None) -> FetchPlan:
    """The plan for the first place that has what is asked for; what was fetched before, without the Hub."""
    reason, notes = "HF_HUB_OFFLINE is set: unset it to fetch", []
    try:
        if not is_offline():
            return _plan_online(places, access, version)
    except Unreachable as error:
        reason = str(error)
        notes = [f"{reason}; what was fetched before has to do"]
    for place in places:
        found = plan_cached(place, access)
        if found is not None:
            return replace(found, notes=(*notes, *found.notes))
    raise cannot_fetch(asked, Unreachable(f"{reason}; it was not fetched before"))


def _plan_online(places: Sequence[HubFile], access: Access, version: str | None) -> FetchPlan:
    problems: list[NotThere] = []
    for place in places:
        try:
            plan = plan_download(place, access, version)
        except NotThere as error:
            problems.append(error)
        except Unreachable:
            raise
        except HubError as error:
            raise cannot_fetch(place.repo, error) from None
        else:
            notes = tuple(f"{problem}; {plan.repository} has the same" for problem in problems)
            return replace(plan, notes=(*notes, *plan.notes))
    raise cannot_fetch(version or places[0].repo, NotThere("; ".join(map(str, problems))))
