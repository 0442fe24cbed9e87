"""Damaged, hostile and unusual files: the right weights, or one clear error, soon."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import combined, decoder_of, original_json, parameters, split, write, write_json
from diffusion_cases import original_tensors, reference_file
from safetensors import SafetensorError, safe_open

from mlx_vae_tiling import cli
from mlx_vae_tiling.checkpoints import load
from mlx_vae_tiling.checkpoints.configs import CheckpointWarning
from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.media.safetensors_header import LARGEST_HEADER_BYTES, read_local_header, shortened
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import PUBLISHED

FIELD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(fields, data=b""):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


def at(start, stop, **changes):
    return FIELD | {"data_offsets": [start, stop]} | changes


HEADERS = [
    (
        {"a": at(0, 8), "b": at(0, 8)},
        8,
        r"must cover its bytes once: b overlaps a; copy or download it again",
    ),
    ({"a": at(0, 8), "b": at(4, 12)}, 12, r"b overlaps a;"),
    ({"a": at(0, 8), "b": at(12, 20)}, 20, r"a hole lies before b;"),
    ({"a": at(4, 12)}, 12, r"a hole lies before a;"),
    ({"a": at(0, 8)}, 12, r"4 bytes behind the last tensor belong to none;"),
    ({"a": at(0, 8), "b": at(8, 8, shape=[0]), "c": at(4, 4, shape=[0])}, 8, r"overlaps a;"),
    ({}, 4, r"4 bytes behind the last tensor belong to none;"),
    ({"a": at(0, 4)}, 8, r"F32 \(2,\) cannot lie at 0 to 4"),
    ({"a": at(0, 16)}, 16, r"F32 \(2,\) cannot lie at 0 to 16"),
    ({"a": at(0, 8, shape=[2.0])}, 8, r"'F32' \(2.0,\) at 0 to 8 describes no tensor"),
    ({"a": at(0, 8, shape=[-2])}, 8, r"\(-2,\) at 0 to 8 describes no tensor"),
    ({"a": at(0, 8, shape=[True, 2])}, 8, r"\(True, 2\) at 0 to 8 describes no tensor"),
    ({"a": at(0, 8, dtype=None)}, 8, r"None \(2,\) at 0 to 8 describes no tensor"),
    ({"a": at(0, 8, shape=[1] * 17 + [2])}, 8, r"a tensor may have 16 axes, a has 18"),
    ({"a": at(0, 2**63 + 8, shape=[2**61 + 2])}, 8, r"describes no tensor"),
    (
        b'{"a":' + json.dumps(FIELD).encode() + b',"a":' + json.dumps(FIELD).encode() + b"}",
        8,
        r"stands twice",
    ),
    ({"a": FIELD, "__metadata__": {"format": 1}}, 8, r"__metadata__ must map to strings"),
    ({"a": FIELD, "__metadata__": [1]}, 8, r"header cannot be read"),
    ([1], 0, r"it does not start with a header"),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, r"header cannot be read \(RecursionError"),
    (b'{"a":' + b"9" * 5000 + b"}", 0, r"header cannot be read \(Exceeds the limit"),
]
ALLOWED_BY_THE_LIBRARY = ("16 axes", "RecursionError", "stands twice")


@pytest.mark.parametrize(("fields", "size", "message"), HEADERS, ids=[row[2][:25] for row in HEADERS])
def test_headers_that_the_library_refuses_are_refused(fields, size, message, tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(file_of(fields, bytes(size)))
    for function in (read_local_header, load_decoder):
        with pytest.raises(ValueError, match=message) as raised:
            function(path)
        assert str(path) in str(raised.value) and len(str(raised.value)) < 400
    if not any(words in message for words in ALLOWED_BY_THE_LIBRARY):
        with pytest.raises(SafetensorError):
            safe_open(path, "numpy")


def test_headers_that_the_library_takes_are_taken(tmp_path):
    path = tmp_path / "vae.safetensors"
    fields = {"b": at(8, 16), "a": at(0, 8), "e": at(8, 8, shape=[0]), "s": at(16, 20, shape=[])}
    path.write_bytes(file_of(fields | {"__metadata__": {"x": "y"}}, bytes(20)))
    header = read_local_header(path)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == header.tensors.keys() and file.metadata() == header.metadata
    assert [header.tensors[name].start - header.tensors["a"].start for name in "abes"] == [0, 8, 8, 16]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b'{"a":1' + b" " * LARGEST_HEADER_BYTES + b"}",
            r"a header may have \d+ bytes, this one claims to have",
        ),
        (
            json.dumps({str(i): at(0, 0, shape=[0]) for i in range(100_001)}).encode(),
            r"it may list 100000 tensors",
        ),
        (b'{"a":[' + b"{}," * 2_700_000 + b"{}]}", r"header cannot be read"),
        (json.dumps({"vae.decoder." + "x" * 500_000: FIELD}).encode(), r"no LTX video decoder"),
    ],
    ids=["bytes", "tensors", "items", "name"],
)
def test_large_headers(text, message, tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(file_of(text, bytes(8 * (b"data_offsets" in text and b"100000" not in text))))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as raised:
        load_decoder(path)
    assert time.monotonic() - begin < 5 and len(str(raised.value)) < 500


def with_config(tmp_path, **changes):
    decoder = decoder_of("ltx-2")
    return write(tmp_path / "vae.safetensors", split(decoder), original_json("ltx-2") | changes)


CONFIGS = [
    (
        {"decoder_blocks": [["res_x", {"num_layers": 1_000_000}]]},
        r"num_layers must be at most 64, got 1000000",
    ),
    ({"decoder_blocks": [["res_x", 10**400]]}, r"num_layers must be at most 64"),
    ({"decoder_blocks": [["res_x", 1]] * 100_000}, r"must name at most 64 blocks, got 100000"),
    ({"decoder_blocks": [["res_x_y", {"multiplier": 10**9}]]}, r"multiplier must be at most 65536"),
    (
        {"decoder_blocks": [["res_x_y", 1], ["res_x_y", {"multiplier": 60_000}]]},
        r"at most 65536 channels, got",
    ),
    ({"decoder_base_channels": 10**12}, r"at most 65536 channels, got"),
    ({"latent_channels": 2**40}, r"at most 65536 channels, got"),
    ({"patch_size": 2**20}, r"at most 65536 channels, got"),
    ({"patch_size": float("nan")}, r"patch_size must be a positive integer, got nan"),
    (
        {"decoder_blocks": [["res_x", {"layers": 1}]]},
        r"does not describe a decoder: it cannot be read \(KeyError",
    ),
    ({"decoder_blocks": [["res_x"]]}, r"does not describe a decoder"),
    ({"decoder_blocks": 5}, r"does not describe a decoder: it cannot be read \(TypeError"),
    ({"decoder_blocks": [["res_x", None]]}, r"does not describe a decoder"),
    ({"_class_name": "x" * 100_000}, r"must be a CausalVideoAutoencoder"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[row[1][:30] for row in CONFIGS])
def test_configs_beyond_reason(changes, message, tmp_path):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as raised:
        load_decoder(with_config(tmp_path, **changes))
    assert time.monotonic() - begin < 5 and len(str(raised.value)) < 700


DIFFUSION = [
    (
        {"stage_depths": [1_000_000, 1, 1, 1, 1]},
        r"stage_depths must be like \(4, 6, 4, 2, 8\), got \(1000000, 1",
    ),
    ({"stage_depths": [40, 40, 1, 1, 1]}, r"stage_depths must sum to at most 64, got 83"),
    ({"stage_kernels": [[3, 7.5, 7]] * 5}, r"stage_kernels must be like"),
    ({"stage_depths": ["1", 1, 1, 1, 1]}, r"stage_depths must be like"),
    ({"head_dim": 0}, r"cannot be read \(ZeroDivisionError"),
    ({"timestep_scale_multiplier": float("nan")}, r"timestep_scale_multiplier must be like 1000.0, got nan"),
    (
        {"upsamples": [[[1, 2, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]]},
        r"upsamples must be li",
    ),
]


@pytest.mark.parametrize(("changes", "message"), DIFFUSION, ids=[row[1][:30] for row in DIFFUSION])
def test_configs_of_diffusion_decoders_beyond_reason(changes, message, tmp_path):
    tensors, config = original_tensors(), json.loads(reference_file()[1]["config"])["vae"]
    begin = time.monotonic()
    config.get("decoder", config).update(changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_decoder(write(tmp_path / "vae.safetensors", tensors, config))
    assert time.monotonic() - begin < 5 and len(str(raised.value)) < 700


@pytest.mark.parametrize("place", ["metadata", "beside"])
def test_nested_brackets_in_a_config(place, tmp_path):
    text = "[" * 100_000 + "]" * 100_000
    metadata = {"config": text} if place == "metadata" else None
    path = write(tmp_path / "vae.safetensors", split(decoder_of("ltx-2")), metadata=metadata)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"does not describe a decoder: its brackets are nested too deeply"):
        load_decoder(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b" " * (2**20 + 1)])
def test_a_side_file_that_is_no_config(content, tmp_path):
    path = write(tmp_path / "vae.safetensors", split(decoder_of("ltx-2")))
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json (is not text|must be a file of at most)"):
        load_decoder(path)


def test_thousands_of_surplus_tensors_are_listed_in_short(tmp_path):
    tensors = split(decoder_of("ltx-2"))
    tensors |= {f"decoder.{'surplus' * 20}.{i}": mx.zeros((1,)) for i in range(3000)}
    path = write(tmp_path / "vae.safetensors", tensors, original_json("ltx-2"))
    with pytest.raises(ValueError, match=r"exactly the tensors .* and 2995 more$") as raised:
        load_decoder(path)
    assert len(str(raised.value)) < 1200
    tensors |= {f"decoder.up_blocks.{i}.x": mx.zeros((1,)) for i in range(2000)}
    with pytest.raises(ValueError, match=r"a decoder may have 4000 tensors"):
        load_decoder(write(path, tensors, original_json("ltx-2")))


def test_texts_are_shortened():
    assert shortened("a  b\n c") == "a b c" and shortened("x" * 80) == "x" * 80
    assert shortened("a\x1b[31m\0b") == "a?[31m?b"
    assert shortened("x" * 50 + "y" * 50) == "x" * 38 + "..." + "y" * 38


DTYPES = (mx.float32, mx.float16, mx.bfloat16)
NAME = "decoder.up_blocks.2.res_blocks.1.conv2.conv.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [NAME, "per_channel_statistics.std-of-means", "decoder.conv_out.conv.bias"])
def test_values_that_are_not_finite_are_found(name, dtype, value, tmp_path):
    tensors = split(decoder_of("ltx-2", dtype))
    flat = tensors[name].reshape(-1)
    flat[flat.size - 1] = value
    tensors[name] = flat.reshape(tensors[name].shape)
    path = write(tmp_path / "vae.safetensors", tensors, original_json("ltx-2"))
    with pytest.raises(ValueError, match=rf"{path}: {name} has NaN or infinite values; copy or download"):
        load_decoder(path)
    assert describe_checkpoint(path).version == "LTX-2"


def test_the_largest_and_smallest_finite_values_load(tmp_path):
    for dtype in DTYPES:
        tensors = split(decoder_of("ltx-2", dtype))
        limits = {mx.float32: 3.4028234e38, mx.float16: 65504.0, mx.bfloat16: 3.38953139e38}
        values = mx.array([limits[dtype], -limits[dtype], 0.0, 1e-7], dtype)
        tensors["decoder.conv_out.conv.bias"] = mx.concatenate([values] * 12)
        path = write(tmp_path / "vae.safetensors", tensors, original_json("ltx-2"))
        loaded = load_decoder(path).conv_out.conv.bias
        assert mx.array_equal(loaded, tensors["decoder.conv_out.conv.bias"])


def test_of_an_encoder_values_do_not_matter(tmp_path):
    tensors = split(decoder_of("ltx-2"))
    tensors["encoder.conv_in.conv.bias"] = mx.full((8,), float("nan"))
    load_decoder(write(tmp_path / "vae.safetensors", tensors, original_json("ltx-2")))


def test_values_that_another_dtype_cannot_hold(tmp_path):
    tensors = split(decoder_of("ltx-2"))
    tensors[NAME] = tensors[NAME] - 7e4
    path = write(tmp_path / "vae.safetensors", tensors, original_json("ltx-2"))
    with pytest.raises(
        ValueError, match=rf"{NAME} has values that .*float16 cannot hold; load it as float32"
    ):
        load_decoder(path, dtype="float16")
    load_decoder(path, dtype="bfloat16")


@pytest.mark.parametrize("left", ["nothing", "half of it"])
def test_a_file_that_becomes_shorter_while_it_is_read(left, tmp_path, monkeypatch):
    path = write(tmp_path / "vae.safetensors", split(decoder_of("ltx-2")), original_json("ltx-2"))
    entry = read_local_header(path).tensors[NAME]
    end = {"nothing": entry.start, "half of it": (entry.start + entry.stop) // 2}[left]
    build = load.build_decoder

    def meanwhile(*given):
        os.truncate(path, end)
        return build(*given)

    monkeypatch.setattr(load, "build_decoder", meanwhile)
    with pytest.raises(ValueError, match=rf"{path} became shorter while .* was read; copy or download it"):
        load_decoder(path)


def fifo(path):
    os.mkfifo(path)
    return path


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    return path


def dangling(path):
    path.symlink_to("nowhere")
    return path


SPECIAL = [
    (fifo, ValueError, r"must be an ordinary file, it is a pipe, socket or device"),
    (unix_socket, ValueError, r"must be an ordinary file, it is a pipe, socket or device"),
    (lambda _: Path("/dev/zero"), ValueError, r"/dev/zero must be an ordinary file, it is a pipe, sock"),
    (dangling, FileNotFoundError, r"is a link to nowhere, which is not there"),
    (
        lambda path: path.mkdir() or path,
        ValueError,
        r"holds no LTX video decoder: .* has no .safetensors file",
    ),
    (lambda path: path.touch() or path, ValueError, r"\(0 bytes\) is not a safetensors file"),
]


@pytest.mark.parametrize(("make", "error", "message"), SPECIAL)
def test_what_is_no_file(make, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make(Path("vae.safetensors"))
    with pytest.raises(error, match=message):
        load_decoder(path)


def test_what_is_no_file_among_others_is_passed_over(tmp_path):
    fifo(tmp_path / "a.safetensors")
    dangling(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").mkdir()
    path = write(tmp_path / "d.safetensors", split(decoder_of("ltx-2")), original_json("ltx-2"))
    assert describe_checkpoint(tmp_path).path == path


@pytest.mark.parametrize("source", ["vae.safetensors", "folder/vae.safetensors", "folder"])
def test_what_cannot_be_read_is_not_called_missing(source, tmp_path):
    """In a process of a user who may not read it."""
    folder = tmp_path / "folder"
    path = write(folder / "vae.safetensors", split(decoder_of("ltx-2")), original_json("ltx-2"))
    # The process enters a folder before its user changes: nothing but what is closed stands in the way.
    where, closed = (folder, path) if source == path.name else (tmp_path, folder)
    where.chmod(0o755)
    closed.chmod(0)
    code = f"""
