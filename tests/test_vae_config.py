"""`DecoderConfig` from every published form of every version: equal, and with the published parameters."""

import json
import re
from dataclasses import replace

import pytest
from mlx.utils import tree_flatten
from vae_cases import VERSIONS, reference_file

from mlx_vae_tiling.vae.config import DecoderConfig, ResBlocks, Upsample
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import PUBLISHED, version_of


def res(num_layers, **options):
    return ["res_x", {"num_layers": num_layers, **options}]


def up(name="compress_all", **options):
    return [name, options]


UP = up(residual=True, multiplier=2)
LTX_2 = [res(5), UP, res(5), UP, res(5), UP, res(5)]
CLASS = {"_class_name": "CausalVideoAutoencoder", "latent_channels": 128, "patch_size": 4}
ORIGINAL = {
    "0.9.0": CLASS
    | {
        "blocks": [
            *(["res_x", 4], ["compress_all", 1], ["res_x_y", 1], ["res_x", 3], ["compress_all", 1]),
            *(["res_x_y", 1], ["res_x", 3], ["compress_all", 1], ["res_x", 3], ["res_x", 4]),
        ],
    },
    "0.9.1": CLASS
    | {
        "timestep_conditioning": True,
        "decoder_blocks": [
            *(res(5, inject_noise=True), UP, res(6, inject_noise=True), UP),
            *(res(7, inject_noise=True), UP, res(8, inject_noise=False)),
        ],
    },
    "0.9.5": CLASS | {"timestep_conditioning": True, "decoder_blocks": LTX_2},
    "ltx-2": CLASS | {"timestep_conditioning": False, "decoder_blocks": LTX_2},
    "ltx-2.3": CLASS
    | {
        "timestep_conditioning": False,
        "spatial_padding_mode": "zeros",
        "decoder_base_channels": 128,
        "decoder_blocks": [
            *(res(4), up("compress_space", multiplier=2), res(6), up("compress_time", multiplier=2)),
            *(res(4), up(multiplier=1), res(2), up(multiplier=2), res(2)),
        ],
    },
}
ORIGINAL["ltx-2.3-pruna"] = ORIGINAL["ltx-2.3"] | {
    "decoder_base_channels": 64,
    "decoder_blocks": [
        *ORIGINAL["ltx-2.3"]["decoder_blocks"][:4],
        ["res_x_y", {"in_channels": 384, "out_channels": 256}],
        *ORIGINAL["ltx-2.3"]["decoder_blocks"][4:6],
        ["res_x_y", {"in_channels": 512, "out_channels": 384}],
        *ORIGINAL["ltx-2.3"]["decoder_blocks"][6:],
    ],
}
RESIDUAL = {
    "decoder_block_out_channels": [256, 512, 1024],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "decoder_spatio_temporal_scaling": [True] * 3,
    "decoder_inject_noise": [False] * 4,
    "upsample_residual": [True] * 3,
    "upsample_factor": [2] * 3,
    "decoder_causal": False,
}
DIFFUSERS = {
    # As published: the rest are the defaults of the class.
    "0.9.0": {
        "_class_name": "AutoencoderKLLTXVideo",
        "block_out_channels": [128, 256, 512, 512],
        "decoder_causal": False,
        "layers_per_block": [4, 3, 3, 3, 4],
        "patch_size": 4,
        "spatio_temporal_scaling": [True, True, True, False],
    },
    "0.9.1": RESIDUAL
    | {
        "_class_name": "AutoencoderKLLTXVideo",
        "decoder_layers_per_block": [5, 6, 7, 8],
        "decoder_inject_noise": [True, True, True, False],
        "timestep_conditioning": True,
    },
    "0.9.5": RESIDUAL | {"_class_name": "AutoencoderKLLTXVideo", "timestep_conditioning": True},
    "ltx-2": RESIDUAL | {"_class_name": "AutoencoderKLLTX2Video", "decoder_spatial_padding_mode": "reflect"},
    "ltx-2.3": {
        "_class_name": "AutoencoderKLLTX2Video",
        "decoder_block_out_channels": [256, 512, 512, 1024],
        "decoder_layers_per_block": [4, 6, 4, 2, 2],
        "decoder_spatio_temporal_scaling": [True] * 4,
        "decoder_inject_noise": [False] * 5,
        "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
        "upsample_residual": [False] * 4,
        "upsample_factor": [2, 2, 1, 2],
        "decoder_causal": False,
        "decoder_spatial_padding_mode": "zeros",
    },
}
DIFFUSERS["ltx-2.3-pruna"] = DIFFUSERS["ltx-2.3"] | {"decoder_block_out_channels": [128, 256, 384, 1024]}
# Of the published files: sums over their headers, without the statistics.
PARAMETERS = {
    "0.9.0": 238_789_296,
    "0.9.1": 754_572_081,
    "0.9.5": 552_814_641,
    "ltx-2": 528_380_720,
    "ltx-2.3": 407_169_072,
    # With the encoder's 318,936,897, two bytes each, the published 1.33 GB.
    "ltx-2.3-pruna": 345_006_256,
}
NAMES = dict(zip(VERSIONS, PUBLISHED, strict=False))


