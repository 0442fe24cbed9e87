"""Every file layout gives back the decoder it was written from; everything else gives one clear error."""

import json
import os
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint_files import (
    bare,
    combined,
    decoder_of,
    diffusers,
    diffusers_json,
    malformed,
    mlx_forge,
    mlx_video,
    original_json,
    parameters,
    split,
    write,
    write_json,
)

from mlx_vae_tiling.checkpoints import load
from mlx_vae_tiling.checkpoints.configs import read_config
from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.published import PUBLISHED, version_of

LTX_VIDEO, LTX_2 = ("0.9.0", "0.9.1", "0.9.5"), ("ltx-2", "ltx-2.3", "ltx-2.3-pruna")
ALL = LTX_VIDEO + LTX_2
TITLES = dict(zip(ALL, [version.title for version in PUBLISHED.values()], strict=False))
NONSENSE = {"ch": 128, "ch_mult": [1, 2, 4], "z_channels": 8, "timestep_conditioning": False}


@lru_cache
def decoder(version, dtype=mx.float32):
    return decoder_of(version, dtype)


def in_comfyui_checkpoint(folder, version):
    return write(folder / "ltx.safetensors", combined(decoder(version)), original_json(version))


def in_split_file(folder, version):
    return write(folder / "video_vae.safetensors", split(decoder(version)), original_json(version))


def in_file_of_another_name(folder, version):
    return write(folder / "blob", split(decoder(version)), original_json(version))


def in_file_without_config(folder, version):
    return write(folder / "vae.safetensors", split(decoder(version)))


def in_diffusers_repository(folder, version):
    write(folder / "transformer/model.safetensors", {"proj_in.weight": mx.zeros((2, 2))})
    write_json(folder / "config.json", {"_class_name": "LTXVideoTransformer3DModel"})
    write_json(folder / "vae/config.json", diffusers_json(version))
    write(folder / "vae/diffusion_pytorch_model.safetensors", diffusers(decoder(version)))
    return folder


def in_diffusers_shards(folder, version):
    tensors = diffusers(decoder(version))
    names = sorted(tensors)
    for shard, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
        path = folder / f"diffusion_pytorch_model-{shard:05}-of-00003.safetensors"
        write(path, {name: tensors[name] for name in part})
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}})
    write_json(folder / "config.json", diffusers_json(version))
    return folder


def in_one_of_diffusers_shards(folder, version):
    return in_diffusers_shards(folder, version) / "diffusion_pytorch_model-00002-of-00003.safetensors"


def in_fastvideo_repository(folder, version):
    config = {"vae": original_json(version), "_class_name": "CausalVideoAutoencoder"}
    write_json(folder / "vae/config.json", config)
    write(folder / "vae/model.safetensors", split(decoder(version)))
    return folder


def in_mlx_video_repository(folder, version):
    # Its converter writes "zeros" where the original config says nothing, also for LTX-2.
    write_json(folder / "vae/decoder/config.json", NONSENSE | {"spatial_padding_mode": "zeros"})
    write(folder / "vae/decoder/model.safetensors", mlx_video(decoder(version)))
    write(folder / "vae/encoder/model.safetensors", {"conv_in.conv.weight": mx.zeros((8, 3, 3, 3, 48))})
    return folder


def in_mlx_video_repository_of_2_5(folder, version):
    write_json(folder / "vae/decoder/config.json", original_json(version))
    write(folder / "vae/decoder/model.safetensors", mlx_video(decoder(version)))
    return folder / "vae"


def in_mlx_forge_repository(folder, version):
    write_json(folder / "embedded_config.json", {"vae": original_json(version), "vocoder": {}})
    write_json(folder / "config.json", {"model_type": "ltx"})
    write(folder / "vae_decoder.safetensors", mlx_forge(decoder(version)))
    write(folder / "vae_encoder.safetensors", {"vae_encoder.conv_in.conv.weight": mx.zeros((8, 3, 3, 3, 48))})
    write(folder / "transformer.safetensors", {"transformer.proj_in.scales": mx.zeros((2, 2))})
    return folder


