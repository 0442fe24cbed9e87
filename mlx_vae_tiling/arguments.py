"""What callers pass: of the right kind, or an error of one line that names it; errors in one line."""

from __future__ import annotations

from numbers import Integral
from typing import Any

_LONGEST = 80


def told(value: object) -> str:
    """A value as errors tell it: one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def one_line(error: BaseException) -> str:
    """An error as users and other ranks are told it: one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def require(name: str, value: object, kinds: str, *types: Any) -> None:
    """Raises a `TypeError` unless a value is of one of these types; a bool is no number.

    Args:
        name: Of the argument.
        value: Given for it.
        kinds: The types in words.
        *types: As `isinstance` takes them; None stands for its type.
    """
    classes = tuple(type(None) if kind is None else kind for kind in types)
    if not isinstance(value, classes) or (isinstance(value, bool) and bool not in classes):
        raise TypeError(f"{name} must be {kinds}, got {told(value)}")


def whole(name: str, value: object) -> int:
    """A whole number of Python, also of NumPy's; raises a `TypeError` where it is none."""
    require(name, value, "a whole number", Integral)
    return int(value)  # type: ignore[call-overload, no-any-return]