import os
from mlx_vae_tiling import load_decoder
if os.getuid() == 0:
    os.setuid(65534)
try:
    load_decoder({source!r})
except OSError as error:
    print(type(error).__name__, error)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=True)
    closed.chmod(0o755)
    assert out.stdout.startswith("PermissionError [Errno 13] Permission denied: "), out


def test_folders_are_found_in_any_case(tmp_path):
    path = write(tmp_path / "VAE/Decoder/a.safetensors", split(decoder_of("ltx-2")), original_json("ltx-2"))
    write(tmp_path / "text_encoder/b.safetensors", split(decoder_of("ltx-2")))
    assert describe_checkpoint(tmp_path).path == path


@pytest.mark.parametrize("source", [None, 3, b"x", ["demo"]])
def test_sources_that_name_nothing(source):
    with pytest.raises(
        TypeError, match=r"a VAE must be named by text or a path, got (NoneType|int|bytes|list)"
    ):
        load_decoder(source)


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-of-this-name/x", "a\nb"])
def test_sources_that_are_nowhere(source):
    with pytest.raises(FileNotFoundError, match="there is no file or directory"):
        load_decoder(source)


def published_file(path, version):
    """A file of the full size whose decoder is all zeros, in bfloat16; it takes no room on the disk."""
    config = PUBLISHED[version].config
    shapes = {name: value.shape for name, value in parameters(VideoDecoder(config)).items()}
    fields, position = {}, 0
    for name, shape in shapes.items():
        torch = (shape[0], shape[4], *shape[1:4]) if len(shape) == 5 else shape
        place = "" if name.startswith("per_channel") else "decoder."
        theirs = f"{place}{name}-of-means" if not place else f"{place}{name}"
        size = 2 * prod(shape)
        fields[theirs] = {"dtype": "BF16", "shape": torch, "data_offsets": [position, position + size]}
        position += size
    content = file_of(fields)
    path.write_bytes(content)
    os.truncate(path, len(content) + position)
    return path