def in_unified_file(folder, version):
    write_json(folder / "embedded_config.json", {"vae": original_json(version)})
    tensors = malformed(decoder(version)) | {"vae_encoder.conv_in.conv.weight": mx.zeros((8, 3, 3, 3, 48))}
    return write(folder / "model.safetensors", tensors | {"transformer.proj_in.weight": mx.zeros((2, 2))})


def in_bare_file(folder, version):
    write_json(folder / "embedded_config.json", {"vae": original_json(version)})
    return write(folder / "vae_decoder.safetensors", bare(decoder(version)))


LAYOUTS = [
    (in_comfyui_checkpoint, ALL, "combined"),
    (in_split_file, ALL, "original"),
    (in_file_of_another_name, ("ltx-2.3",), "original"),
    (in_file_without_config, LTX_VIDEO, "original"),
    (in_diffusers_repository, ALL, "diffusers"),
    (in_diffusers_shards, ("0.9.1", "ltx-2.3"), "diffusers"),
    (in_one_of_diffusers_shards, ("ltx-2",), "diffusers"),
    (in_fastvideo_repository, LTX_2, "original"),
    (in_mlx_video_repository, LTX_2, "mlx-video"),
    (in_mlx_video_repository_of_2_5, ("ltx-2.3",), "mlx-video"),
    (in_mlx_forge_repository, ("ltx-2.3",), "mlx-forge"),
    (in_unified_file, LTX_2, "mlx-forge"),
    (in_bare_file, LTX_2, "bare"),
]
CASES = [(make, version, word) for make, versions, word in LAYOUTS for version in versions]


@pytest.mark.parametrize(("make", "version", "layout"), CASES, ids=[f"{m.__name__}-{v}" for m, v, _ in CASES])
def test_layouts_give_back_the_decoder(make, version, layout, tmp_path):
    source = make(tmp_path, version)
    expected, loaded = decoder(version), load_decoder(source)
    assert loaded.config == expected.config
    values = parameters(expected)
    assert parameters(loaded).keys() == values.keys()
    for name, value in parameters(loaded).items():
        assert mx.array_equal(value, values[name]), name
    latents = mx.random.normal((1, expected.config.latent_channels, 1, 2, 3))
    assert mx.array_equal(loaded(latents), expected(latents))
    info = describe_checkpoint(str(source))
    assert (info.layout, info.version, info.dtype) == (layout, TITLES[version], "float32")
    assert info.config == expected.config
    assert info.decoder_bytes == sum(value.nbytes for value in values.values())
    assert info.path.is_file()


def test_demo():
    demo = load_decoder("demo")
    assert describe_checkpoint("demo").version == "LTX-2.3 / 2.5"
    assert demo(mx.zeros((1, 128, 1, 1, 1))).shape == (1, 3, 1, 32, 32)


