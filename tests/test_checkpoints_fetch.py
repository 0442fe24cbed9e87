"""Only the decoder is fetched: by huggingface_hub's own client, from a Hub on loopback, and nothing else."""

import json
import re
import resource
import traceback
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_cases
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
from diffusion_cases import original_tensors, reference_decoder, reference_file
from hub_server import COMMIT, SIGNATURE, TOKEN, Blob, Repo, serving
from huggingface_hub import constants, hf_hub_download
from safetensors import safe_open

from mlx_vae_tiling.checkpoints import extract, hub
from mlx_vae_tiling.checkpoints.configs import CheckpointWarning
from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.checkpoints.fetch import fetch_vae, plan_fetch
from mlx_vae_tiling.checkpoints.hub_errors import HubError, InterruptedTransfer, explained
from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.checkpoints.sources import SOURCES, HubFile
from mlx_vae_tiling.vae.published import PUBLISHED

MODEL = ("F8_E4M3", (4_000_000,), bytes(4_000_000))


@pytest.fixture(scope="module")
def server():
    with serving() as (remote, url):
        yield remote, url


@pytest.fixture
def remote(server, tmp_path, monkeypatch):
    """The Hub, without repositories; huggingface_hub is told of it, and of a cache that is empty."""
    served, url = server
    served.__init__()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "WAITS_IN_SECONDS", (0.0, 0.0, 0.0))
    return served