@pytest.mark.parametrize("version", ["ltx-2", "ltx-2.3"])
def test_shapes_of_one_published_version_are_that_version(version, tmp_path, capsys):
    path = published_file(tmp_path / "vae.safetensors", version)
    title = PUBLISHED[version].title
    message = (
        f"without a config; its tensors are those of {title} and it is loaded as that. config='{version}'"
    )
    with pytest.warns(CheckpointWarning, match=message):
        info = describe_checkpoint(path)
    assert (info.config, info.version) == (PUBLISHED[version].config, title)
    assert describe_checkpoint(path, config=version).config == info.config
    assert cli.main(["info", str(path)]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"mlx-vae-tiling: warning: {path} comes without a config; its tensors are those of"
    )
    assert cli.main(["info", str(path), "--config", version]) == 0
    assert capsys.readouterr().err == ""


def test_other_shapes_are_no_published_version(tmp_path, monkeypatch):
    path = write(tmp_path / "vae.safetensors", split(decoder_of("ltx-2")))
    with pytest.raises(ValueError, match="without a config, and shapes cannot tell"):
        load_decoder(path)
    config = decoder_of("ltx-2").config
    for version in ("ltx-2", "ltx-0.9.0"):
        monkeypatch.setitem(PUBLISHED, version, PUBLISHED[version]._replace(config=config))
    with pytest.raises(ValueError, match="without a config, and shapes cannot tell"):
        load_decoder(path)


