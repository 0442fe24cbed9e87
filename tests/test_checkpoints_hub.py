"""Only the decoder of a repository is fetched. The Hub is a folder here; none of this met the real one."""

import io
import shutil
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from checkpoint_files import (
    combined,
    decoder_of,
    diffusers,
    diffusers_json,
    malformed,
    original_json,
    parameters,
    split,
    write,
    write_json,
)
from huggingface_hub.utils import HfHubHTTPError
from safetensors import safe_open

from mlx_vae_tiling.checkpoints import hub
from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.checkpoints.hub import fetch_vae
from mlx_vae_tiling.checkpoints.load import load_decoder

COMMIT = "c0ffee"
MODEL = ("F8_E4M3", (4_000_000,), bytes(4_000_000))


class RemoteFile(io.BytesIO):
    """Counts what is read from it."""

    def __init__(self, content, transferred):
        super().__init__(content)
        self.transferred = transferred

    def read(self, size=-1):
        piece = super().read(size)
        self.transferred.append(len(piece))
        return piece


class FakeHub:
    """The repository owner/name, kept in a folder; `transferred` and `downloaded` say what left it."""

    def __init__(self, folder, downloads):
        self.folder, self.downloads = folder, downloads
        self.transferred, self.downloaded = [], []

    def model_info(self, repo_id, revision=None, files_metadata=False):
        assert (repo_id, files_metadata) == ("owner/name", True)
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        siblings = [
            SimpleNamespace(rfilename=path.relative_to(self.folder).as_posix(), size=path.stat().st_size)
            for path in files
        ]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def open(self, path, mode, cache_type):
        assert (mode, cache_type) == ("rb", "none")
        file = path.removeprefix(f"owner/name@{COMMIT}/")
        return RemoteFile((self.folder / file).read_bytes(), self.transferred)

    def hf_hub_download(self, repo_id, file, *, revision, token, cache_dir):
        assert (repo_id, revision) == ("owner/name", COMMIT)
        self.downloaded.append(file)
        target = self.downloads / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / file, target)
        return str(target)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "remote", tmp_path / "downloads")
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: fake)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda token: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def same_parameters(path, decoder):
    loaded = parameters(load_decoder(path))
    return all(mx.array_equal(loaded[name], value) for name, value in parameters(decoder).items())


def write_checkpoint(path, decoder, version="ltx-2.3"):
    tensors = combined(decoder) | {"model.diffusion_model.x": MODEL, "vae.decoder_of_something": MODEL}
    return write(path, tensors, original_json(version))


