import os
import sys
import types
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_vae_tiling.media.latents import load_latents, looks_denormalized, read_latents

F, H, W = 2, 3, 4
VIDEO = np.random.default_rng(0).standard_normal((1, 128, F, H, W)).astype(np.float32)
AUDIO = np.zeros((1, 8, 5, 16), np.float32)
PACKED = VIDEO.transpose(0, 2, 3, 4, 1).reshape(1, F * H * W, 128)
MARKER = np.zeros((0,), np.float32)
TRAINER = {"latents": VIDEO[0], "num_frames": F, "height": H, "width": W, "fps": 24.0}


def save(path: Path, tensors, metadata=None) -> Path:
    """Save as the suffix says: a lone array as .npy or under the key "latents"."""
    if path.suffix.lower() == ".npy":
        with path.open("wb") as file:
            np.save(file, tensors)
        return path
    tensors = tensors if isinstance(tensors, dict) else {"latents": tensors}
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)
    return path


# Every row of the catalogue's table of saved latents, and the layouts it says how to tell apart.
FORMS = {
    "comfyui": ("a.latent", {"latent_tensor": VIDEO, "latent_format_version_0": MARKER}, {}),
    "comfyui with mask": (
        "a.latent",
        {"latent_tensor": VIDEO, "latent_format_version_0": MARKER, "noise_mask": VIDEO[:, :1]},
        {},
    ),
    "comfyui audio and video": ("a.latent", {"samples.0": VIDEO, "samples.1": AUDIO}, {}),
    "comfyui packed audio": ("a.latent", {"samples.0": VIDEO, "samples.1": PACKED[:, :5]}, {}),
    "diffusers packed npy": ("a.npy", PACKED, {"latent_size": (F, H, W)}),
    "diffusers packed frames": ("a.npy", PACKED[0], {"latent_size": (F, H, W)}),
    "diffusers npy": ("a.npy", VIDEO, {}),
    "diffusers safetensors": ("a.safetensors", VIDEO, {}),
    "diffusers size agrees": ("a.safetensors", VIDEO, {"latent_size": (F, H, W)}),
    "trainer safetensors": ("a.safetensors", TRAINER, {}),
    "trainer packed": ("a.safetensors", {**TRAINER, "latents": PACKED[0]}, {}),
    "trainer size overruled": (
        "a.safetensors",
        {**TRAINER, "latents": PACKED, "height": 96},
        {"latent_size": (F, H, W)},
    ),
    "dmlsrc final": (
        "a.safetensors",
        {
            "stage_1_video_latent": VIDEO + 1,
            "stage_2_video_latent": VIDEO + 2,
            "final_video_latent": VIDEO,
            "final_audio_latent": AUDIO,
        },
        {},
    ),
    "dmlsrc one stage": ("a.safetensors", {"stage_1_video_latent": VIDEO, "final_audio_latent": PACKED}, {}),
    "dmlsrc key": (
        "a.npz",
        {"stage_1_video_latent": VIDEO, "final_video_latent": VIDEO + 1},
        {"key": "stage_1_video_latent"},
    ),
    "taehv": ("a.npy", VIDEO.transpose(0, 2, 1, 3, 4), {}),
    "taehv without batch": ("a.npy", VIDEO[0].transpose(1, 0, 2, 3), {}),
    "channels last": ("a.npy", VIDEO.transpose(0, 2, 3, 4, 1), {}),
    "channels last without batch": ("a.npz", VIDEO[0].transpose(1, 2, 3, 0), {}),
    "fortran order": ("a.npy", np.asfortranarray(VIDEO), {}),
    "big-endian": ("a.npy", VIDEO.astype(">f4"), {}),
    "without batch": ("a.npy", VIDEO[0], {}),
    "upper-case suffix": ("a.NPY", VIDEO, {}),
    "float64": ("a.npy", VIDEO.astype(np.float64), {}),
    "float64 safetensors": ("a.safetensors", VIDEO.astype(np.float64), {}),
}


