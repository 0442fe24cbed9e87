"""What a decoder is made of: `DecoderConfig`, read from every form in which one is published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.vae.blocks import (
    STRIDES,
    Block,
    PaddingMode,
    ResBlockNarrowing,
    ResBlocks,
    Stride,
    Upsample,
)
from mlx_vae_tiling.vae.config_forms import read_diffusers, read_original, read_shapes

TIMESTEP_FEATURES = 256
"""Width of the sinusoidal embedding of a timestep."""

# Far beyond what is published: a config that says more is damaged, and building it would take minutes.
MOST_BLOCKS = 64
MOST_LAYERS = 64
MOST_CHANNELS = 2**16


class Config(Protocol):
    """What a decoder's config says whatever the decoder."""

    @property
    def latent_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def temporal_scale(self) -> int: ...
    @property
    def spatial_scale(self) -> int: ...
    @property
    def parameters(self) -> int: ...


class Layer(NamedTuple):
    """A 3x3x3 convolution and the depth-to-space that follows it (stride 1, 1, 1: none)."""

    in_channels: int
    out_channels: int
    stride: Stride = (1, 1, 1)


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a convolutional LTX video decoder.

    Args:
        decoder_blocks: Blocks in the order in which decoding runs them, which is the reverse of
            the published lists.
        latent_channels: Channels of the latents.
        out_channels: Channels of the frames.
        base_channels: Channels of the last level, before `conv_out`.
        patch_size: Side in pixels of the patch that one position of the last level becomes.
        causal: Whether convolutions see past frames only.
        timestep_conditioning: Whether decoding takes a timestep and mixes noise into the latents.
        spatial_padding_mode: "zeros" or "reflect" at the borders of the frame.
        norm_layer: "pixel_norm", the only one published.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If a value has no published meaning or channels do not divide.
    """

    decoder_blocks: tuple[Block, ...]
    latent_channels: int = 128
    out_channels: int = 3
    base_channels: int = 128
    patch_size: int = 4
    causal: bool = False
    timestep_conditioning: bool = False
    spatial_padding_mode: PaddingMode = "zeros"
    norm_layer: str = "pixel_norm"

    def __post_init__(self) -> None:
        for name in ("latent_channels", "out_channels", "base_channels", "patch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("causal", "timestep_conditioning"):
            require(name, getattr(self, name), "True or False", bool)
        require("decoder_blocks", self.decoder_blocks, "a tuple of blocks", tuple)
        for number, block in enumerate(self.decoder_blocks):
            require(f"decoder_blocks[{number}]", block, "a block", ResBlocks, ResBlockNarrowing, Upsample)
        if not self.decoder_blocks:
            raise ValueError("decoder_blocks must name at least one block, got none")
        if len(self.decoder_blocks) > MOST_BLOCKS:
            raise ValueError(
                f"decoder_blocks must name at most {MOST_BLOCKS} blocks, got {len(self.decoder_blocks)}"
            )
        if self.spatial_padding_mode not in ("zeros", "reflect"):
            raise ValueError(
                f"spatial_padding_mode must be 'zeros' or 'reflect', got {self.spatial_padding_mode!r}"
            )
        if self.norm_layer != "pixel_norm":
            raise ValueError(f"norm_layer must be 'pixel_norm', got {self.norm_layer!r}")
        made = self.bottleneck_channels
        for index, (block, width) in enumerate(self.blocks()):
            _check_block(index, block, width)
            made = block.after(width)
        if made != self.base_channels:
            raise ValueError(f"decoder_blocks must end with base_channels ({self.base_channels}), got {made}")
        widest = max(self.bottleneck_channels, self.latent_channels, self.out_channels * self.patch_size**2)
        if widest > MOST_CHANNELS:
            raise ValueError(f"a layer must have at most {MOST_CHANNELS} channels, got {widest}")

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads the JSON of an original checkpoint: metadata, `config.json`, `embedded_config.json`.

        Args:
            config: The VAE's object, or one that holds it under "vae".

        Returns:
            The decoder's part of it. Where the padding mode is missing, versions of LTX-Video
            (timestep-conditioned, or with one list of `blocks`) pad with zeros, as their code
            always did, and LTX-2 reflects, as its code does by default.

        Raises:
            ValueError: If it does not describe a convolutional LTX decoder.
        """
        return cls(**read_original(config))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads a diffusers `vae/config.json`; missing keys take the defaults of diffusers' class.

        Args:
            config: The JSON of an `AutoencoderKLLTXVideo` or `AutoencoderKLLTX2Video`.

        Raises:
            ValueError: If the class is another one, or its tuples do not fit each other.
        """
        return cls(**read_diffusers(config))

    @classmethod
    def from_shapes(
        cls,
        name_to_shape: Mapping[str, Sequence[int]],
        *,
        spatial_padding_mode: PaddingMode | None = None,
        residual: bool | None = None,
    ) -> DecoderConfig:
        """Infers the config from the decoder's tensor shapes.

        Args:
            name_to_shape: Original names ("decoder.conv_in.conv.weight" or without the prefix)
                and shapes, kernels in torch or MLX order.
            spatial_padding_mode: Needed where no timestep conditioning or `res_x_y` block shows
                that the decoder is an LTX-Video one, which pads with zeros.
            residual: Whether upsampling is residual. Needed where every upsampler doubles all
                axes and halves the channels without timestep conditioning: no shape tells.

        Raises:
            ValueError: If shapes cannot decide, or describe no LTX decoder.
        """
        return cls(**read_shapes(name_to_shape, spatial_padding_mode, residual))

    def blocks(self) -> Iterator[tuple[Block, int]]:
        """The blocks in decode order, each with the channels it receives."""
        width = self.bottleneck_channels
        for block in self.decoder_blocks:
            yield block, width
            width = block.after(width)

    def layers(self) -> Iterator[Layer]:
        """Every 3x3x3 convolution, in decode order."""
        yield Layer(self.latent_channels, self.bottleneck_channels)
        for block, width in self.blocks():
            if isinstance(block, ResBlocks):
                yield from [Layer(width, width)] * (2 * block.num_layers)
            elif isinstance(block, ResBlockNarrowing):
                narrow = block.after(width)
                yield from (Layer(width, narrow), Layer(narrow, narrow))
            else:
                yield Layer(width, width * math.prod(block.stride) // block.multiplier, block.stride)
        yield Layer(self.base_channels, self.out_channels * self.patch_size**2)

    @property
    def bottleneck_channels(self) -> int:
        """Channels after `conv_in`."""
        width = self.base_channels
        for block in reversed(self.decoder_blocks):
            width = block.before(width)
        return width

    def narrowed(self, widths: Mapping[int, tuple[int, int]]) -> DecoderConfig:
        """The config with these channels before and after its narrowing blocks, by their numbers."""
        blocks = [
            ResBlockNarrowing.between(*widths[number])
            if isinstance(block, ResBlockNarrowing) and number in widths
            else block
            for number, block in enumerate(self.decoder_blocks)
        ]
        return replace(self, decoder_blocks=tuple(blocks))

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * math.prod(layer.stride[1] for layer in self.layers())

    @property
    def temporal_scale(self) -> int:
        """Frames per latent: F latents give temporal_scale * (F - 1) + 1 frames."""
        return math.prod(layer.stride[0] for layer in self.layers())

    @property
    def receptive_field(self) -> tuple[float, float, float]:
        """How far one output depends on latents to either side, in latents: time, height, width.

        The sum over all 3x3x3 convolutions of 1 / (the scale at which they run). A causal decoder
        looks twice as far back in time and not ahead.
        """
        scale, reach = [1, 1, 1], [0.0, 0.0, 0.0]
        for layer in self.layers():
            reach = [r + 1 / s for r, s in zip(reach, scale, strict=True)]
            scale = [s * p for s, p in zip(scale, layer.stride, strict=True)]
        return reach[0], reach[1], reach[2]

    @property
    def parameters(self) -> int:
        """Parameters of the decoder, without the per-channel statistics."""
        count = sum(
            27 * layer.in_channels * layer.out_channels + layer.out_channels for layer in self.layers()
        )
        for block, width in self.blocks():
            if isinstance(block, ResBlockNarrowing):
                narrow = block.after(width)
                count += 2 * width + width * narrow + narrow
            elif isinstance(block, ResBlocks):
                count += 2 * width * block.num_layers * block.inject_noise
                if self.timestep_conditioning:
                    count += 4 * width * block.num_layers + _embedder_parameters(4 * width)
        if self.timestep_conditioning:
            count += 2 * self.base_channels + _embedder_parameters(2 * self.base_channels) + 1
        return count

    @property
    def operations_per_latent(self) -> int:
        """Multiplications and additions of the convolutions per latent position of a long, large decode."""
        scale, count = 1, 0
        for layer in self.layers():
            count += 54 * layer.in_channels * layer.out_channels * scale
            scale *= math.prod(layer.stride)
        return count


def _check_block(index: int, block: Block, width: int) -> None:
    where = f"decoder_blocks[{index}]"
    if isinstance(block, ResBlockNarrowing) and block.widths:
        if block.widths[0] != width or min(block.widths) < 1:
            raise ValueError(
                f"{where}: widths must begin with the {width} channels received, got {block.widths}"
            )
        return
    if isinstance(block, ResBlocks):
        _check_range(f"{where}: num_layers", block.num_layers, MOST_LAYERS)
        return
    _check_range(f"{where}: multiplier", block.multiplier, MOST_CHANNELS)
    if isinstance(block, Upsample):
        positions = math.prod(block.stride)
        if block.stride not in STRIDES.values():
            raise ValueError(f"{where}: stride must be one of {sorted(STRIDES.values())}, got {block.stride}")
        if block.residual and (width % positions or positions % block.multiplier):
            raise ValueError(
                f"{where}: a residual upsampler needs channels divisible by {positions} "
                f"and a multiplier that divides {positions}, got {width} and {block.multiplier}"
            )


def _check_range(what: str, value: int, most: int) -> None:
    if value < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")
    if value > most:
        raise ValueError(f"{what} must be at most {most}, got {value}")


def _embedder_parameters(width: int) -> int:
    return TIMESTEP_FEATURES * width + width + width * width + width