def test_malformed_kernels_are_written_malformed():
    shapes = {value.shape[1:] for value in malformed(decoder("ltx-2")).values() if value.ndim == 5}
    assert {shape for shape in shapes if shape[3] == 3} and {shape for shape in shapes if shape[2] == 3}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, mx.bfloat16),
        *((name, mx.float32) for name in ("float32", "fp32", mx.float32)),
        *((name, mx.float16) for name in ("float16", "fp16", mx.float16)),
        *((name, mx.bfloat16) for name in ("bfloat16", "bf16", mx.bfloat16)),
    ],
)
def test_dtypes(given, expected, tmp_path):
    stored = decoder("0.9.1", mx.bfloat16)
    tensors = split(stored)
    # Mixed dtypes follow the kernel of conv_in; statistics stay as they are.
    tensors["decoder.conv_out.conv.bias"] = tensors["decoder.conv_out.conv.bias"].astype(mx.float32)
    tensors["per_channel_statistics.std-of-means"] = mx.arange(8) / 3
    path = write(tmp_path / "vae.safetensors", tensors, original_json("0.9.1"))
    loaded, values = parameters(load_decoder(path, dtype=given)), parameters(stored)
    assert mx.array_equal(loaded.pop("per_channel_statistics.std"), mx.arange(8) / 3)
    assert loaded.pop("per_channel_statistics.mean").dtype == mx.bfloat16
    assert {value.dtype for value in loaded.values()} == {expected}
    for name, value in loaded.items():
        assert mx.array_equal(value, values[name].astype(expected)), name
    assert describe_checkpoint(path).dtype == "bfloat16"


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_loading_peaks_at_the_decoder_and_one_tensor(dtype, tmp_path):
    stored = decoder_of("ltx-2.3", mx.bfloat16, base_channels=12)
    path = write(tmp_path / "ltx.safetensors", combined(stored), original_json("ltx-2.3"))
    sizes = [value.size * dtype.size for value in parameters(stored).values()]
    config = stored.config
    del stored
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loaded = load_decoder(path, config=config, dtype=dtype)
    assert 0.99 * sum(sizes) <= mx.get_peak_memory() - before <= sum(sizes) + max(sizes)
    assert mx.get_active_memory() - before <= 1.01 * sum(sizes)
    mx.eval(loaded.parameters())
    assert mx.get_active_memory() - before <= 1.01 * sum(sizes)