def shapes_of(config, in_torch_order):
    """Original names and shapes of a decoder; nothing is allocated."""
    shapes = {}
    for name, value in tree_flatten(VideoDecoder(config).parameters()):
        shape = value.shape
        if len(shape) == 5 and in_torch_order:
            shape = (shape[0], shape[4], *shape[1:4])
        shapes[f"vae.decoder.{name}"] = shape
    return shapes


@pytest.mark.parametrize("version", VERSIONS)
def test_all_forms_agree(version):
    config = DecoderConfig.from_original(ORIGINAL[version])
    assert DecoderConfig.from_original({"vae": ORIGINAL[version], "transformer": {}}) == config
    assert DecoderConfig.from_diffusers(DIFFUSERS[version]) == config
    assert PUBLISHED[NAMES[version]].config == config
    if version != "ltx-2.3-pruna":
        config = replace(config, base_channels=8)
    assert version_of(config) == PUBLISHED[NAMES[version]]


@pytest.mark.parametrize("version", VERSIONS)
def test_forms_of_the_reference_agree(version):
    metadata = reference_file(version)[1]
    original = DecoderConfig.from_original(json.loads(metadata["config"]))
    assert DecoderConfig.from_diffusers(json.loads(metadata["diffusers_config"])) == original


@pytest.mark.parametrize("version", VERSIONS)
def test_parameters_are_the_published_ones(version):
    config = DecoderConfig.from_original(ORIGINAL[version])
    assert config.parameters == PARAMETERS[version]
    statistics = 2 * config.latent_channels
    sizes = [value.size for _, value in tree_flatten(VideoDecoder(config).parameters())]
    assert sum(sizes) == PARAMETERS[version] + statistics


