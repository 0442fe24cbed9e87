"""`run_command`: one command, its exit status, and one line for whatever goes wrong.

Results go to stdout, progress and warnings to stderr. Exit status: 0; 1 from `plan` where nothing fits and
from `verify` where differences show; 2 after one line that says what is wrong; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from mlx_vae_tiling.checkpoints.configs import CheckpointWarning
from mlx_vae_tiling.cli import NAME
from mlx_vae_tiling.cli.decode import resumable
from mlx_vae_tiling.cli.parser import new_parser
from mlx_vae_tiling.cli.printing import print_error, print_warning
from mlx_vae_tiling.media.audio import AudioWarning
from mlx_vae_tiling.runtime.tuning.choices import TuningWarning

OURS: dict[type[Warning], Literal["always", "default"]] = {
    CheckpointWarning: "always",
    AudioWarning: "always",
    TuningWarning: "default",
}
"""Our warnings, and how often they are printed; "default": once a command."""


def run_command(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; None for those of the process.

    Returns:
        The exit status.
    """
    args = new_parser().parse_args(argv)
    try:
        with _warnings_in_one_line():
            status = int(args.run(args))
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as stop:
        kept = str(stop) or resumable(args) or ", nothing was kept"
        print(f"{NAME}: interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the result has enough of it, as `head`; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if args.debug:
            raise
        kept = "" if isinstance(error, (ValueError, FileExistsError)) else resumable(args)
        print_error(f"{_one_line(error)}{kept}")
        return 2


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints our own warnings like every other message; those of libraries are left as they are."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, tuple(OURS)):
                print_warning(" ".join(str(message).split()))
            else:
                others(message, category, *where, **more)

        for ours, often in OURS.items():
            warnings.simplefilter(often, ours)
        warnings.showwarning = show
        yield


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if "temp_directory_path" in text:  # where MLX compiles for the CPU
        return f"there is no directory for temporary files, TMPDIR is {os.environ.get('TMPDIR')!r}"
    expected = (ValueError, OSError, ImportError, ArithmeticError)
    return text if isinstance(error, expected) else f"{type(error).__name__}: {text}; --debug says where"