@pytest.mark.parametrize(("name", "tensors", "options"), FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_array(tmp_path, name, tensors, options):
    latents = load_latents(save(tmp_path / name, tensors), **options)
    assert latents.dtype == mx.float32
    np.testing.assert_array_equal(np.array(latents), VIDEO)


def test_two_axes_of_the_size_of_the_channels(tmp_path):
    square = np.random.default_rng(1).standard_normal((1, 128, 1, 128, 1)).astype(np.float32)
    np.testing.assert_array_equal(np.array(load_latents(save(tmp_path / "a.npy", square))), square)
    with pytest.raises(ValueError, match=r"a\.npy holds one array float32 \(1, 1, 128, 1, 128\)"):
        load_latents(save(tmp_path / "a.npy", square.transpose(0, 2, 1, 4, 3)))


def test_other_channels(tmp_path):
    path = save(tmp_path / "a.npy", VIDEO[:, :16])
    assert load_latents(path, channels=16).shape == (1, 16, F, H, W)


def test_every_batch_is_kept(tmp_path):
    twice = np.concatenate([PACKED, PACKED + 1])
    latents = load_latents(save(tmp_path / "a.npy", twice), latent_size=(F, H, W))
    np.testing.assert_array_equal(np.array(latents), np.concatenate([VIDEO, VIDEO + 1]))


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_comfyui_marker(tmp_path, marked, dtype):
    tensors = {"latent_tensor": VIDEO.astype(dtype)}
    tensors |= {"latent_format_version_0": MARKER} if marked else {}
    latents = load_latents(save(tmp_path / "a.latent", tensors))
    expected = (VIDEO.astype(dtype).astype(np.float64) * (1 if marked else 1 / 0.18215)).astype(dtype)
    assert np.array(latents).dtype == dtype
    np.testing.assert_allclose(np.array(latents), expected, rtol=1e-6 if dtype == np.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["a.safetensors", "a.npy", "a.npz"])
def test_half_precision_stays(tmp_path, name, dtype):
    path = str(tmp_path / name)
    half = mx.array(VIDEO).astype(dtype)
    if name.endswith(".npy"):
        mx.save(path, half)
    elif name.endswith(".npz"):
        mx.savez(path, latents=half)
    else:
        mx.save_safetensors(path, {"latents": half})
    latents = load_latents(path)
    assert latents.dtype == dtype
    assert mx.array_equal(latents, half).item()


def test_each_bfloat16_tensor_is_read_from_its_own_place(tmp_path):
    half = mx.array(VIDEO).astype(mx.bfloat16)
    tensors = {name: half + i for i, name in enumerate("abc")}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    for name, tensor in tensors.items():
        assert mx.array_equal(load_latents(tmp_path / "a.safetensors", key=name), tensor).item()


@pytest.mark.parametrize("name", ["bfloat16", "mlx.core.bfloat16"])
def test_widened_npz_is_narrowed_again(tmp_path, name):
    half = mx.array(VIDEO).astype(mx.bfloat16)
    tensors = {
        "final_video_latent": np.array(half.astype(mx.float32)),
        "final_video_latent_mlx_dtype": np.array(name),
        "final_audio_latent": AUDIO,
    }
    latents = load_latents(save(tmp_path / "a.npz", tensors))
    assert latents.dtype == mx.bfloat16
    assert mx.array_equal(latents, half).item()


@pytest.mark.parametrize(
    ("tensors", "metadata", "fps"),
    [
        (VIDEO, {"fps": "25"}, 25),
        (VIDEO, {"fps": "24000/1001"}, 24000 / 1001),
        (VIDEO, {"fps": "fast"}, None),
        (VIDEO, {"fps": "0"}, None),
        (VIDEO, None, None),
        (TRAINER, None, 24),
    ],
)
def test_fps_of_the_file(tmp_path, tensors, metadata, fps):
    saved = read_latents(save(tmp_path / "a.safetensors", tensors, metadata))
    assert (saved.fps, saved.key) == (fps, "latents")


def test_objects_beside_the_latents_are_not_touched(tmp_path):
    np.savez(tmp_path / "a.npz", latents=VIDEO, settings=np.array({"steps": 8}, dtype=object))
    np.testing.assert_array_equal(np.array(load_latents(tmp_path / "a.npz")), VIDEO)


# Each: file name, content (tensors or bytes), options, what the message must say.
FAILURES = {
    "packed": ("a.npy", PACKED, {}, r"latent_size=\(F, H, W\) \(--latent-size FxHxW\).* = 24, got None"),
    "packed wrong": ("a.npy", PACKED, {"latent_size": (2, 3, 5)}, r"= 24, got \(2, 3, 5\)"),
    "packed wrong in file": (
        "a.npz",
        {**TRAINER, "latents": PACKED, "height": 96},
        {},
        r"--latent-size.* = 24, got \(2, 96, 4\)",
    ),
    "size disagrees": ("a.npy", VIDEO, {"latent_size": (2, 4, 3)}, r"must be \(2, 3, 4\).*got \(2, 4, 3\)"),
    "size of two": ("a.npy", PACKED, {"latent_size": (6, 4)}, "three positive"),
    "size negative": ("a.npy", PACKED, {"latent_size": (-2, -3, 4)}, "three positive"),
    "several": (
        "a.safetensors",
        {"a": VIDEO, "b": VIDEO, "text": VIDEO[0, 0]},
        {},
        r"key \(--key\): a float32 \(1, 128, 2, 3, 4\); b float32 \(1, 128, 2, 3, 4\)$",
    ),
    "several stages": (
        "a.npz",
        {"stage_1_video_latent": VIDEO, "stage_2_video_latent": VIDEO},
        {},
        r"--key.*stage_1_video_latent.*stage_2_video_latent",
    ),
    "no such key": ("a.npz", {"a": VIDEO}, {"key": "b"}, r"\(--key\).*got 'b'; it holds a float32"),
    "key of npy": ("a.npy", VIDEO, {"key": "b"}, "got 'b'; it holds one array float32"),
    "key of audio": ("a.npz", {"a": VIDEO, "b": AUDIO}, {"key": "b"}, r"holds b float32 \(1, 8, 5, 16\)$"),
    "only audio": ("a.npz", {"final_audio_latent": PACKED}, {}, "holds final_audio_latent"),
    "integers": ("a.npy", VIDEO.astype(np.int32), {}, r"floating point.*holds one array int32"),
    "other channels": ("a.npy", VIDEO[:, :16], {}, r"\(B, 128, F, H, W\).*\(1, 16, 2, 3, 4\)"),
    "rank 1": ("a.npy", VIDEO[0, :, 0, 0, 0], {}, r"holds one array float32 \(128,\)"),
    "rank 6": ("a.npy", VIDEO[None], {}, r"holds one array float32 \(1, 1, 128, 2, 3, 4\)"),
    "scalar": ("a.npy", VIDEO[0, 0, 0, 0, 0], {}, r"holds one array float32 \(\)"),
    "no elements": ("a.npy", VIDEO[:, :, :0], {}, r"not empty.*\(1, 128, 0, 3, 4\)"),
    "no tensors": ("a.safetensors", {}, {}, "holds no tensors"),
    "a model": (
        "a.safetensors",
        {f"block.{i}.weight": np.zeros((2, 128, 3, 3, 3), np.float32) for i in range(20)},
        {},
        "several video latents.*and 8 more$",
    ),
    "objects": ("a.npy", np.array([{"latents": 1}], dtype=object), {}, r"a\.npy is truncated.*Object arrays"),
    "not safetensors": ("a.safetensors", b"hello, this is no tensor", {}, r"a\.safetensors is truncated"),
    "not latent": ("a.latent", b"\x00" * 4, {}, r"a\.latent is truncated"),
    "not npy": ("a.npy", b"hello, this is no array", {}, r"a\.npy is truncated"),
    "not npz": ("a.npz", b"hello, this is no archive", {}, r"a\.npz is truncated"),
    "empty safetensors": ("a.safetensors", b"", {}, r"a\.safetensors is truncated"),
    "empty npy": ("a.npy", b"", {}, r"a\.npy is truncated"),
    "empty npz": ("a.npz", b"", {}, r"a\.npz is truncated"),
    "other suffix": ("a.mp4", b"hello", {}, r"must end in \.safetensors, .*\.pth, got .*a\.mp4"),
    "no suffix": ("latents", b"hello", {}, "must end in"),
}


@pytest.mark.parametrize(("name", "content", "options", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_name_the_file_and_the_way_out(tmp_path, name, content, options, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with pytest.raises(ValueError, match=message) as failure:
        load_latents(path, **options)
    assert "\n" not in str(failure.value)
    assert name in str(failure.value) or "three positive" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated(tmp_path, suffix, kept):
    path = save(tmp_path / f"a{suffix}", VIDEO)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"a{suffix} is truncated, damaged"):
        load_latents(path)


def test_damage_found_while_loading(tmp_path):
    path = save(tmp_path / "a.npz", VIDEO)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is truncated, damaged.*CRC"):
        load_latents(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*gone\.npy"):
        load_latents(tmp_path / "gone.npy")
    (tmp_path / "b.npy").mkdir()
    with pytest.raises(ValueError, match=r"directory .*b\.npy; name the file"):
        load_latents(tmp_path / "b.npy")


def test_torch_missing_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"anything")
    with pytest.raises(
        ModuleNotFoundError, match=r"a\.pt needs torch: pip install torch, or save .*safetensors"
    ):
        load_latents(tmp_path / "a.pt")


class StubTensor:
    """What is used of a torch tensor."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def detach(self):
        return self

    def contiguous(self):
        return self

    def numpy(self):
        assert self.dtype != "torch.bfloat16", "torch raises TypeError here"
        return self.array

    def view(self, dtype):
        assert dtype == "int16"
        return StubTensor(self.array, "torch.int16")


def stub_torch(monkeypatch, content):
    calls = []

    def load(path, **options):
        calls.append((path, options))
        return content

    stub = types.SimpleNamespace(load=load, Tensor=StubTensor, int16="int16")
    monkeypatch.setitem(sys.modules, "torch", stub)
    return calls


BFLOAT16_BITS = (VIDEO.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
TORCH_FORMS = {
    "tensor": (StubTensor(VIDEO), {}),
    "packed": (StubTensor(PACKED), {"latent_size": (F, H, W)}),
    "trainer": ({**TRAINER, "latents": StubTensor(VIDEO[0])}, {}),
    "trainer packed": ({**TRAINER, "latents": StubTensor(PACKED[0])}, {}),
    "trainer packed, tensors": (
        {
            "latents": StubTensor(PACKED[0]),
            **{
                name: StubTensor(np.array(TRAINER[name]), "torch.int64")
                for name in ("num_frames", "height", "width", "fps")
            },
        },
        {},
    ),
    "audio and video": ({"samples": [StubTensor(VIDEO), StubTensor(AUDIO)]}, {}),
    "nested key": (
        {"samples": (StubTensor(VIDEO + 1), StubTensor(VIDEO)), "type": "video"},
        {"key": "samples.1"},
    ),
}


@pytest.mark.parametrize(("content", "options"), TORCH_FORMS.values(), ids=TORCH_FORMS.keys())
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_loads_weights_only(tmp_path, monkeypatch, content, options, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"read by the stub")
    calls = stub_torch(monkeypatch, content)
    saved = read_latents(path, **options)
    np.testing.assert_array_equal(np.array(saved.latents), VIDEO)
    assert calls == [(os.fspath(path), {"map_location": "cpu", "weights_only": True})]
    assert saved.fps == (24 if isinstance(content, dict) and "fps" in content else None)


def test_torch_bfloat16_stays(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"read by the stub")
    stub_torch(monkeypatch, StubTensor(BFLOAT16_BITS, "torch.bfloat16"))
    latents = load_latents(tmp_path / "a.pt")
    assert latents.dtype == mx.bfloat16
    expected = (VIDEO.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(np.array(latents.astype(mx.float32)), expected)


def test_torch_itself(tmp_path):
    torch = pytest.importorskip("torch")
    video = torch.from_numpy(VIDEO)
    path = tmp_path / "a.pt"
    for content in (
        video,
        {**TRAINER, "latents": video[0], "fps": torch.tensor(24.0)},
        [video.requires_grad_()],
    ):
        torch.save(content, path)
        np.testing.assert_array_equal(np.array(load_latents(path)), VIDEO)
    torch.save({"latents": video.detach().bfloat16()}, path)
    assert mx.array_equal(load_latents(path), mx.array(VIDEO).astype(mx.bfloat16)).item()
    torch.save({"latents": Path("an object")}, path)
    with pytest.raises(
        ValueError, match=r"a\.pt is damaged or holds Python objects.*torch\.save\(latents, path\)"
    ):
        load_latents(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.pt is "):
        load_latents(path)


@pytest.mark.parametrize("denormalized", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_looks_denormalized(denormalized, dtype):
    rng = np.random.default_rng(2)
    mean, std = rng.normal(0, 0.5, 128), rng.uniform(0.3, 1.7, 128)
    # A clip's own statistics differ from the VAE's.
    latents = rng.normal(0, 1, (1, 128, 3, 8, 8)) * rng.uniform(0.7, 1.3, (1, 128, 1, 1, 1)) + 0.1
    if denormalized:
        latents = latents * std.reshape(1, -1, 1, 1, 1) + mean.reshape(1, -1, 1, 1, 1)
    found = looks_denormalized(
        mx.array(latents.astype(np.float32)).astype(dtype), mx.array(mean), mx.array(std)
    )
    assert found is denormalized


def test_looks_denormalized_of_a_constant():
    zeros = mx.zeros((1, 4, 1, 2, 2))
    assert looks_denormalized(zeros, mx.zeros(4), mx.ones(4)) is False
