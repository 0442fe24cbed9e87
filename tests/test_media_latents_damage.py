"""Files of latents that lie about themselves, and things that are no files."""

import errno
import json
import os
import struct
import threading
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling.media import tensor_files
from mlx_vae_tiling.media.latents import load_latents

LATENTS = np.random.default_rng(0).standard_normal((1, 128, 2, 3, 4)).astype(np.float32)
BYTES = LATENTS.nbytes


def entry(begin: int, end: int, shape=LATENTS.shape, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write(path, header, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


DATA = LATENTS.tobytes()
HALF = entry(0, BYTES // 2, dtype="BF16")
HEADERS = {
    "shared": ({"latents": entry(0, BYTES), "audio": entry(0, BYTES)}, DATA),
    "overlapping": ({"latents": entry(0, BYTES), "audio": entry(BYTES // 2, 3 * BYTES // 2)}, DATA + DATA),
    "a gap": ({"latents": entry(0, BYTES), "audio": entry(BYTES + 4, 2 * BYTES + 4)}, DATA + DATA + bytes(4)),
    "not from the start": ({"latents": entry(4, BYTES + 4)}, bytes(4) + DATA),
    "short": ({"latents": entry(0, BYTES - 4)}, DATA),
    "long": ({"latents": entry(0, BYTES + 4)}, DATA + bytes(4)),
    "past the end": ({"latents": entry(0, BYTES)}, DATA[:-4]),
    "more behind": ({"latents": entry(0, BYTES)}, DATA + bytes(4)),
    "backwards": ({"latents": entry(BYTES, 0)}, DATA),
    "negative": ({"latents": entry(-BYTES, 0)}, DATA),
    "shared, bfloat16": ({"latents": HALF, "audio": HALF}, DATA[: BYTES // 2]),
    "short, bfloat16": ({"latents": {**HALF, "data_offsets": [0, BYTES // 2 - 2]}}, DATA[: BYTES // 2 - 2]),
    "twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, BYTES)).encode(),) * 2), DATA),
    "a huge shape": ({"latents": entry(0, BYTES, (1, 128, 2**40, 2**40, 4))}, DATA),
    "nested": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", DATA),
    "nested tables": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, DATA),
    "a list": (b"[]", b""),
    "nothing": (b"{", b""),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".latent"])
@pytest.mark.parametrize(("header", "data"), HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_lie(tmp_path, suffix, header, data):
    write(tmp_path / f"a{suffix}", header, data)
    with pytest.raises(ValueError, match=rf"a{suffix} is truncated, damaged or not") as failure:
        load_latents(tmp_path / f"a{suffix}", key="latents")
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_lengths_of_headers(tmp_path, length):
    write(tmp_path / "a.safetensors", {"latents": entry(0, BYTES)}, DATA, length)
    with open(tmp_path / "a.safetensors", "ab") as file:
        file.truncate(2**24 + 1000)
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated.*header"):
        load_latents(tmp_path / "a.safetensors")


def npy(shape: str, descr: str = "'<f4'", order: str = "False", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode("latin1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text


ARRAYS = {
    "a huge shape": npy("(1, 128, 4294967296, 4294967296, 4)"),
    "negative": npy("(1, 128, -2, -3, 4)"),
    "nested": npy("(" * 4000 + ")" * 4000),
    "deeply nested": npy("[" * 60_000, version=b"\x02\x00"),
    "no tuple": npy("24"),
    "texts": npy("('1', '128')"),
    "code": npy("__import__('os')"),
    "order": npy("(1, 128, 2, 3, 4)", order="'yes'"),
    "type": npy("(1, 128, 2, 3, 4)", "'<f99'"),
    "no type": npy("(1, 128, 2, 3, 4)", "7"),
    "of objects": npy("(1, 128, 2, 3, 4)", "'|O'"),
    "version": npy("(1, 128, 2, 3, 4)", version=b"\x09\x00"),
    "no end": npy("(1, 128, 2, 3, 4)")[:-6],
    "binary": b"\x93NUMPY\x01\x00\x10\x00" + bytes(range(128, 144)),
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_that_lie(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content + DATA)
    with pytest.raises(ValueError, match=r"a\.npy is truncated, damaged or not") as failure:
        load_latents(tmp_path / "a.npy")
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 1000


@pytest.mark.parametrize("packed", [False, True])
def test_archives_are_read_to_the_end_of_each_array(tmp_path, packed):
    (np.savez_compressed if packed else np.savez)(tmp_path / "a.npz", latents=LATENTS)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        content = archive.read("latents.npy").replace(b"(1, 128, 2, 3, 4)", b"(1, 128, 1, 3, 4)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED if packed else 0) as archive:
        archive.writestr("latents.npy", content)
    with pytest.raises(ValueError, match=r"a\.npz is truncated, damaged.*more bytes than the header"):
        load_latents(tmp_path / "a.npz")


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00"])
def test_versions_of_the_format(tmp_path, version):
    (tmp_path / "a.npy").write_bytes(npy("(1, 128, 2, 3, 4)", version=version) + DATA)
    np.testing.assert_array_equal(np.array(load_latents(tmp_path / "a.npy")), LATENTS)


@pytest.mark.parametrize("others", [["samples.0"], ["final_video_latent"], ["a", "b", "noise_mask"]])
def test_comfyui_files_prefer_their_key(tmp_path, others):
    tensors = {name: LATENTS + 1 for name in others}
    header, data = {"latent_format_version_0": entry(0, 0, (0,))}, b""
    for name, tensor in {**tensors, "latent_tensor": LATENTS}.items():
        header[name] = entry(len(data), len(data) + BYTES)
        data += tensor.tobytes()
    write(tmp_path / "a.latent", header, data)
    np.testing.assert_array_equal(np.array(load_latents(tmp_path / "a.latent")), LATENTS)
    np.testing.assert_array_equal(np.array(load_latents(tmp_path / "a.latent", key=others[0])), LATENTS + 1)


@pytest.mark.parametrize("scaled", [mx.float32, mx.float16, mx.bfloat16])
def test_unmarked_files_are_scaled_in_float32(tmp_path, scaled):
    stored = mx.array(LATENTS).astype(scaled)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"latent_tensor": stored})
    os.rename(tmp_path / "a.safetensors", tmp_path / "a.latent")
    latents = load_latents(tmp_path / "a.latent")
    expected = (stored.astype(mx.float32) * (1 / 0.18215)).astype(scaled)
    assert latents.dtype == scaled
    assert mx.array_equal(latents, expected).item()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("suffix", [".safetensors", ".latent", ".npy", ".npz", ".pt"])
def test_pipes_and_devices_are_no_files(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        answer = []

        def load(path=tmp_path / f"{name}{suffix}", answer=answer):
            with pytest.raises(ValueError, match="a pipe or device; copy it to a file first"):
                load_latents(path)
            answer.append("refused")

        thread = threading.Thread(target=load, daemon=True)  # reading either would never end
        thread.start()
        thread.join(5)
        assert answer == ["refused"]


def test_files_that_may_not_be_read_are_not_called_missing(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", LATENTS)
    monkeypatch.setattr(tensor_files.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"may not be read: '.*a\.npy'"):
        load_latents(tmp_path / "a.npy")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(tensor_files.os, "stat", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*locked/a\.npy'"):
        load_latents(tmp_path / "locked" / "a.npy")


def test_a_file_is_no_folder(tmp_path):
    np.save(tmp_path / "a.npy", LATENTS)
    with pytest.raises(FileNotFoundError, match=r"no such file of latents: '.*b\.npy'"):
        load_latents(tmp_path / "a.npy" / "b.npy")


@pytest.mark.parametrize("fps", ["9" * 400, "1/" + "9" * 400, "1" * 5000])
def test_rates_of_absurd_length_are_none(tmp_path, fps):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"latents": mx.array(LATENTS)}, {"fps": fps})
    np.testing.assert_array_equal(np.array(load_latents(tmp_path / "a.safetensors")), LATENTS)