def put(remote, folder, repo="owner/name"):
    """Serves the files of a folder."""
    files = {
        path.relative_to(folder).as_posix(): Blob(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
    remote.repos[repo] = Repo(files)
    return remote.repos[repo]


def same_parameters(path, decoder):
    loaded = parameters(load_decoder(path))
    return all(mx.array_equal(loaded[name], value) for name, value in parameters(decoder).items())


def write_checkpoint(path, decoder, version="ltx-2.3"):
    tensors = combined(decoder) | {"model.diffusion_model.x": MODEL, "vae.decoder_of_something": MODEL}
    return write(path, tensors, original_json(version))


def checkpoint_bytes(tmp_path, decoder, version="ltx-2.3"):
    return write_checkpoint(tmp_path / "written.safetensors", decoder, version).read_bytes()


def large_checkpoint(tmp_path, decoder, others=220_000_000):
    """A combined checkpoint of which the decoder is 5 %, in four places between other tensors."""
    config = original_json("ltx-2.3") | {"decoder_base_channels": decoder.config.base_channels}
    content = write(tmp_path / "small.safetensors", combined(decoder), config).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json_of(content)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    decoders = [name for name in tensors if name.startswith("vae.decoder.")]
    fillers = {
        decoders[len(decoders) // 3]: others // 2,
        "vae.per_channel_statistics.std-of-means": others // 2,
    }
    parts, position = [], 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        if name in fillers:
            header[f"x.{name}"] = {
                "dtype": "U8",
                "shape": [fillers[name]],
                "data_offsets": [position, position + fillers[name]],
            }
            parts.append(fillers[name])
            position += fillers[name]
        start, stop = entry["data_offsets"]
        parts.append(content[end + start : end + stop])
        entry["data_offsets"] = [position, position + stop - start]
        position += stop - start
    return Blob(header_of(header), *parts)


def json_of(content):

    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def header_of(fields):

    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.fixture(scope="module")
def big():
    """A decoder of 10 MB."""
    return decoder_of("ltx-2.3", base_channels=10)


def test_of_a_large_checkpoint_the_decoder_is_transferred_and_one_percent(remote, tmp_path, big):
    blob = large_checkpoint(tmp_path, big)
    remote.repos["owner/name"] = Repo({"ltx-2.3.safetensors": blob})
    plan = plan_fetch("owner/name")
    assert remote.bytes_sent() < 100_000
    decoder_bytes = sum(value.nbytes for value in parameters(big).values())
    assert blob.size > 200e6 and decoder_bytes < 0.05 * blob.size
    assert len(plan.extract.spans) == 4 and plan.file_bytes == blob.size
    path = plan.run()
    assert decoder_bytes <= remote.bytes_sent() <= 1.01 * decoder_bytes
    assert same_parameters(path, big)


def test_only_the_decoder_of_a_checkpoint_is_transferred(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    whole = write_checkpoint(tmp_path / "r/ltx-2.3.safetensors", decoder)
    put(remote, tmp_path / "r")
    path = fetch_vae("owner/name", cache_dir=tmp_path / "cache")
    assert tmp_path / "cache" in path.parents and COMMIT in path.parts
    info = describe_checkpoint(path)
    header_bytes = 8 + int.from_bytes(whole.read_bytes()[:8], "little")
    # The header, read to choose the file; the decoder, and three unused statistics.
    assert remote.bytes_sent("/blobs/") == header_bytes + 1 + info.decoder_bytes + 3 * 4 * 8
    assert same_parameters(path, decoder)
    assert (info.layout, info.version, info.config) == ("combined", "LTX-2.3 / 2.5", decoder.config)
    with safe_open(path, "numpy") as file:
        assert all(name.startswith(("vae.decoder.", "vae.per_channel")) for name in file.keys())  # noqa: SIM118
    remote.sent.clear()
    assert fetch_vae("owner/name", cache_dir=tmp_path / "cache") == path
    assert remote.bytes_sent("/blobs/") == header_bytes + 1
    remote.sent.clear()
    assert fetch_vae("owner/name", filename="ltx-2.3.safetensors", cache_dir=tmp_path / "cache") == path
    assert remote.bytes_sent("/blobs/") == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_side_config_comes_with_a_part_of_a_unified_file(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    write(tmp_path / "r/model.safetensors", malformed(decoder) | {"transformer.x": MODEL})
    write_json(tmp_path / "r/embedded_config.json", {"vae": original_json("ltx-2.3")})
    put(remote, tmp_path / "r")
    path = fetch_vae("owner/name", cache_dir=tmp_path / "cache")
    assert same_parameters(path, decoder)
    assert sorted(file.name for file in path.parent.iterdir()) == ["embedded_config.json", path.name]


def test_a_vae_folder_goes_before_checkpoints(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    write_checkpoint(tmp_path / "r/ltx-2.3.safetensors", decoder_of("ltx-2.3"))
    write(tmp_path / "r/vae/diffusion_pytorch_model.safetensors", diffusers(decoder))
    write_json(tmp_path / "r/vae/config.json", diffusers_json("ltx-2.3"))
    put(remote, tmp_path / "r")
    path = fetch_vae("owner/name")
    # Little more than a decoder: whole, in the cache of huggingface_hub, where others find it.
    assert (
        path
        == tmp_path / f"hub/models--owner--name/snapshots/{COMMIT}/vae/diffusion_pytorch_model.safetensors"
    )
    assert same_parameters(path, decoder)
    assert not remote.bytes_sent("ltx-2.3.safetensors")


def test_shards_are_downloaded_together(remote, tmp_path):
    decoder = decoder_of("ltx-2")
    tensors = diffusers(decoder)
    for shard in (1, 2):
        part = dict(list(tensors.items())[shard - 1 :: 2])
        write(tmp_path / f"r/vae/model-0000{shard}-of-00002.safetensors", part)
    write_json(tmp_path / "r/vae/config.json", diffusers_json("ltx-2"))
    put(remote, tmp_path / "r")
    assert same_parameters(fetch_vae("owner/name"), decoder)
    remote.sent.clear()
    plan = plan_fetch("owner/name", filename="vae/model-00001-of-00002.safetensors")
    assert plan.transfer_bytes == 0 and same_parameters(plan.run(), decoder)
    assert not remote.bytes_sent("/blobs/")


def test_of_several_files_one_must_be_named(remote, tmp_path):
    first, second = decoder_of("ltx-2"), decoder_of("ltx-2.3")
    write_checkpoint(tmp_path / "r/a.safetensors", first, "ltx-2")
    write_checkpoint(tmp_path / "r/b.safetensors", second)
    put(remote, tmp_path / "r")
    with pytest.raises(
        ValueError,
        match=r"owner/name has several .*, choose one of them: a.*, b.safetensors \(convolutional, 0.231 M",
    ):
        fetch_vae("owner/name", cache_dir=tmp_path)
    path = fetch_vae("owner/name", filename="b.safetensors", cache_dir=tmp_path)
    assert same_parameters(path, second)


def test_load_decoder_fetches(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    write(tmp_path / "r/VAE/LTX23_video_vae_bf16.safetensors", split(decoder), original_json("ltx-2.3"))
    write(tmp_path / "r/VAE/taeltx2_3.safetensors", {"decoder.1.weight": mx.zeros((8, 8, 3, 3))})
    put(remote, tmp_path / "r")
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
def test_files_without_a_decoder(remote, filename, message, tmp_path):
    write(tmp_path / "r/model.safetensors", {"transformer.x": MODEL})
    if filename and filename.startswith("lfs"):
        (tmp_path / "r" / filename).write_text("version https://git-lfs.github.com/spec/v1")
    put(remote, tmp_path / "r")
    with pytest.raises(ValueError, match=message):
        fetch_vae("owner/name", filename=filename)


def known(monkeypatch, *places, version="ltx-2.3"):
    """Makes these the known places of a version."""
    monkeypatch.setitem(SOURCES, version, tuple(HubFile(*place) for place in places))


def test_every_published_version_has_a_small_file_before_those_of_whole_models():
    # The wide tiny decoder is on no Hub, and the other one in a single place.
    assert SOURCES.keys() >= PUBLISHED.keys() - {"taeltx2_3_wide"}
    for version, places in SOURCES.items():
        whole = [re.match(r"(vae|VAE|diffusion_decoder)/", place.file) is None for place in places]
        assert whole == sorted(whole) and not whole[0]
        assert len(places) > 1 or version == "taeltx2_3"
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", place.repo) for place in places)


@pytest.mark.parametrize("version", [version for version in PUBLISHED if not version.startswith("tae")])
def test_versions_are_fetched_by_name(version, remote, tmp_path):
    """From the second place, as the first does not exist here."""
    if version == "ltx-2.5":
        decoder, config = reference_decoder(), json.loads(reference_file()[1]["config"])["vae"]
        content = write(tmp_path / "a.safetensors", original_tensors(), config).read_bytes()
    else:
        decoder = decoder_of(version.replace("ltx-0", "0"))
        content = checkpoint_bytes(tmp_path, decoder, version.replace("ltx-0", "0"))
    missing, place = SOURCES[version][:2]
    remote.repos[place.repo] = Repo({place.file: Blob(content)})
    with pytest.warns(
        CheckpointWarning, match=f"{missing.repo}(,| has no file) .*; {place.repo} has the same"
    ) as raised:
        loaded = parameters(load_decoder(version))
    assert len(raised) == 1
    assert all(mx.array_equal(loaded[name], value) for name, value in parameters(decoder).items())
    assert PUBLISHED[version].title == describe_quietly(version).version


def test_a_tiny_decoder_is_fetched_by_name(remote, tmp_path):
    (place,) = SOURCES["taeltx2_3"]
    path = write(tmp_path / "a.safetensors", tiny_cases.stored_tensors("taeltx2_3"))
    remote.repos[place.repo] = Repo({place.file: Blob(path.read_bytes())})
    expected = parameters(tiny_cases.reference_decoder("taeltx2_3"))
    loaded = parameters(load_decoder("taeltx2_3"))
    assert all(mx.array_equal(loaded[name], value) for name, value in expected.items())


def describe_quietly(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return describe_checkpoint(source)


def test_a_version_without_config_is_what_its_name_says(remote, tmp_path, monkeypatch):
    known(monkeypatch, ("owner/name", "vae/a.safetensors"))
    decoder = decoder_of("ltx-2.3")
    content = write(tmp_path / "a.safetensors", combined(decoder)).read_bytes()
    remote.repos["owner/name"] = Repo({"vae/a.safetensors": Blob(content)})
    with pytest.raises(HubError, match="must hold exactly the tensors of its config"):
        load_decoder("ltx-2.3")
    monkeypatch.setitem(PUBLISHED, "ltx-2.3", PUBLISHED["ltx-2.3"]._replace(config=decoder.config))
    assert describe_checkpoint("ltx-2.3").config == decoder.config
    with pytest.warns(CheckpointWarning, match="comes without a config; its tensors are those of LTX-2.3"):
        load_decoder(fetch_vae("ltx-2.3"))


def test_a_file_of_another_version_is_not_taken(remote, tmp_path, monkeypatch):
    known(monkeypatch, ("a/a", "vae/a.safetensors"), ("b/b", "b.safetensors"))
    decoder = decoder_of("ltx-2.3")
    remote.repos["a/a"] = Repo(
        {"vae/a.safetensors": Blob(checkpoint_bytes(tmp_path, decoder_of("ltx-2"), "ltx-2"))}
    )
    remote.repos["b/b"] = Repo({"b.safetensors": Blob(checkpoint_bytes(tmp_path, decoder))})
    with pytest.warns(
        CheckpointWarning, match=r"a/a/vae/a.safetensors holds LTX-2, not LTX-2.3 / 2.5; b/b has"
    ):
        assert same_parameters(fetch_vae("ltx-2.3"), decoder)
    assert remote.bytes_sent("/blobs/a/a") < 100_000


def test_a_local_path_of_the_name_of_a_version_goes_first(remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoder = decoder_of("ltx-2")
    write(tmp_path / "ltx-2.3/vae/a.safetensors", split(decoder), original_json("ltx-2"))
    assert same_parameters("ltx-2.3", decoder)
    assert not remote.sent


def test_a_renamed_repository_is_followed(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    remote.repos["new/name"] = Repo({"a.safetensors": Blob(checkpoint_bytes(tmp_path, decoder))})
    remote.repos["old/name"] = Repo(renamed="new/name")
    with pytest.warns(CheckpointWarning, match="old/name is called new/name now"):
        path = fetch_vae("old/name")
    assert "new--name" in str(path) and same_parameters(path, decoder)


REFUSALS = [
    ({}, None, r"there is no repository owner/name, or it is private: check the name; .*`hf auth login`"),
    ({}, TOKEN, r"there is no repository owner/name, or it is private"),
    ({"private": True}, None, r"there is no repository owner/name, or it is private"),
    (
        {"gated": True},
        None,
        r"asks for consent: accept its terms at http.*/owner/name, then log in with `hf auth",
    ),
    ({"gated": True}, "hf_other", r"asks for consent: accept its terms at"),
    ({"forbidden": True}, TOKEN, r"may not be read from here: .*settings/tokens"),
    (
        {"gated": True},
        "hf_wrong",
        r"the Hub refuses the token: renew it with `hf auth login`, or unset HF_TOKEN",
    ),
]


@pytest.mark.parametrize(("repo", "token", "message"), REFUSALS)
def test_refusals_say_what_to_do(repo, token, message, remote, tmp_path):
    if repo:
        content = checkpoint_bytes(tmp_path, decoder_of("ltx-2.3"))
        remote.repos["owner/name"] = Repo({"a.safetensors": Blob(content)}, **repo)
    with pytest.raises(
        HubError, match=rf"cannot fetch a VAE from owner/name on the Hub: .*{message}"
    ) as raised:
        fetch_vae("owner/name", token=token)
    shown = "".join(traceback.format_exception(raised.value))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert SIGNATURE not in shown and (token is None or token not in shown)


def test_consent_and_a_token_open_a_repository_and_stay_there(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    content = checkpoint_bytes(tmp_path, decoder)
    remote.repos["owner/name"] = Repo({"a.safetensors": Blob(content)}, gated=True)
    assert same_parameters(fetch_vae("owner/name", token=TOKEN), decoder)
    assert remote.cdn_headers and not any("Authorization" in headers for headers in remote.cdn_headers)


@pytest.mark.parametrize("token", ["hf_a b", "hf_secret\n", "hf_sécret", "hf_\x00secret"])
def test_a_token_that_no_header_takes_is_not_shown(token, remote):
    with pytest.raises(ValueError, match="token must be one word of ASCII") as raised:
        fetch_vae("owner/name", token=token)
    assert token not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"revision": "v9"}, HubError, "owner/name has no revision v9: check the branch, tag or commit"),
        ({"repo_id": "a/b/c"}, HubError, "'a/b/c' cannot be a repository: they are named owner/name"),
        ({"token": True}, HubError, "no token is stored here: log in with"),
        ({"repo_id": "ltx-2", "filename": "a"}, ValueError, "the files of ltx-2 are known; got 'a'"),
    ],
)
def test_what_cannot_be_fetched(options, error, message, remote, tmp_path):
    remote.repos["owner/name"] = Repo({"a.safetensors": Blob(b"")})
    with pytest.raises(error, match=message):
        fetch_vae(**{"repo_id": "owner/name"} | options)


def test_a_known_file_that_has_gone(remote, monkeypatch):
    known(monkeypatch, ("a/a", "vae/a.safetensors"), ("b/b", "b.safetensors"))
    remote.repos["a/a"] = Repo({"vae/other.safetensors": Blob(b"")})
    message = (
        "from ltx-2.3 on the Hub: a/a has no file vae/a.safetensors any more; there is no repository b/b"
    )
    with pytest.raises(HubError, match=message):
        load_decoder("ltx-2.3")


def test_a_server_that_ignores_ranges_is_noticed_before_it_sends_the_file(remote, tmp_path, big):
    remote.repos["owner/name"] = Repo({"ltx.safetensors": large_checkpoint(tmp_path, big)})
    remote.ranges = False
    with pytest.raises(
        HubError, match=r"ignores .* range .*`hf download owner/name ltx.safetensors` and use the"
    ):
        fetch_vae("owner/name")
    # What the kernel takes into its buffers, of 230 MB.
    assert remote.bytes_sent() < 20e6


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_cannot_answer(status, remote, tmp_path):
    remote.repos["owner/name"] = Repo({"a.safetensors": Blob(b"x" * 100)})
    remote.status = status
    with pytest.raises(InterruptedTransfer, match=r"a.safetensors stopped: .*try again"):
        fetch_vae("owner/name")


def test_a_cut_connection_is_continued(remote, tmp_path, big):
    blob = large_checkpoint(tmp_path, big)
    remote.repos["owner/name"] = Repo({"ltx.safetensors": blob})
    plan = plan_fetch("owner/name")
    remote.cuts = [0, 100_000, 0, 1, 3_000_000]
    assert same_parameters(plan.run(), big)
    decoder_bytes = sum(value.nbytes for value in parameters(big).values())
    assert not remote.cuts and remote.bytes_sent() <= 1.01 * decoder_bytes


def test_a_broken_transfer_is_kept_and_continued(remote, tmp_path, big):
    blob = large_checkpoint(tmp_path, big)
    remote.repos["owner/name"] = Repo({"ltx.safetensors": blob})
    plan = plan_fetch("owner/name")
    remote.cuts = [2_000_000, 0, 0, 0, 0]
    message = (
        r"^cannot fetch a VAE from owner/name on the Hub: the transfer of .* stopped: .* same again to cont"
    )
    with pytest.raises(InterruptedTransfer, match=message):
        plan.run()
    left = [
        path for path in (tmp_path / "assets").rglob("*") if path.is_file() and path.parent.name != "refs"
    ]
    assert [path.suffix for path in left] == [".part"]
    with pytest.raises(FileNotFoundError):
        describe_checkpoint(plan.path)
    kept = left[0].stat().st_size
    again = plan_fetch("owner/name")
    assert again.kept_bytes == kept >= 1_900_000 and again.transfer_bytes == again.extract.total_bytes - kept
    remote.sent.clear()
    remote.cuts.clear()
    path = again.run()
    assert remote.bytes_sent() == again.transfer_bytes
    assert same_parameters(path, big)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [b"", b"other content", b"\0" * 30_000_000])
def test_a_part_that_is_not_ours_is_begun_anew(damage, remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    remote.repos["owner/name"] = Repo({"a.safetensors": Blob(checkpoint_bytes(tmp_path, decoder))})
    plan = plan_fetch("owner/name")
    plan.extract.part.write_bytes(damage)
    assert plan_fetch("owner/name").kept_bytes == 0
    assert same_parameters(plan.run(), decoder)


def test_room_is_looked_for_before_the_transfer(remote, tmp_path, monkeypatch):
    remote.repos["owner/name"] = Repo(
        {"a.safetensors": Blob(checkpoint_bytes(tmp_path, decoder_of("ltx-2.3")))}
    )
    plan = plan_fetch("owner/name")
    remote.sent.clear()
    usage = extract.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs \d+ bytes of free space, it has 1000"):
        plan.run()
    assert not remote.sent


def test_a_disk_that_fills_up_is_named_and_what_came_is_kept(remote, tmp_path, big):
    remote.repos["owner/name"] = Repo({"a.safetensors": large_checkpoint(tmp_path, big)})
    plan = plan_fetch("owner/name")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*a-video-decoder.safetensors.part'"):
            plan.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert plan.extract.kept_bytes == 3_000_000
    assert same_parameters(plan.run(), big)


def test_the_page_has_the_sizes_of_the_versions():
    page = (Path(__file__).parent.parent / "examples/fetching.md").read_text()
    rows = re.findall(r"^\| (LTX[^|]+) \| ([\d.]+) M \| ([\d.]+) MB \|$", page, re.MULTILINE)
    published = {version.title: version.config.parameters for version in PUBLISHED.values()}
    assert published.keys() - {title for title, _, _ in rows} == {PUBLISHED["taeltx2_3_wide"].title}
    del published[PUBLISHED["taeltx2_3_wide"].title]
    assert {title: (float(m), float(mb)) for title, m, mb in rows} == {
        title: (round(count / 1e6, 1), round(2 * count / 1e6)) for title, count in published.items()
    }
    assert all(f"`{name}`" in page for name in SOURCES)


def test_what_another_program_has_downloaded_whole_is_used(remote, tmp_path):
    decoder = decoder_of("ltx-2.3")
    remote.repos["owner/name"] = Repo({"a.safetensors": Blob(checkpoint_bytes(tmp_path, decoder))})
    downloaded = hf_hub_download(
        "owner/name", "a.safetensors", cache_dir=tmp_path / "hub", endpoint=constants.ENDPOINT
    )
    remote.sent.clear()
    plan = plan_fetch("owner/name", filename="a.safetensors")
    assert plan.transfer_bytes == 0 and str(plan.run()) == downloaded
    assert not remote.bytes_sent("/blobs/") and same_parameters(downloaded, decoder)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Illegal header value b'Bearer hf_abcDEF123'", "Illegal header value b'Bearer (token)'"),
        ("a token of another form: s3cr3t", "a token of another form: (token)"),
        (
            "for url 'https://me:pw@cdn.example/a/b?Signature=x&Key=y' (1)",
            "for url 'https://cdn.example/a/b' (1)",
        ),
        ("line\nline", "line line"),
    ],
)
def test_what_libraries_say_is_shown_without_secrets(text, shown):
    error = explained(OSError(text), "owner/name", "a.safetensors", "s3cr3t")
    assert f"does not answer ({shown}): check the connection" in str(error)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("source", ["ltx-2.3", "owner/name", "owner/name/vae/a.safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_was_fetched_is_found_without_the_hub(offline, source, whole, remote, tmp_path, monkeypatch):
    known(monkeypatch, ("no/body", "vae/b.safetensors"), ("owner/name", "vae/a.safetensors"))
    decoder = decoder_of("ltx-2.3")
    tensors = combined(decoder) if whole else combined(decoder) | {"model.x": MODEL}
    content = write(tmp_path / "written", tensors, original_json("ltx-2.3")).read_bytes()
    remote.repos["owner/name"] = Repo({"vae/a.safetensors": Blob(content)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        load_decoder(source)
    remote.sent.clear()
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert same_parameters(source, decoder)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.warns(
            CheckpointWarning, match=r"127.0.0.1:9 does not answer .*; what was fetched before has"
        ):
            assert same_parameters(source, decoder)
    assert not remote.sent


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub(offline, remote, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    reason = (
        "HF_HUB_OFFLINE is set: unset it to fetch"
        if offline
        else r"http://127.0.0.1:9 does not answer \(.*\): check"
    )
    with pytest.raises(
        OSError, match=rf"cannot fetch a VAE from owner/name on the Hub: {reason}.*; it was not f"
    ):
        fetch_vae("owner/name")
    with pytest.raises(
        FileNotFoundError, match=r"there is no file or directory owner/name, and cannot fetch"
    ):
        load_decoder("owner/name")
    with pytest.raises(HubError, match=rf"cannot fetch a VAE from ltx-2.3 on the Hub: {reason}"):
        load_decoder("ltx-2.3")
    assert not remote.sent
