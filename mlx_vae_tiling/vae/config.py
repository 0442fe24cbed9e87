"""What a decoder is made of: `DecoderConfig`, read from every form in which one is published."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PaddingMode = Literal["zeros", "reflect"]
Stride = tuple[int, int, int]

STRIDES: dict[str, Stride] = {
    "compress_all": (2, 2, 2),
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
}
TIMESTEP_FEATURES = 256
"""Width of the sinusoidal embedding of a timestep."""


@dataclass(frozen=True)
class ResBlocks:
    """`res_x`: residual blocks of equal width."""

    num_layers: int
    inject_noise: bool = False


@dataclass(frozen=True)
class ResBlockNarrowing:
    """`res_x_y`: one residual block that divides the channels by `multiplier`."""

    multiplier: int = 2


@dataclass(frozen=True)
class Upsample:
    """`compress_*`: depth-to-space by `stride`, with the channels divided by `multiplier`."""

    stride: Stride
    multiplier: int = 1
    residual: bool = False


Block = ResBlocks | ResBlockNarrowing | Upsample


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
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if not self.decoder_blocks:
            raise ValueError("decoder_blocks must name at least one block, got none")
        if self.spatial_padding_mode not in ("zeros", "reflect"):
            raise ValueError(
                f"spatial_padding_mode must be 'zeros' or 'reflect', got {self.spatial_padding_mode!r}"
            )
        if self.norm_layer != "pixel_norm":
            raise ValueError(f"norm_layer must be 'pixel_norm', got {self.norm_layer!r}")
        for index, (block, width) in enumerate(self.blocks()):
            _check_block(index, block, width)

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
        vae = config.get("vae", config)
        _check_class(vae.get("_class_name", "CausalVideoAutoencoder"))
        published = vae.get("decoder_blocks", vae.get("blocks"))
        if not published:
            raise ValueError(f"a VAE config needs 'decoder_blocks' or 'blocks', got the keys {sorted(vae)}")
        conditioned = bool(vae.get("timestep_conditioning", False))
        default_padding = "zeros" if conditioned or "decoder_blocks" not in vae else "reflect"
        padding = vae.get("decoder_spatial_padding_mode", vae.get("spatial_padding_mode"))
        return cls(
            decoder_blocks=tuple(_parse_block(name, options) for name, options in reversed(published)),
            latent_channels=vae.get("latent_channels", 128),
            out_channels=vae.get("out_channels", 3),
            base_channels=vae.get("decoder_base_channels", vae.get("base_channels", 128)),
            patch_size=vae.get("patch_size", 4),
            causal=bool(vae.get("causal_decoder", False)),
            timestep_conditioning=conditioned,
            spatial_padding_mode=padding or default_padding,
            norm_layer=vae.get("norm_layer", "pixel_norm"),
        )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads a diffusers `vae/config.json`; missing keys take the defaults of diffusers' class.

        Args:
            config: The JSON of an `AutoencoderKLLTXVideo` or `AutoencoderKLLTX2Video`.

        Raises:
            ValueError: If the class is another one, or its tuples do not fit each other.
        """
        name = config.get("_class_name", "AutoencoderKLLTXVideo")
        if name not in _DIFFUSERS_DEFAULTS:
            _check_class(name)
        values = {**_DIFFUSERS_DEFAULTS[name], **config}
        blocks, base_channels = _parse_diffusers_blocks(values)
        return cls(
            decoder_blocks=blocks,
            latent_channels=values["latent_channels"],
            out_channels=values["out_channels"],
            base_channels=base_channels,
            patch_size=values["patch_size"],
            causal=bool(values["decoder_causal"]),
            timestep_conditioning=bool(values["timestep_conditioning"]),
            spatial_padding_mode=values["decoder_spatial_padding_mode"],
        )

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
        shapes = {name.removeprefix("vae.").removeprefix("decoder."): s for name, s in name_to_shape.items()}
        return _infer_config(shapes, spatial_padding_mode, residual)

    def blocks(self) -> Iterator[tuple[Block, int]]:
        """The blocks in decode order, each with the channels it receives."""
        width = self.bottleneck_channels
        for block in self.decoder_blocks:
            yield block, width
            width //= 1 if isinstance(block, ResBlocks) else block.multiplier

    def layers(self) -> Iterator[Layer]:
        """Every 3x3x3 convolution, in decode order."""
        yield Layer(self.latent_channels, self.bottleneck_channels)
        for block, width in self.blocks():
            if isinstance(block, ResBlocks):
                yield from [Layer(width, width)] * (2 * block.num_layers)
            elif isinstance(block, ResBlockNarrowing):
                narrow = width // block.multiplier
                yield from (Layer(width, narrow), Layer(narrow, narrow))
            else:
                yield Layer(width, width * math.prod(block.stride) // block.multiplier, block.stride)
        yield Layer(self.base_channels, self.out_channels * self.patch_size**2)

    @property
    def bottleneck_channels(self) -> int:
        """Channels after `conv_in`."""
        multipliers = (b.multiplier for b in self.decoder_blocks if not isinstance(b, ResBlocks))
        return self.base_channels * math.prod(multipliers)

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
                narrow = width // block.multiplier
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
    if isinstance(block, ResBlocks):
        if block.num_layers < 1:
            raise ValueError(f"{where}: num_layers must be at least 1, got {block.num_layers}")
        return
    if block.multiplier < 1:
        raise ValueError(f"{where}: multiplier must be at least 1, got {block.multiplier}")
    if isinstance(block, Upsample):
        positions = math.prod(block.stride)
        if block.stride not in STRIDES.values():
            raise ValueError(f"{where}: stride must be one of {sorted(STRIDES.values())}, got {block.stride}")
        if block.residual and (width % positions or positions % block.multiplier):
            raise ValueError(
                f"{where}: a residual upsampler needs channels divisible by {positions} "
                f"and a multiplier that divides {positions}, got {width} and {block.multiplier}"
            )


def _check_class(name: str) -> None:
    if name in ("CausalDiffusionVAE", "LTX2VideoDiffusionDecoderModel"):
        raise ValueError(
            f"diffusion decoders are not supported, got {name}; LTX-2.5's convolutional file "
            "ltx-2.5-video-vae-conv-bf16.safetensors decodes the same latents"
        )
    if name != "CausalVideoAutoencoder":
        raise ValueError(f"the VAE must be a CausalVideoAutoencoder, got {name}: not an LTX video VAE")


def _parse_block(name: str, options: int | Mapping[str, Any]) -> Block:
    # A bare integer means num_layers, whatever the block: "compress_all", 1 has multiplier 1.
    given: Mapping[str, Any] = {"num_layers": options} if isinstance(options, int) else options
    if name == "res_x":
        return ResBlocks(int(given["num_layers"]), bool(given.get("inject_noise", False)))
    if name == "res_x_y":
        return ResBlockNarrowing(int(given.get("multiplier", 2)))
    if name in STRIDES:
        return Upsample(STRIDES[name], int(given.get("multiplier", 1)), bool(given.get("residual", False)))
    raise ValueError(
        f"decoder block {name!r} is not supported; supported are res_x, res_x_y, {', '.join(STRIDES)}"
    )


_DIFFUSERS_LTX: dict[str, Any] = {
    "latent_channels": 128,
    "out_channels": 3,
    "patch_size": 4,
    "decoder_block_out_channels": (128, 256, 512, 512),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1, 1, 1, 1),
    "upsample_type": None,
    "timestep_conditioning": False,
    "decoder_causal": False,
    "decoder_spatial_padding_mode": "zeros",
}
_DIFFUSERS_DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKLLTXVideo": _DIFFUSERS_LTX,
    "AutoencoderKLLTX2Video": {
        **_DIFFUSERS_LTX,
        "decoder_block_out_channels": (256, 512, 1024),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2, 2, 2),
        "decoder_causal": True,
        "decoder_spatial_padding_mode": "reflect",
    },
}
_DIFFUSERS_STRIDES = {
    "spatiotemporal": STRIDES["compress_all"],
    "temporal": STRIDES["compress_time"],
    "spatial": STRIDES["compress_space"],
}