def test_only_the_decoder_is_read(tmp_path, monkeypatch):
    path = tmp_path / "ltx.safetensors"
    tensors = combined(decoder("ltx-2"))
    write(path, tensors, original_json("ltx-2"))
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    size = 40 * 2**30
    offset = len(data) - end
    header["zzz.weight"] = {"dtype": "F8_E5M2", "shape": [size], "data_offsets": [offset, offset + size]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    os.truncate(path, path.stat().st_size + size)
    read = []
    fromfile = load.np.fromfile

    def spy(file, dtype, count, offset):
        values = fromfile(file, dtype, count, offset=offset)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(load.np, "fromfile", spy)
    loaded = load_decoder(path)
    assert sum(read) == describe_checkpoint(path).decoder_bytes
    assert mx.array_equal(loaded.conv_in.conv.weight, decoder("ltx-2").conv_in.conv.weight)


@pytest.mark.parametrize("version", ("ltx-2", "ltx-2.3"))
def test_config_can_be_given(version, tmp_path):
    path = write(tmp_path / "vae.safetensors", split(decoder(version)))
    with pytest.raises(ValueError, match=r"without a config, and shapes cannot tell .*config=.*'ltx-2'"):
        load_decoder(path)
    config = decoder(version).config
    for given in (config, original_json(version), {"vae": original_json(version)}, diffusers_json(version)):
        assert load_decoder(path, config=given).config == config
        assert describe_checkpoint(path, config=given).config == config
    reflecting = original_json(version) | {"spatial_padding_mode": "reflect"}
    overridden = write(tmp_path / "other.safetensors", split(decoder(version)), original_json(version))
    assert load_decoder(overridden, config=reflecting).config.spatial_padding_mode == "reflect"
    with pytest.raises(ValueError, match=r"must hold exactly .*; .* and \d+ more$"):
        load_decoder(path, config="ltx-2")


def test_stray_norms_are_dropped(tmp_path):
    tensors = split(decoder("0.9.0"))
    tensors["decoder.up_blocks.0.res_blocks.0.norm1.weight"] = mx.ones((8,))
    tensors["decoder.conv_norm_out.weight"] = mx.ones((8,))
    load_decoder(write(tmp_path / "vae.safetensors", tensors))


def test_of_several_files_the_one_with_a_decoder_is_chosen(tmp_path):
    write(tmp_path / "audio_vae.safetensors", {"decoder.conv_in.conv.weight": mx.zeros((8, 8, 3, 3))})
    write(tmp_path / "diffusion.safetensors", {"decoder.det_stages.0.0.norm1.weight": mx.zeros((8,))})
    path = in_split_file(tmp_path, "0.9.0")
    assert describe_checkpoint(tmp_path).path == path
    in_file_without_config(tmp_path, "0.9.0")
    with pytest.raises(
        ValueError, match=r"several files .*vae\.safetensors \(convol.*, video_vae\.safetensors"
    ):
        load_decoder(tmp_path)


def with_change(**changes):
    """A split file of 0.9.0 with other tensors, or without those that are None."""
    tensors = split(decoder("0.9.0")) | changes
    return {name: value for name, value in tensors.items() if value is not None}


KERNEL = "decoder.up_blocks.1.res_blocks.0.conv1.conv.weight"
INT8 = ("I8", (16, 16, 3, 3, 3), bytes(27 * 256))
TENSORS = [
    ({"decoder.conv_in.conv.bias": None}, r"must hold exactly .*: conv_in.conv.bias is missing$"),
    ({"decoder.extra.weight": mx.zeros((2,))}, r"exactly .*: decoder.extra.weight is surplus$"),
    ({KERNEL: mx.zeros((16, 8, 3, 3, 3))}, r"is \(16, 3, 3, 3, 8\) where \(16, 3, 3, 3, 16\) is expected$"),
    (
        {"decoder.conv_out.conv.bias": mx.zeros((49,))},
        r"conv_out.conv.bias is \(49,\) where \(48,\) is expec",
    ),
    ({"per_channel_statistics.std-of-means": None}, r"exactly .*: per_channel_statistics.std is missing$"),
    ({"per_channel_statistics.std": mx.ones((8,))}, r"exactly .*: per_channel_statistics.std.* is surplus$"),
    ({f"decoder.x{i}": mx.zeros((2,)) for i in range(7)}, r"x0 is surplus; .*x4 is surplus and 2 more$"),
    (
        {KERNEL: INT8},
        r"must be F32, F16 or BF16, got .*conv1.conv.weight \(I8\); load a VAE that is not quant",
    ),
    ({f"{KERNEL}_scale": mx.ones((16,))}, r"got .*weight_scale; load a VAE that is not quantised"),
    ({"decoder.up_blocks.1.attn.to_qkv.weight": mx.ones((16,))}, r"attention blocks are not supported, got"),
]


@pytest.mark.parametrize(("changes", "message"), TENSORS)
def test_tensors_must_be_those_of_the_config(changes, message, tmp_path):
    path = write(tmp_path / "vae.safetensors", with_change(**changes), original_json("0.9.0"))
    for function in (load_decoder, describe_checkpoint):
        with pytest.raises(ValueError, match=message) as raised:
            function(path)
        assert str(path) in str(raised.value)


def only(*names, shape=(8, 8, 3, 3, 3)):
    return {name: mx.zeros(shape) for name in names}


OTHERS = [
    (only("encoder.conv_in.conv.weight", "encoder.down_blocks.0.conv.weight"), r"encoder .* not its decoder"),
    (only("conv_in.conv.weight", "down_blocks.0.conv.weight"), r"encoder of a VAE but not its decoder"),
    (only("vae.encoder.down_blocks.0.conv.weight"), r"encoder of a VAE but not its decoder"),
    (only("decoder.1.weight", "encoder.0.weight", shape=(8, 8, 3, 3)), r"no LTX video decoder"),
    (
        only("model.diffusion_model.x", "vocoder.y"),
        r"no LTX video decoder: .* 2 tensors begin with model, voc",
    ),
    (only("decoder.conv_in.conv.weight", shape=(8, 8, 3, 3)), r"no LTX video decoder: a kernel of rank 5"),
    ({}, r"no LTX video decoder: .*no .safetensors file with tensors"),
]


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(("tensors", "message"), OTHERS)
def test_files_without_a_decoder(tensors, message, as_folder, tmp_path):
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        load_decoder(tmp_path if as_folder else path)


def header(**fields):
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def field(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BYTES = [
    (b"", r"\(0 bytes\) is not a safetensors file"),
    (b"version https://git-lfs.github.com/spec/v1\n", r"is not a safetensors file: it does not start"),
    (b"PK\x03\x04" + bytes(100), r"is not a safetensors file"),
    ((100).to_bytes(8, "little") + b'{"a": 1}', r"is truncated: .* at least 108 bytes, it has 16; .* again"),
    (header(x=field()) + bytes(7), r"is truncated: .* copy or download it again"),
    (header(x=field(shape=(3,))) + bytes(8), r"header cannot be read .*F32 \(3,\) cannot lie at 0 to 8"),
    (header(x=field(offsets=(8, 0))) + bytes(8), r"cannot lie at 8 to 0"),
    (header(x={"dtype": "F32"}) + bytes(8), r"header cannot be read \(KeyError\('shape'\)\)"),
    ((4).to_bytes(8, "little") + b"{]]}", r"header cannot be read"),
]


@pytest.mark.parametrize(("content", "message"), BYTES)
def test_files_that_are_no_safetensors(content, message, tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_decoder(path)


CONFIGS = [
    ({"config": "{"}, {}, r"the metadata of .* does not describe a decoder: Expecting"),
    (
        {"config": json.dumps({"vae": {"_class_name": "CausalDiffusionVAE"}})},
        {},
        r"diffusion decoder needs stage_channels",
    ),
    (
        {},
        {"config.json": {"_class_name": "AutoencoderKLWan"}},
        r"config.json .*must be a CausalVideoAutoencoder",
    ),
    ({}, {"embedded_config.json": {"vae": {"x": 1}}}, r"embedded_config.json .* needs 'decoder_blocks'"),
    ({}, {"config.json": {"spatial_padding_mode": "circular"}}, r"must be 'zeros' or 'reflect'"),
    (
        {"config": json.dumps({"transformer": {}})},
        {"config.json": [1]},
        r"without a config, and shapes cannot",
    ),
]


@pytest.mark.parametrize(("metadata", "side_files", "message"), CONFIGS)
def test_configs_that_describe_no_decoder(metadata, side_files, message, tmp_path):
    path = write(tmp_path / "vae.safetensors", split(decoder("ltx-2")), metadata=metadata)
    for name, value in side_files.items():
        write_json(tmp_path / name, value)
    with pytest.raises(ValueError, match=message):
        load_decoder(path)


def test_a_shard_is_missing(tmp_path):
    in_diffusers_shards(tmp_path, "0.9.0")
    (tmp_path / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"-00001-of-00003.safetensors needs all 3 shards in its folder, there are 2"
    ):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (
            "missing.safetensors",
            {},
            FileNotFoundError,
            r"no file or directory missing.safetensors; .*owner/name",
        ),
        ("folder/missing.safetensors", {}, FileNotFoundError, r"no file or directory folder/missing"),
        ("../missing/folder", {}, FileNotFoundError, r"no file or directory"),
        (Path("owner/name"), {}, FileNotFoundError, r"no file or directory owner/name"),
        (
            "demo",
            {"dtype": "int8"},
            ValueError,
            r"dtype must be one of fp32, .*, bfloat16 or None, got 'int8'",
        ),
        ("demo", {"dtype": mx.int32}, ValueError, r"dtype must be one of .*, got mlx.core.int32"),
        (
            "demo",
            {"config": "LTX-3"},
            ValueError,
            r"config by name must be one of 'ltx-0.9.0', .*'ltx-2.3', .*, got 'LTX-3'",
        ),
        ("demo", {"config": {"a": 1}}, ValueError, r"config must be a VAE's JSON .*, got the keys \['a'\]"),
    ],
)
def test_arguments(source, options, error, message):
    with pytest.raises(error, match=message):
        load_decoder(source, **options)


def test_published_versions_differ():
    assert [version_of(version.config) for version in PUBLISHED.values()] == list(PUBLISHED.values())
    assert (
        DecoderConfig.from_original(original_json("ltx-2.3")).decoder_blocks
        == PUBLISHED["ltx-2.3"].config.decoder_blocks
    )


@pytest.mark.parametrize("version", PUBLISHED.values(), ids=lambda version: version.name)
def test_config_can_be_named(version):
    assert read_config(version.name) == read_config(version.title) == version.config