def test_padding_alone_can_be_given(tmp_path):
    """As ComfyUI does it for LTX-Video, by reflection."""
    decoder = decoder_of("0.9.1")
    path = write(tmp_path / "vae.safetensors", combined(decoder), original_json("0.9.1"))
    assert load_decoder(path).config.spatial_padding_mode == "zeros"
    given = {"spatial_padding_mode": "reflect"}
    write_json(tmp_path / "given.json", given)
    reflecting = decoder_of("0.9.1", spatial_padding_mode="reflect")
    latents = mx.random.normal((1, decoder.config.latent_channels, 2, 3, 4))
    for config in (given, tmp_path / "given.json", str(tmp_path / "given.json")):
        loaded = load_decoder(path, config=config)
        assert loaded.config == replace(decoder.config, spatial_padding_mode="reflect")
        assert mx.array_equal(loaded(latents), reflecting(latents))
    assert not mx.array_equal(load_decoder(path)(latents), reflecting(latents))
    with pytest.raises(ValueError, match="spatial_padding_mode must be 'zeros' or 'reflect', got 'circular'"):
        load_decoder(path, config={"spatial_padding_mode": "circular"})


def test_a_config_can_be_a_file(tmp_path):
    decoder = decoder_of("ltx-2.3")
    path = write(tmp_path / "vae.safetensors", split(decoder))
    write_json(tmp_path / "a.json", original_json("ltx-2.3"))
    write_json(tmp_path / "list.json", [1])
    (tmp_path / "text.json").write_text("{")
    for config in (tmp_path / "a.json", str(tmp_path / "a.json")):
        assert load_decoder(path, config=config).config == decoder.config
    for name, error, message in (
        ("list.json", ValueError, r"list.json must hold a JSON object, got \[1\]"),
        ("text.json", ValueError, r"text.json is not JSON: Expecting"),
        ("no.json", FileNotFoundError, "no.json"),
    ):
        with pytest.raises(error, match=message):
            load_decoder(path, config=tmp_path / name)


def test_numbers_are_those_of_the_safetensors_library(tmp_path):
    """An independent reading of every kernel of a file with tensors in another order than its header."""
    decoder = decoder_of("ltx-2.3", mx.float16)
    path = write(tmp_path / "vae.safetensors", split(decoder), original_json("ltx-2.3"))
    loaded = parameters(load_decoder(path))
    with safe_open(path, "numpy") as file:
        for name, value in loaded.items():
            if name.endswith("conv.weight") and value.ndim == 5:
                theirs = file.get_tensor(f"decoder.{name}").transpose(0, 2, 3, 4, 1)
                assert np.array_equal(np.array(value), theirs), name
