"""Hundreds of damaged files of latents: the array that the file holds, or one clear error."""

import io
import json
import random
import re
import resource
import struct
import sys
import time
import warnings
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from mlx_vae_tiling.media.latents import load_latents

pytestmark = pytest.mark.fuzz

CASES_OF_A_FILE = 70
LONGEST_SECONDS = 5
MOST_BYTES = 500 << 20

LATENTS = np.random.default_rng(0).standard_normal((1, 128, 2, 3, 4)).astype(np.float32)
OTHER = {"fps": np.float32(24), "audio": LATENTS[:, :8, 0]}


def as_safetensors(dtype: str, name: str) -> bytes:
    tensors = {name: LATENTS.astype("<f2" if dtype == "F16" else "<f4"), **OTHER}
    header, data = {"__metadata__": {"fps": "24", "prompt": "a [cat] {x}"}}, b""
    for key, tensor in tensors.items():
        content = np.ascontiguousarray(tensor).tobytes()
        if key == name and dtype == "BF16":
            content = (LATENTS.view("<u4") >> 16).astype("<u2").tobytes()
        kind = dtype if key == name else "F32"
        header[key] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_npz(packed: bool) -> bytes:
    file = io.BytesIO()
    tensors = {"final_video_latent": LATENTS, "final_video_latent_mlx_dtype": np.array("bfloat16"), **OTHER}
    (np.savez_compressed if packed else np.savez)(file, **tensors)
    return file.getvalue()


FILES = {
    "a.safetensors": as_safetensors("F32", "latents"),
    "half.safetensors": as_safetensors("BF16", "latents"),
    "a.latent": as_safetensors("F16", "latent_tensor"),
    "a.npy": as_npy(LATENTS),
    "fortran.npy": as_npy(np.asfortranarray(LATENTS)),
    "a.npz": as_npz(packed=False),
    "packed.npz": as_npz(packed=True),
}
NUMBERS = [
    b"-1",
    b"0",
    b"1",
    b"3",
    b"127",
    b"4294967296",
    b"9223372036854775807",
    b"18446744073709551616",
    b"1e9",
]
NUMBERS += [b"99999999999999999999999999", b"0.5", b"null", b"[]", b"9" * 5000]
WORDS = [
    b"F64",
    b"I32",
    b"F8_E4M3",
    b"F4",
    b"<f8",
    b"|O",
    b"<U9",
    b"V2",
    b">f4",
    b"<c8",
    b"latents",
    b"audio",
    b"True",
]


def flip(content: bytes, draw: random.Random, within: int) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 16])):
        changed[draw.randrange(min(within, len(changed)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def replace_one(content: bytes, draw: random.Random, found: bytes, by: list[bytes]) -> bytes:
    """Put something else in one place of the first 2000 bytes, mending the length of a safetensors header."""
    places = list(re.finditer(found, content[8:2000]))
    if not places:
        return flip(content, draw, len(content))
    place = draw.choice(places)
    new = draw.choice(by)
    changed = content[: 8 + place.start()] + new + content[8 + place.end() :]
    if content[8:10] == b'{"' and draw.random() < 0.8:
        length = struct.unpack("<Q", content[:8])[0] + len(new) - len(place[0])
        changed = struct.pack("<Q", max(0, length)) + changed[8:]
    return changed


def mutate(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(11)
    at, size = draw.randrange(len(content)), draw.randrange(1, 200)
    if kind == 0:
        return content[: draw.choice([at, draw.randrange(20), len(content) - 1])]
    if kind == 1:
        return content + bytes(draw.randrange(256) for _ in range(size))
    if kind == 2:
        return content[:at] + bytes(size) + content[at + size :]
    if kind == 3:
        return content[:at] + content[at + size :]
    if kind == 4:
        return content[:at] + content[at : at + size] + content[at:]
    if kind == 5:
        length = draw.choice([0, 1, 2**16, 2**24, 2**31, 2**32, 2**63, 2**64 - 1, draw.randrange(2000)])
        return struct.pack("<Q", length) + content[8:]
    if kind == 6:
        return flip(content, draw, 400)
    if kind == 7:
        return flip(content, draw, len(content))
    if kind == 8:
        depth = draw.choice([3, 200, 3000, 100_000])
        return replace_one(
            content, draw, rb"[\[(]", [b"[" * depth, b"(" * depth, b"{" * depth, b'{"a":' * depth]
        )
    if kind == 9:
        return replace_one(content, draw, rb"\d+", NUMBERS)
    return replace_one(content, draw, rb"[A-Za-z_<|]\w+", WORDS)


def held(path) -> list[np.ndarray]:
    """What other readers than ours find: the safetensors library, MLX for bfloat16, NumPy."""
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".npy":
            return [np.load(path)]
        if path.suffix == ".npz":
            with np.load(path) as archive:
                return [archive[name] for name in archive.files if archive[name].dtype.kind in "fV"]
    if b'"BF16"' in content:
        tensors = mx.load(str(path), format="safetensors")
        return [np.array(tensor.astype(mx.float32)) for tensor in tensors.values()]
    return list(load_safetensors(content).values())


def is_held(latents: mx.array, path) -> bool:
    found = np.sort(np.array(latents.astype(mx.float32)), axis=None)
    scales = [1, 1 / 0.18215] if path.suffix == ".latent" else [1]
    for array in held(path):
        if array.size != found.size or array.dtype.kind not in "fV":
            continue
        bits = array.view(np.uint16).astype(np.uint32) << 16 if array.dtype.kind == "V" else None
        for scale in scales:
            with np.errstate(all="ignore"):
                values = (array if bits is None else bits.view(np.float32)).astype(np.float32) * np.float32(
                    scale
                )
                tensor = mx.array(values).astype(latents.dtype).astype(mx.float32)
            if np.array_equal(np.sort(np.array(tensor), axis=None), found, equal_nan=True):
                return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, name):
    draw, path = random.Random(name), tmp_path / name
    outcomes = {"array": 0, "error": 0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_bytes(FILES[name])
    assert is_held(load_latents(path), path)
    for case in range(CASES_OF_A_FILE):
        path.write_bytes(mutate(FILES[name], draw))
        began = time.perf_counter()
        try:
            latents = load_latents(path)
        except ValueError as error:
            outcomes["error"] += 1
            assert "\n" not in str(error)
            assert name in str(error)
            assert len(str(error)) < 1200, str(error)[:300]
        else:
            outcomes["array"] += 1
            assert is_held(latents, path), case
        assert time.perf_counter() - began < LONGEST_SECONDS
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * unit < MOST_BYTES
    assert min(outcomes.values()) > 5, outcomes


def test_there_are_enough():
    assert CASES_OF_A_FILE * len(FILES) >= 300


def bomb(path, shape: tuple[int, ...]) -> bytes:
    """An archive of a few KB with 1 MB of zeros, and an array of another shape."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("latents.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1 << 20))
    return path.read_bytes()


@pytest.mark.parametrize(("forged", "message"), [(False, "bytes of"), (True, "cannot be in")])
def test_an_archive_that_claims_more_than_it_can_hold(tmp_path, forged, message):
    path, shape = tmp_path / "a.npz", (1, 128, 64, 256, 256)  # 2 GiB
    content = bomb(path, shape)
    true, false = (1 << 20) + 128, 4 * int(np.prod(shape)) + 128
    assert struct.pack("<I", true) in content
    if forged:
        path.write_bytes(content.replace(struct.pack("<I", true), struct.pack("<I", false)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"a\.npz is truncated, damaged.*{message}"):
        load_latents(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES
