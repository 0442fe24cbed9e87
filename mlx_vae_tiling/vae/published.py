"""The published versions of the decoder: one table, from which every name of a version comes."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from mlx_vae_tiling.vae.blocks import STRIDES, Block, ResBlockNarrowing, ResBlocks, Upsample
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

AnyConfig = DecoderConfig | DiffusionDecoderConfig | TinyDecoderConfig
"""The architecture of a decoder of any kind."""


class Published(NamedTuple):
    """A published version.

    Args:
        name: What Python and the command line call it, such as "ltx-2.3".
        title: What people call it: the models whose latents it decodes.
        config: Its architecture.
        other_names: Those of other releases with the same architecture.
    """

    name: str
    title: str
    config: AnyConfig
    other_names: tuple[str, ...] = ()


_UP = Upsample(STRIDES["compress_all"])
_UP_RESIDUAL = Upsample(STRIDES["compress_all"], 2, residual=True)


def _residual(*num_layers: int, inject_noise: bool = False) -> tuple[Block, ...]:
    first, *rest = num_layers
    blocks: list[Block] = [ResBlocks(first)]
    for layers in rest:
        blocks += [_UP_RESIDUAL, ResBlocks(layers, inject_noise)]
    return tuple(blocks)


_BLOCKS_090 = (
    *(ResBlocks(4), ResBlocks(3), _UP),
    *(ResBlocks(3), ResBlockNarrowing(), _UP),
    *(ResBlocks(3), ResBlockNarrowing(), _UP, ResBlocks(4)),
)
_BLOCKS_23 = (
    *(ResBlocks(2), Upsample(STRIDES["compress_all"], 2)),
    *(ResBlocks(2), Upsample(STRIDES["compress_all"], 1)),
    *(ResBlocks(4), Upsample(STRIDES["compress_time"], 2)),
    *(ResBlocks(6), Upsample(STRIDES["compress_space"], 2), ResBlocks(4)),
)
_BLOCKS_PRUNA = (
    *_BLOCKS_23[:3],
    *(ResBlockNarrowing.between(512, 384), *_BLOCKS_23[3:5]),
    *(ResBlockNarrowing.between(384, 256), *_BLOCKS_23[5:]),
)

_VERSIONS = (
    Published("ltx-0.9.0", "LTX-Video 0.9.0", DecoderConfig(_BLOCKS_090)),
    Published(
        "ltx-0.9.1",
        "LTX-Video 0.9.1",
        DecoderConfig(_residual(8, 7, 6, 5, inject_noise=True), timestep_conditioning=True),
    ),
    Published(
        "ltx-0.9.5",
        "LTX-Video 0.9.5 to 0.9.8",
        DecoderConfig(_residual(5, 5, 5, 5), timestep_conditioning=True),
    ),
    Published("ltx-2", "LTX-2", DecoderConfig(_residual(5, 5, 5, 5), spatial_padding_mode="reflect")),
    Published("ltx-2.3", "LTX-2.3 / 2.5", DecoderConfig(_BLOCKS_23), ("ltx-2.5-conv",)),
    Published("ltx-2.3-pruna", "LTX-2.3 pruned (PrunaVAED)", DecoderConfig(_BLOCKS_PRUNA, base_channels=64)),
    Published("ltx-2.5", "LTX-2.5 diffusion", DiffusionDecoderConfig()),
    Published("taeltx2_3", "LTX-2 / 2.3 / 2.5 tiny (TAEHV)", TinyDecoderConfig(), ("taeltx_2",)),
    Published(
        "taeltx2_3_wide",
        "LTX-2.3 / 2.5 tiny, wide (TAEHV)",
        TinyDecoderConfig((1024, 512, 256, 64), wide=True),
    ),
)
PUBLISHED = {version.name: version for version in _VERSIONS}
"""The versions by name."""

NAMES = tuple(name for version in _VERSIONS for name in (version.name, *version.other_names))
"""Every name that Python and the command line take."""


def published_version(name: str) -> Published:
    """The version of this name or title.

    Raises:
        ValueError: If there is none.
    """
    for version in PUBLISHED.values():
        if name in (version.name, version.title, *version.other_names):
            return version
    raise ValueError(f"config by name must be one of {', '.join(map(repr, NAMES))}, got {name!r}")


def version_of(config: AnyConfig) -> Published | None:
    """The published version of this structure, whatever the widths; None if none has it."""
    for version in _VERSIONS:
        if _structure(config) == _structure(version.config):
            return version
    return None


def _structure(config: AnyConfig) -> tuple[object, ...]:
    """What tells versions apart."""
    if isinstance(config, DiffusionDecoderConfig):
        return config.stage_kernels, config.upsamples
    if isinstance(config, TinyDecoderConfig):
        return ("tiny", config.wide)
    blocks = (
        ("narrowing", Fraction(*block.widths) if block.widths else Fraction(block.multiplier))
        if isinstance(block, ResBlockNarrowing)
        else block
        for block in config.decoder_blocks
    )
    return tuple(blocks), config.timestep_conditioning