def _parse_diffusers_blocks(values: Mapping[str, Any]) -> tuple[tuple[Block, ...], int]:
    """Blocks and base channels. Every tuple is written pixels first, except `upsample_type`."""
    widths = values["decoder_block_out_channels"][::-1]
    kinds = values["upsample_type"] or ("spatiotemporal",) * len(widths)
    columns = {
        "decoder_layers_per_block": values["decoder_layers_per_block"][::-1],
        "decoder_inject_noise": values["decoder_inject_noise"][::-1],
        "decoder_spatio_temporal_scaling": values["decoder_spatio_temporal_scaling"][::-1],
        "upsample_residual": values["upsample_residual"][::-1],
        "upsample_factor": values["upsample_factor"][::-1],
        "upsample_type": kinds,
    }
    for name, column in columns.items():
        expected = len(widths) + (name in ("decoder_layers_per_block", "decoder_inject_noise"))
        if len(column) != expected:
            raise ValueError(
                f"{name} must have {expected} entries beside {len(widths)} decoder_block_out_channels, "
                f"got {len(column)}"
            )
    layers, noise, scaling, residual, factors, kinds = columns.values()
    blocks: list[Block] = [ResBlocks(layers[0], bool(noise[0]))]
    width = widths[0]
    for index, published_width in enumerate(widths):
        received, width = width // factors[index], published_width // factors[index]
        if received != width:
            blocks.append(ResBlockNarrowing(received // width))
        if scaling[index]:
            stride = _DIFFUSERS_STRIDES[kinds[index]]
            blocks.append(Upsample(stride, factors[index], bool(residual[index])))
        blocks.append(ResBlocks(layers[index + 1], bool(noise[index + 1])))
    return tuple(blocks), width


def _infer_config(
    shapes: Mapping[str, Sequence[int]], padding: PaddingMode | None, residual: bool | None
) -> DecoderConfig:
    def channels(name: str) -> tuple[int, int]:
        if name not in shapes or len(shapes[name]) != 5:
            raise ValueError(
                f"an LTX decoder needs a kernel of rank 5 named {name!r}, got {shapes.get(name)}"
            )
        out, second, *_, last = shapes[name]
        return out, (second if last in (1, 3) and second != last else last)

    indices = sorted({int(m[1]) for name in shapes if (m := re.match(r"up_blocks\.(\d+)\.", name))})
    base_channels = channels("conv_out.conv.weight")[1]
    blocks: list[Block] = []
    width = base_channels
    for index in reversed(indices):
        prefix = f"up_blocks.{index}."
        members = {
            m[1] for name in shapes if (m := re.match(re.escape(prefix) + r"res_blocks\.(\d+)\.", name))
        }
        if members:
            blocks.append(ResBlocks(len(members), f"{prefix}res_blocks.0.per_channel_scale1" in shapes))
        elif f"{prefix}conv1.conv.weight" in shapes:
            out, received = channels(f"{prefix}conv1.conv.weight")
            blocks.append(ResBlockNarrowing(received // out))
            width = received
        else:
            out, received = channels(f"{prefix}conv.conv.weight")
            strides = {math.prod(stride): stride for stride in STRIDES.values()}
            if out % width or received % width or out // width not in strides:
                raise ValueError(
                    f"{prefix}conv maps {received} to {out} channels before a width of {width}: no LTX upsampler"
                )
            blocks.append(Upsample(strides[out // width], received // width))
            width = received
    blocks.reverse()
    conditioned = "last_scale_shift_table" in shapes
    is_ltx_video = conditioned or any(isinstance(block, ResBlockNarrowing) for block in blocks)
    if padding is None and not is_ltx_video:
        raise ValueError(
            "shapes cannot tell the spatial padding; pass spatial_padding_mode='reflect' for LTX-2 "
            "or 'zeros' for LTX-2.3 and LTX-2.5"
        )
    upsamples = [block for block in blocks if isinstance(block, Upsample)]
    all_alike = all(block.stride == (2, 2, 2) and block.multiplier == 2 for block in upsamples)
    if residual is None and all_alike and not conditioned:
        raise ValueError("shapes cannot tell whether upsampling is residual; pass residual=True for LTX-2")
    residual = all_alike if residual is None else residual
    latent_channels, patch_area = channels("conv_in.conv.weight")[1], channels("conv_out.conv.weight")[0] // 3
    return DecoderConfig(
        decoder_blocks=tuple(
            Upsample(b.stride, b.multiplier, residual) if isinstance(b, Upsample) else b for b in blocks
        ),
        latent_channels=latent_channels,
        base_channels=base_channels,
        patch_size=math.isqrt(patch_area),
        timestep_conditioning=conditioned,
        spatial_padding_mode=padding or "zeros",
    )


def _embedder_parameters(width: int) -> int:
    return TIMESTEP_FEATURES * width + width + width * width + width