@pytest.mark.parametrize("in_torch_order", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_shapes(version, in_torch_order):
    config = DecoderConfig.from_original(ORIGINAL[version])
    shapes = shapes_of(config, in_torch_order)
    told = {"residual": True} if version == "ltx-2" else {}
    if version.startswith("0.9") or version == "ltx-2.3-pruna":
        assert DecoderConfig.from_shapes(shapes) == config
    else:
        with pytest.raises(ValueError, match="cannot tell the spatial padding; pass spatial_padding_mode="):
            DecoderConfig.from_shapes(shapes, **told)
    assert (
        DecoderConfig.from_shapes(shapes, spatial_padding_mode=config.spatial_padding_mode, **told) == config
    )
    if told:
        with pytest.raises(
            ValueError, match=r"cannot tell whether .* residual; pass residual=True for LTX-2"
        ):
            DecoderConfig.from_shapes(shapes, spatial_padding_mode="reflect")
    if version == "ltx-2.3-pruna":
        with pytest.raises(ValueError, match=r"must end with base_channels \(8\), got 64"):
            replace(config, base_channels=8)
    base = 64 if version == "ltx-2.3-pruna" else 8
    narrow = replace(config, base_channels=base, latent_channels=16, patch_size=2)
    told["spatial_padding_mode"] = config.spatial_padding_mode
    assert DecoderConfig.from_shapes(shapes_of(narrow, in_torch_order), **told) == narrow


def test_geometry():
    config = PUBLISHED["ltx-2.3"].config
    assert (config.spatial_scale, config.temporal_scale) == (32, 8)
    time, height, width = config.receptive_field
    # 1 + 4 + 1 convolutions at scale 1, 4 + 1 at 2, 8 + 1 at 4 (time; space too, until 5), ...
    assert time == 6 + 5 / 2 + 9 / 4 + (12 + 1 + 8 + 1) / 8 == 13.5
    assert height == width == 6 + 5 / 2 + (9 + 12 + 1) / 4 + 9 / 8 == 15.125
    assert config.bottleneck_channels == 1024


@pytest.mark.parametrize(
    ("original", "padding"),
    [
        ({}, "reflect"),
        ({"timestep_conditioning": True}, "zeros"),
        ({"spatial_padding_mode": "zeros"}, "zeros"),
        ({"decoder_spatial_padding_mode": "zeros", "spatial_padding_mode": "reflect"}, "zeros"),
    ],
)
def test_padding_of_original_configs(original, padding):
    config = DecoderConfig.from_original({"decoder_blocks": LTX_2} | original)
    assert config.spatial_padding_mode == padding


def test_class_defaults_of_diffusers():
    config = DecoderConfig.from_diffusers({"_class_name": "AutoencoderKLLTX2Video"})
    assert (config.causal, config.spatial_padding_mode) == (True, "reflect")
    assert config.decoder_blocks == PUBLISHED["ltx-2"].config.decoder_blocks


def original_with(*block, **options):
    return DecoderConfig.from_original, {"decoder_blocks": [list(block) or res(2)], **options}


def diffusers_with(**options):
    return DecoderConfig.from_diffusers, DIFFUSERS["ltx-2.3"] | options


ONE_KERNEL = {
    "decoder.conv_out.conv.weight": (48, 128, 3, 3, 3),
    "decoder.conv_in.conv.weight": (128, 8, 3, 3, 3),
}
ERRORS = [
    (*original_with(_class_name="CausalDiffusionVAE"), "a CausalVideoAutoencoder, got CausalDiffusionVAE"),
    (
        *original_with(_class_name="AutoencoderKL"),
        "must be a CausalVideoAutoencoder, got AutoencoderKL: not an",
    ),
    (*original_with("attn_res_x", {}), "decoder block 'attn_res_x' is not supported; supported are res_x"),
    (*original_with("res_x", 0), r"decoder_blocks\[0\]: num_layers must be at least 1, got 0"),
    (
        *original_with("compress_all", {"multiplier": 0}),
        r"decoder_blocks\[0\]: multiplier must be at least 1",
    ),
    (*original_with(latent_channels=0), "latent_channels must be a positive integer, got 0"),
    (*original_with(spatial_padding_mode="replicate"), "must be 'zeros' or 'reflect', got 'replicate'"),
    (*original_with(norm_layer="group_norm"), "norm_layer must be 'pixel_norm', got 'group_norm'"),
    (DecoderConfig.from_original, {"a": 1}, r"needs 'decoder_blocks' or 'blocks', got the keys \['a'\]"),
    (
        *diffusers_with(_class_name="LTX2VideoDiffusionDecoderModel"),
        "got LTX2VideoDiffusionDecoderModel: not",
    ),
    (*diffusers_with(_class_name="AutoencoderKLWan"), "got AutoencoderKLWan: not an LTX video VAE"),
    (*diffusers_with(upsample_factor=[2]), "upsample_factor must have 4 entries beside 4 .*, got 1"),
    (*diffusers_with(decoder_inject_noise=[False]), "decoder_inject_noise must have 5 entries"),
    (DecoderConfig.from_shapes, {}, "needs a kernel of rank 5 named 'conv_out.conv.weight', got None"),
    (DecoderConfig.from_shapes, {"conv_out.conv.weight": (48, 128)}, r"rank 5 named .*, got \(48, 128\)"),
    (
        DecoderConfig.from_shapes,
        ONE_KERNEL | {"decoder.up_blocks.0.conv.conv.weight": (384, 128, 3, 3, 3)},
        re.escape("up_blocks.0.conv maps 128 to 384 channels before a width of 128: no LTX upsampler"),
    ),
]


@pytest.mark.parametrize(("read", "described", "message"), ERRORS)
def test_errors(read, described, message):
    with pytest.raises(ValueError, match=message):
        read(described)


def test_residual_upsampling_needs_channels_that_divide():
    with pytest.raises(ValueError, match=r"decoder_blocks\[0\]: .* multiplier that divides 8, got 24 and 3"):
        DecoderConfig((Upsample((2, 2, 2), 3, residual=True), ResBlocks(1)), base_channels=8)
    with pytest.raises(ValueError, match=r"channels divisible by 8 .*, got 6 and 2"):
        DecoderConfig((Upsample((2, 2, 2), 2, residual=True), ResBlocks(1)), base_channels=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_blocks": "res_x"}, "decoder_blocks must be a tuple of blocks, got 'res_x'"),
        ({"decoder_blocks": ("res_x",)}, r"decoder_blocks\[0\] must be a block, got 'res_x'"),
        ({"causal": "yes"}, "causal must be True or False, got 'yes'"),
        ({"timestep_conditioning": 1}, "timestep_conditioning must be True or False, got 1"),
    ],
)
def test_values_of_another_type_are_refused(changes, message):
    with pytest.raises(TypeError, match=message):
        replace(PUBLISHED["ltx-2.3"].config, **changes)


@pytest.mark.parametrize("given", ["demo", None, [1]])
def test_what_is_no_object_of_json_is_refused(given):
    for read, name in (
        (DecoderConfig.from_original, "config"),
        (DecoderConfig.from_diffusers, "config"),
        (DecoderConfig.from_shapes, "name_to_shape"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be .*, got {re.escape(repr(given))}"):
            read(given)
    with pytest.raises(TypeError, match=r"config\['vae'\] must be the object in the JSON, got"):
        DecoderConfig.from_original({"vae": given})