def test_only_the_decoder_of_a_checkpoint_is_transferred(remote, tmp_path, monkeypatch):
    decoder = decoder_of("ltx-2.3")
    whole = write_checkpoint(remote.folder / "ltx-2.3.safetensors", decoder)
    monkeypatch.setattr(hub, "PIECE_BYTES", 10_000)
    path = fetch_vae("owner/name", cache_dir=tmp_path / "cache")
    assert tmp_path / "cache" in path.parents and COMMIT in path.parts
    assert not remote.downloaded
    info = describe_checkpoint(path)
    header_bytes = 8 + int.from_bytes(whole.read_bytes()[:8], "little")
    # The header, read to choose the file and again to use it; the decoder, and three unused statistics.
    assert sum(remote.transferred) == 2 * (header_bytes + 1) + info.decoder_bytes + 3 * 4 * 8
    assert same_parameters(path, decoder)
    assert (info.layout, info.version, info.config) == ("combined", "LTX-2.3 / 2.5", decoder.config)
    with safe_open(path, "numpy") as file:
        assert all(name.startswith(("vae.decoder.", "vae.per_channel")) for name in file.keys())  # noqa: SIM118
    remote.transferred.clear()
    assert fetch_vae("owner/name", cache_dir=tmp_path / "cache") == path
    assert sum(remote.transferred) == 2 * (header_bytes + 1)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_side_config_comes_with_a_part_of_a_unified_file(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    write(remote.folder / "model.safetensors", malformed(decoder) | {"transformer.x": MODEL})
    write_json(remote.folder / "embedded_config.json", {"vae": original_json("ltx-2.3")})
    assert same_parameters(fetch_vae("owner/name", cache_dir=tmp_path / "cache"), decoder)
    assert remote.downloaded == ["embedded_config.json"]


def test_a_vae_folder_goes_before_checkpoints(remote):
    decoder = decoder_of("ltx-2.3")
    write_checkpoint(remote.folder / "ltx-2.3.safetensors", decoder_of("ltx-2.3"))
    write(remote.folder / "vae/diffusion_pytorch_model.safetensors", diffusers(decoder))
    write_json(remote.folder / "vae/config.json", diffusers_json("ltx-2.3"))
    path = fetch_vae("owner/name")
    assert path == remote.downloads / "vae/diffusion_pytorch_model.safetensors"
    assert remote.downloaded == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert same_parameters(path, decoder)


def test_shards_are_downloaded_together(remote):
    decoder = decoder_of("ltx-2")
    tensors = diffusers(decoder)
    for shard in (1, 2):
        part = dict(list(tensors.items())[shard - 1 :: 2])
        write(remote.folder / f"vae/model-0000{shard}-of-00002.safetensors", part)
    write_json(remote.folder / "vae/config.json", diffusers_json("ltx-2"))
    assert same_parameters(fetch_vae("owner/name"), decoder)
    assert len(remote.downloaded) == 3


def test_of_several_files_one_must_be_named(remote, tmp_path):
    first, second = decoder_of("ltx-2"), decoder_of("ltx-2.3")
    write_checkpoint(remote.folder / "a.safetensors", first, "ltx-2")
    write_checkpoint(remote.folder / "b.safetensors", second)
    with pytest.raises(
        ValueError,
        match=r"owner/name has several .*, choose one of them: a.*, b.safetensors \(convolutional, 0.231 M",
    ):
        fetch_vae("owner/name", cache_dir=tmp_path)
    path = fetch_vae("owner/name", filename="b.safetensors", cache_dir=tmp_path)
    assert same_parameters(path, second)


def test_load_decoder_fetches(remote, tmp_path, monkeypatch):
    decoder = decoder_of("ltx-2.3")
    write(remote.folder / "VAE/LTX23_video_vae_bf16.safetensors", split(decoder), original_json("ltx-2.3"))
    write(remote.folder / "VAE/taeltx2_3.safetensors", {"decoder.1.weight": mx.zeros((8, 8, 3, 3))})
    for source in ("owner/name", "owner/name/VAE/LTX23_video_vae_bf16.safetensors"):
        assert same_parameters(source, decoder)


@pytest.mark.parametrize(
    ("filename", "message"),
    [
        (None, r"owner/name holds no LTX video decoder: .* its 1 tensors begin with transformer"),
        ("model.safetensors", r"owner/name/model.safetensors holds no LTX video decoder"),
        (
            "vae.safetensors",
            r"filename must be a file of owner/name, got 'vae.safetensors'; it has model.saf",
        ),
        ("lfs.safetensors", r"lfs.safetensors \(\d+ bytes\) is not a safetensors file"),
    ],
)
def test_files_without_a_decoder(remote, filename, message):
    write(remote.folder / "model.safetensors", {"transformer.x": MODEL})
    if filename and filename.startswith("lfs"):
        (remote.folder / filename).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=message):
        fetch_vae("owner/name", filename=filename)


def test_a_broken_connection_leaves_nothing_behind(remote, tmp_path, monkeypatch):
    write_checkpoint(remote.folder / "ltx.safetensors", decoder_of("ltx-2.3"))
    read = RemoteFile.read

    def breaking(file, size):
        return read(file, size if size < 20_000 or not file.transferred else size - 1)

    monkeypatch.setattr(RemoteFile, "read", breaking)
    with pytest.raises(
        OSError, match=r"cannot fetch a VAE from owner/name on the Hub: \d+ bytes were asked for"
    ):
        fetch_vae("owner/name", cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [OSError, *HfHubHTTPError.__bases__])
def test_an_unreachable_hub(error, monkeypatch):
    def unreachable(token):
        raise error("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", unreachable)
    with pytest.raises(OSError, match=r"cannot fetch a VAE from owner/name on the Hub: no route"):
        fetch_vae("owner/name")
    with pytest.raises(
        FileNotFoundError, match=r"there is no file or directory owner/name, and cannot fetch"
    ):
        load_decoder("owner/name")
