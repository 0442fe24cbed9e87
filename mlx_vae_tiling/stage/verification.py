"""`VerificationResult`: checks of what a pipeline stage takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Validator = Callable[[Any], bool]


class VerificationResult:
    """The checks of some fields, and which of them failed.

    Example:
        >>> result = VerificationResult().add_check("latents", None, [array_of_rank(5), without_nan])
        >>> result.get_failure_summary()
        'latents must be an array of rank 5, got None'
    """

    def __init__(self) -> None:
        self._checked: dict[str, None] = {}
        self._failures: dict[str, str] = {}

    def add_check(
        self, field: str, value: Any, validators: Validator | Sequence[Validator]
    ) -> VerificationResult:
        """Checks one field, up to the first validator that fails.

        Args:
            field: Its name in the summary.
            value: Its value.
            validators: Functions of the value that return whether it is valid, or one of them. One
                that raises counts as failed. The summary calls them by their `__name__`.

        Returns:
            The result itself, for the next check.
        """
        self._checked[field] = None
        for validator in [validators] if callable(validators) else validators:
            rule = getattr(validator, "__name__", repr(validator)).replace("_", " ")
            try:
                reason = "" if validator(value) else f"got {describe(value)}"
            except Exception as error:
                reason = f"got {describe(value)}, for which the check raised {error!r}"
            if reason:
                self._failures[field] = f"{field} must be {rule}, {reason}"
                break
        return self

    def is_valid(self) -> bool:
        """Whether no check failed."""
        return not self._failures

    def get_failed_fields(self) -> list[str]:
        """The names of the fields that failed, in the order of their checks."""
        return list(self._failures)

    def to_dict(self) -> dict[str, bool]:
        """Whether each field that was checked is valid, by name, in the order of the checks."""
        return {field: field not in self._failures for field in self._checked}

    def get_failure_summary(self) -> str:
        """What each failed field must be and what it is; empty if none failed."""
        return "; ".join(self._failures.values())

    def require(self, what: str) -> None:
        """Raises a `ValueError` that names the failed fields of `what`, if there are any."""
        if self._failures:
            raise ValueError(f"{what} fails in {', '.join(self._failures)}: {self.get_failure_summary()}")


def array_of_rank(rank: int) -> Validator:
    """A validator of MLX and NumPy arrays of this rank."""

    def validator(value: Any) -> bool:
        return isinstance(value, (mx.array, np.ndarray)) and value.ndim == rank

    validator.__name__ = f"an_array_of_rank_{rank}"
    return validator


def without_nan(value: Any) -> bool:
    """Whether an array has no NaN, looked for frame by frame: the check takes little memory."""
    is_nan = np.isnan if isinstance(value, np.ndarray) else mx.isnan
    parts = (value[:, :, i] for i in range(value.shape[2])) if value.ndim > 2 else [value]
    return not any(is_nan(part).any().item() for part in parts)


def describe(value: Any) -> str:
    """A value for people: its shape and dtype if it is an array."""
    if isinstance(value, (mx.array, np.ndarray)):
        return f"an array of shape {value.shape} and {str(value.dtype).removeprefix('mlx.core.')}"
    return "None" if value is None else f"a {type(value).__name__}"
