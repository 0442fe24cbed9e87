"""What tensors a decoder must have: their names and shapes, and how a file differs from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlx.utils import tree_flatten

from mlx_vae_tiling.media.safetensors_header import shortened
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import AnyConfig

Shapes = Mapping[str, tuple[int, ...]]


def parameter_shapes(decoder: StreamingDecoder) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name."""
    parameters: Any = tree_flatten(decoder.parameters())
    return {name: parameter.shape for name, parameter in parameters}


def differences(config: AnyConfig, names: Mapping[str, str], shapes: Shapes) -> list[str]:
    """How a file's tensors differ from a config's, one phrase each; axes of size 1 do not count.

    Args:
        config: What they should be those of.
        names: Our name of each tensor by its name in the file.
        shapes: Their shapes by our names.
    """
    expected = parameter_shapes(build_decoder(config))
    found = [f"{name} is missing" for name in expected if name not in shapes]
    first = {ours: name for name, ours in reversed(list(names.items()))}
    for name, ours in names.items():
        if ours not in expected or first[ours] != name:
            found.append(f"{shortened(name)} is surplus")
        elif not same_shape(shapes[ours], expected[ours]):
            found.append(f"{shortened(name)} is {shapes[ours]} where {expected[ours]} is expected")
    return found


def same_shape(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are the same but for axes of size 1."""
    return [size for size in shape if size != 1] == [size for size in other if size != 1]


def listing(items: Iterable[str], separator: str = "; ", longest: int = 5) -> str:
    """The first few of many, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - longest} more" if len(items) > longest else ""
    return separator.join(shortened(item, 160) for item in items[:longest]) + more
