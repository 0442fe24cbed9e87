"""Weights that are known to be there: nothing runs on what a module was filled with when it was made."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_vae_tiling.vae.options import seed_of

Weighted = TypeVar("Weighted", bound="WeightedModule")


class WeightedModule(nn.Module):
    """A module that knows whether it was given weights."""

    def __init__(self) -> None:
        super().__init__()
        self._has_weights = False

    def require_weights(self) -> None:
        """Raises a `ValueError` unless weights have come."""
        if not self._has_weights:
            raise ValueError(
                "the decoder has no weights; use load_decoder(source), decoder.load_weights(...) "
                "or, to run on noise, decoder.init_random()"
            )

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> nn.Module:
        """As `nn.Module.load_weights`, also of no weights at all, which leaves zeros."""
        super().load_weights(file_or_weights, strict)
        self._has_weights = True
        return self

    def update(self, parameters: dict[str, Any], strict: bool = True) -> nn.Module:
        """As `nn.Module.update`: this is how weights arrive, whoever brings them."""
        super().update(parameters, strict)
        self._has_weights = True
        return self

    def apply(self, *given: Any, **options: Any) -> nn.Module:
        """As `nn.Module.apply`, which changes weights, and so brings none."""
        had_weights = self._has_weights
        super().apply(*given, **options)
        self._has_weights = had_weights
        return self

    def cast(self, dtype: mx.Dtype) -> None:
        """Casts the weights in place, all but the statistics of the latents, which stay as stored."""

        def cast(name: str, value: mx.array) -> mx.array:
            return value if name.startswith("per_channel_statistics.") else value.astype(dtype)

        self.update(tree_map_with_path(cast, self.parameters()))
        mx.eval(self.parameters())

    def init_random(self: Weighted, seed: int = 0) -> Weighted:
        """Fills all parameters with seeded noise that keeps activations near unit variance.

        For tests and benchmarks: the frames show nothing.
        """
        key = mx.random.key(seed_of(seed))
        weights = []
        for name, value in dict(tree_flatten(self.parameters())).items():
            key, own = mx.random.split(key)
            fan_in = value.size // value.shape[0] if value.ndim > 1 else 100
            weights.append((name, mx.random.normal(value.shape, value.dtype, key=own) / math.sqrt(fan_in)))
        self.load_weights([(name, value) for name, value in weights if not self._is_kept(name)], strict=False)
        return self

    def _is_kept(self, name: str) -> bool:
        """Whether `init_random` leaves a parameter as it was made."""
        return name in ("per_channel_statistics.std", "timestep_scale_multiplier")
