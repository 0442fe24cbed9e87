"""What goes wrong between here and the Hub, as one line each that says what to do."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from mlx_vae_tiling.media.safetensors_header import shortened

_PASSING = (408, 429, 500, 502, 503, 504)
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class HubError(OSError):
    """The Hub, or something on the way to it, refuses."""


class NotThere(HubError):
    """A repository or file that is missing, or that this account may not read; another one may do."""


class Unreachable(HubError):
    """Nothing answers."""


class InterruptedTransfer(HubError):
    """A transfer stopped on its way; what has come is kept, and the next one continues."""


def cannot_fetch(what: str, error: HubError) -> HubError:
    """The error of a whole fetch, of the same type."""
    return type(error)(f"cannot fetch a VAE from {what} on the Hub: {error}")


def is_passing(error: Exception) -> bool:
    """Whether asking again may help: no answer, a cut one, or one that says so."""
    status = _status(error)
    return not isinstance(error, HubError) and (status is None or status in _PASSING)


def explained(error: Exception, repo: str, what: str, token: str | bool | None) -> HubError:
    """The error of huggingface_hub or of its HTTP library in one line.

    Args:
        error: The error.
        repo: The repository that was asked, and
        what: the file or revision of it.
        token: What was passed as the token; kept out of the line, as are the signatures of addresses.
    """
    if isinstance(error, HubError):
        return error
    utils: Any = import_module("huggingface_hub.utils")
    status = _status(error)
    endpoint = import_module("huggingface_hub.constants").ENDPOINT
    if isinstance(error, utils.GatedRepoError):
        return NotThere(f"{repo} asks for consent: accept its terms at {endpoint}/{repo}, then {_LOG_IN}")
    if isinstance(error, utils.RepositoryNotFoundError):
        return NotThere(
            f"there is no repository {repo}, or it is private: check the name; for a private one {_LOG_IN}"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return NotThere(f"{repo} has no {what}: check the branch, tag or commit")
    if isinstance(error, utils.EntryNotFoundError) and status == 404:
        return NotThere(
            f"{repo} has no file {what}: it may have been renamed, see {endpoint}/{repo}/tree/main"
        )
    if isinstance(error, utils.LocalTokenNotFoundError):
        return HubError(f"no token is stored here: {_LOG_IN}")
    if isinstance(error, utils.HFValidationError):
        return NotThere(f"{repo!r} cannot be a repository: they are named owner/name")
    if status is not None:
        return _refused(status, repo, endpoint)
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        return HubError(f"{error.filename}: {error.strerror}")
    text = _without_secrets(shortened(str(error) or type(error).__name__, 160), token)
    return Unreachable(f"{endpoint} does not answer ({text}): check the connection, then try again")


def _refused(status: int, repo: str, endpoint: str) -> HubError:
    if status == 401:
        return HubError("the Hub refuses the token: renew it with `hf auth login`, or unset HF_TOKEN")
    if status == 403:
        return NotThere(
            f"{repo} may not be read from here: {_LOG_IN} of an account that may, and allow the token to "
            f"read it at {endpoint}/settings/tokens"
        )
    if status == 429:
        return HubError(f"{endpoint} gets too many requests from here: wait some minutes, then try again")
    if status in _PASSING:
        return HubError(f"{endpoint} cannot answer now (status {status}): try again later")
    return HubError(f"{endpoint} refuses what was asked of {repo} (status {status})")


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _without_secrets(text: str, token: str | bool | None) -> str:
    if isinstance(token, str) and token.strip():
        text = text.replace(token.strip(), "(token)")
    text = re.sub(r"\bhf_\w+", "(token)", text)
    return re.sub(r"(https?://)([^\s/@]*@)?([^\s?'\")]*)\?[^\s'\")]*", r"\1\3", text)
