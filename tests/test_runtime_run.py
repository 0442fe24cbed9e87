"""Decoding within a budget: the right frames, checked, and nothing lost or left behind when it fails."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import wave
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace
from unittest.mock import Mock

import av
import mlx.core as mx
import numpy as np
import pytest
from disk_use import watched
from mlx.utils import tree_flatten
from vae_cases import budgets, joined, random_latents, small_decoder

from mlx_vae_tiling import TilingConfig, Window, decode_frames, decode_to_file, plan_decode
from mlx_vae_tiling.media import npy
from mlx_vae_tiling.media.audio import AudioWarning
from mlx_vae_tiling.media.video import unfinished_frames
from mlx_vae_tiling.media.writer import VideoWriter
from mlx_vae_tiling.runtime import job, request, run
from mlx_vae_tiling.runtime.resuming import journal, output, store
from mlx_vae_tiling.tiling import SpatialTilingConfig
from mlx_vae_tiling.vae.backends import METAL
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.options import Noise
from mlx_vae_tiling.vae.schedule import Pace

SIZE = (4, 4, 3)
"""Latent frames, height and width of most tests: 25 frames of 96x128 pixels."""

LIMITS = budgets(small_decoder("ltx-2.3"), SIZE)
"""For these latents: one chunk, several, and several windows."""

TILES = TilingConfig(SpatialTilingConfig(64, 32))


@pytest.fixture
def decoder():
    return small_decoder("ltx-2.3")


@pytest.fixture
def latents(decoder):
    return random_latents(decoder, 1, *SIZE)


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def limits():
    found = []
    for set_limit in (mx.set_memory_limit, mx.set_cache_limit):
        found.append(set_limit(1))
        set_limit(found[-1])
    return found


@pytest.fixture(autouse=True)
def limits_come_back():
    before = limits()
    yield
    assert limits() == before


def frames_of(*args, **options):
    return np.concatenate(list(decode_frames(*args, **options)))


def assert_rounded(frames, video, bits=8):
    """Equal to NumPy's float64 rounding, or off by one where that was a tie to float32's precision."""
    x = np.array(video[0].astype(mx.float32), np.float64).transpose(1, 2, 3, 0)
    exact = np.clip(x / 2 + 0.5, 0, 1) * (2**bits - 1 if bits < 32 else 1)
    assert frames.dtype == {8: np.uint8, 16: np.uint16, 32: np.float32}[bits]
    assert frames.shape == exact.shape
    if bits == 32:
        assert np.abs(frames - exact).max() < 1e-6
        return
    tie = np.abs(exact % 1 - 0.5) < 2**bits * 1e-6
    wrong = frames != np.round(exact)
    assert not (wrong & ~tie).any()
    assert np.abs(frames - exact).max() < 0.5 + 2**bits * 1e-6
    assert tie.mean() < 0.2


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("limit", LIMITS)
def test_frames_are_those_of_the_whole_decode(decoder, latents, limit, bits):
    plan = plan_decode(decoder, latents.shape, memory_limit=LIMITS[limit])
    assert plan.fits and (len(plan.parts) > 1) == (limit == "windows")
    assert (plan.max_chunk_frames is None) == (limit == "whole")
    pieces = list(decode_frames(decoder, latents, memory_limit=LIMITS[limit], bits=bits))
    assert (len(pieces) == 1) == (limit == "whole")
    assert_rounded(np.concatenate(pieces), decoder(latents), bits)


@pytest.mark.parametrize("version", ["0.9.1", "0.9.5", "ltx-2"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_versions_and_dtypes(version, dtype):
    decoder = VideoDecoder(small_decoder(version).config).init_random()
    decoder.set_dtype(dtype)
    latents = random_latents(decoder, 1, 3, 3, 4).astype(dtype)
    expected = joined(decoder.stream(latents, seed=5, latent_frames_per_step=3))
    assert_rounded(frames_of(decoder, latents, seed=5, memory_limit="1GB"), expected)


@pytest.mark.parametrize("limit", LIMITS)
def test_windows_crop(decoder, latents, limit):
    window = Window(slice(2, 17), slice(17, 120), slice(1, 95))
    frames = frames_of(decoder, latents, window=window, memory_limit=LIMITS[limit])
    assert_rounded(frames, decoder(latents)[:, :, 2:17, 17:120, 1:95])


def test_a_halo_sees_as_many_latents_and_no_more(decoder, latents):
    plan = plan_decode(decoder, latents.shape, memory_limit=LIMITS["windows"], tiling=1)
    assert len(plan.parts) > 1 and not any(part.exact for part in plan.parts)
    frames = frames_of(decoder, latents, plan=plan)
    for part in plan.parts:
        rows, columns = (span.slice for span in part.latents[1:])
        crop = decoder(latents[..., rows, columns])
        top, left = rows.start * 32, columns.start * 32
        height, width = (span.slice for span in part.pixels[1:])
        cut = crop[..., height.start - top : height.stop - top, width.start - left : width.stop - left]
        assert_rounded(frames[:, height, width], cut)


def test_blended_tiles(decoder, latents):
    frames = frames_of(decoder, latents, tiling=TILES, memory_limit="1GB")
    assert_rounded(frames, decoder.decode_tiled(latents, TILES))


def test_progress_only_when_asked(decoder, latents, capfd):
    for limit in LIMITS.values():
        frames_of(decoder, latents, memory_limit=limit)
    assert capfd.readouterr() == ("", "")
    frames_of(decoder, latents, memory_limit=LIMITS["windows"], progress=True)
    told = capfd.readouterr()
    parts = len(plan_decode(decoder, latents.shape, memory_limit=LIMITS["windows"]).parts)
    assert told.out == "" and f"{25 * parts}/{25 * parts}" in told.err and "peak" in told.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_limit": 1000}, r"no plan fits in 1.00 KB; the smallest needs .* windows: raise"),
        ({"bits": 10}, "bits must be 8, 16 or 32, got 10"),
        ({"window": Window(slice(0, 99))}, "window frames"),
        ({"noise_scale": 2.0}, "noise_scale"),
    ],
)
def test_options_are_checked_at_once(decoder, latents, options, message):
    with pytest.raises(ValueError, match=message):
        decode_frames(decoder, latents, **options)


def test_latents_and_plans_are_checked_at_once(decoder, latents):
    poisoned = mx.array(latents)
    poisoned[0, 3, 2, 1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"latents must be finite, got NaN or infinity .* frames \[2\]"):
        decode_frames(decoder, poisoned)
    with pytest.raises(ValueError, match="one video at a time, got a batch of 2"):
        decode_frames(decoder, mx.concatenate([latents, latents]))
    with pytest.raises(ValueError, match="the plan is for latents of shape"):
        decode_frames(decoder, latents, plan=plan_decode(decoder, (1, latents.shape[1], 2, 5, 4)))
    with pytest.raises(ValueError, match="no plan fits"):
        decode_frames(decoder, latents, plan=plan_decode(decoder, latents.shape, memory_limit=1000))


FAULTS = {
    "not finite": lambda x: mx.where(mx.arange(x.shape[-1]) == 5, float("nan"), x),
    "of one single value": mx.zeros_like,
}


INFINITE = {
    sign: lambda x, sign=sign: mx.where(mx.arange(x.shape[-1]) == 5, sign * float("inf"), x)
    for sign in (1, -1)
}


def break_frame(monkeypatch, frame, times, fault=FAULTS["not finite"], raises=None):
    """Output frame `frame` is wrong the first `times` times that it is decoded; or an exception is raised."""
    run_stream, left = VideoDecoder.run, [times]

    def broken(self, latents, options, pixels, *others):
        if pixels is None:
            return run_stream(self, latents, options, pixels, *others)

        def pieces():
            position = pixels.time.start
            for piece in run_stream(self, latents, options, pixels, *others):
                inside = frame - position
                position += piece.shape[2]
                if 0 <= inside < piece.shape[2] and left[0]:
                    left[0] -= 1
                    if raises:
                        raise raises
                    wrong = fault(piece[:, :, inside : inside + 1])
                    parts = [piece[:, :, :inside], wrong, piece[:, :, inside + 1 :]]
                    piece = mx.concatenate([part.astype(piece.dtype) for part in parts], axis=2)
                yield piece

        return pieces()

    monkeypatch.setattr(VideoDecoder, "run", broken)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("fault", [*FAULTS.values(), *INFINITE.values(), lambda x: mx.full(x.shape, 0.3)])
def test_a_fault_is_tried_again(decoder, latents, limit, fault, monkeypatch):
    expected = decoder(latents)
    break_frame(monkeypatch, 9, 1, fault)
    assert_rounded(frames_of(decoder, latents, memory_limit=LIMITS[limit]), expected)


def test_faults_at_two_frames_are_each_tried_again(decoder, latents, monkeypatch):
    expected = decoder(latents)
    for frame in (3, 20):
        break_frame(monkeypatch, frame, 1)
    assert_rounded(frames_of(decoder, latents, memory_limit=LIMITS["streamed"]), expected)


def test_a_fault_is_tried_again_with_half_the_chunk(decoder, latents, monkeypatch):
    paces, plan = record_paces(monkeypatch), plan_decode(decoder, latents.shape, memory_limit=LIMITS["whole"])
    begun = Pace(plan.latent_frames_per_step, plan.max_chunk_frames)
    break_frame(monkeypatch, 9, 1)
    frames_of(decoder, latents, plan=plan)
    assert [pace.limit(8) for pace in paces] == [begun.limit(8) // 2]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_is_told_after_the_frames_before_it(decoder, latents, fault, monkeypatch):
    expected = decoder(latents)
    break_frame(monkeypatch, 9, 99, FAULTS[fault])
    pieces = decode_frames(decoder, latents, memory_limit=LIMITS["streamed"])
    received = []
    with pytest.raises(ArithmeticError, match=rf"frame 9 is {fault}; the \d frames before are sound") as told:
        received.extend(pieces)
    frames = np.concatenate(received)
    assert f"the {len(frames)} frames" in str(told.value) and len(frames) <= 9
    assert_rounded(frames, expected[:, :, : len(frames)])


DEVICE_ERRORS = [
    "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size",
    "[malloc] Unable to allocate 9 bytes.",
]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("message", DEVICE_ERRORS)
def test_a_failure_of_the_device_is_tried_again(decoder, latents, limit, message, monkeypatch):
    expected = decoder(latents)
    break_frame(monkeypatch, 9, 1, raises=RuntimeError(message))
    assert_rounded(frames_of(decoder, latents, memory_limit=LIMITS[limit]), expected)


@pytest.mark.parametrize("piece", range(4))
def test_a_failure_that_is_told_late_takes_back_the_frames(decoder, latents, piece, monkeypatch):
    """A command buffer's failure may surface in a later call, when its frames look finished."""
    expected, calls, synchronize = decoder(latents), [], mx.synchronize

    def fail_once():
        calls.append(1)
        if len(calls) == piece + 1:
            raise RuntimeError(DEVICE_ERRORS[0])
        synchronize()

    monkeypatch.setattr(mx, "synchronize", fail_once)
    assert_rounded(frames_of(decoder, latents, memory_limit=LIMITS["streamed"]), expected)
    assert len(calls) > piece + 1


@pytest.mark.parametrize("limit", ["streamed", "windows"])
def test_a_lasting_failure_of_the_device_keeps_what_was_before(
    decoder, latents, limit, monkeypatch, tmp_path
):
    expected = frames_of(decoder, latents, memory_limit=LIMITS[limit])
    error = RuntimeError(DEVICE_ERRORS[0])
    with monkeypatch.context() as broken:
        break_frame(broken, 9, 99, raises=error)
        told = r"failed twice at frame \d: \[METAL\].*; the \d frames before are sound. Try a smaller memory"
        with pytest.raises(RuntimeError, match=told) as raised:
            decode_to_file(decoder, latents, tmp_path / "shot.npy", memory_limit=LIMITS[limit])
        assert raised.value.__cause__ is error
    decode_to_file(decoder, latents, tmp_path / "shot.npy", memory_limit=LIMITS[limit], resume=True)
    np.testing.assert_array_equal(np.load(tmp_path / "shot.npy"), expected)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("message", DEVICE_ERRORS)
@pytest.mark.parametrize("where", ["isfinite", "weights", "fingerprint", "run"])
def test_a_failure_before_the_first_frame(decoder, latents, where, message, times, monkeypatch, tmp_path):
    """While the decode is prepared and while the stream is opened: tried again once, then told."""
    left, path = [times], tmp_path / "out.npy"

    def failing(owner, name):
        original = getattr(owner, name)

        def fail(*args, **options):
            if left[0]:
                left[0] -= 1
                raise RuntimeError(message)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, fail)

    place = {"isfinite": (mx, "isfinite"), "weights": (mx, "eval"), "run": (VideoDecoder, "run")}
    failing(*place.get(where, (request, "fingerprint_of")))
    if times == 1:
        assert decode_to_file(decoder, latents, path, memory_limit=LIMITS["streamed"]).frames == 25
        return
    with pytest.raises(
        RuntimeError, match=rf"failed twice.*{re.escape(message)}.*a smaller memory limit"
    ) as told:
        decode_to_file(decoder, latents, path, memory_limit=LIMITS["streamed"])
    assert str(told.value.__cause__) == message and not path.exists()
    assert decode_to_file(decoder, latents, path, memory_limit=LIMITS["streamed"]).frames == 25


def test_an_error_of_ours_is_not_tried_again(decoder, latents, monkeypatch):
    break_frame(monkeypatch, 9, 1, raises=RuntimeError("generator raised StopIteration"))
    with pytest.raises(RuntimeError, match=r"^generator raised StopIteration$"):
        frames_of(decoder, latents, memory_limit=LIMITS["streamed"])


def test_small_frames_may_be_of_one_value(decoder):
    latents = random_latents(decoder, 1, 2, 1, 1)
    decoder = VideoDecoder(decoder.config)
    decoder.load_weights([], strict=False)
    assert (frames_of(decoder, latents) == 128).all()


@pytest.mark.parametrize("limit", ["streamed", "windows"])
def test_a_consumer_that_raises_or_stops_leaves_nothing_behind(decoder, latents, limit, temporary_files):
    before = limits()
    with pytest.raises(KeyError):
        for _ in decode_frames(decoder, latents, memory_limit=LIMITS[limit]):
            assert limits() == before
            raise KeyError
    assert limits() == before and list(temporary_files.iterdir()) == []
    pieces = decode_frames(decoder, latents, memory_limit=LIMITS[limit])
    next(pieces)
    pieces.close()
    assert limits() == before and list(temporary_files.iterdir()) == []


def test_decodes_that_interleave_leave_no_limits_behind(decoder, latents):
    before = limits()
    first, second = (
        decode_frames(decoder, latents, memory_limit=LIMITS[name]) for name in ("streamed", "windows")
    )
    next(first)
    next(second)
    first.close()
    assert limits() == before
    assert np.concatenate(list(second)).shape[1:] == (128, 96, 3) and limits() == before


def test_a_plan_is_for_one_decoder_dtype_and_direction(decoder, latents):
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB", causal=True)
    assert_rounded(frames_of(decoder, latents, plan=plan), decoder(latents, causal=True))
    assert_rounded(
        frames_of(decoder, latents, causal=True, memory_limit="1GB"), decoder(latents, causal=True)
    )
    with pytest.raises(ValueError, match="the plan is for causal=True, got False"):
        decode_frames(decoder, latents, plan=plan, causal=False)
    half = plan_decode(decoder, latents.shape, memory_limit="1GB", dtype=mx.bfloat16)
    with pytest.raises(ValueError, match="the plan is for bfloat16 weights, got float32"):
        decode_frames(decoder, latents, plan=half)
    with pytest.raises(ValueError, match="the plan is for a decoder of another architecture"):
        decode_frames(small_decoder("ltx-2"), latents, plan=plan)


def test_what_runs_is_what_the_plan_says_runs(decoder, latents):
    """Also the policy: a plan for Metal runs as Metal would, wherever it is run."""
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB", backend="metal")
    assert str(plan).endswith("float32 on metal")
    # Its form of convolution sums in another order, which may round another way.
    expected = frames_of(decoder, latents).astype(int)
    difference = np.abs(frames_of(decoder, latents, plan=plan) - expected)
    assert difference.max() <= 1 and difference.mean() < 1e-3


@pytest.mark.parametrize("tiling", [1, TilingConfig(SpatialTilingConfig(64, 32))])
def test_tiles_and_halos_see_the_noise_of_the_whole_video(tiling, monkeypatch):
    """Every part of every field is the part, at its place, of one field per video."""
    decoder = small_decoder("0.9.1")
    latents = random_latents(decoder, 1, 2, 6, 4)
    whole, seen = {}, []
    field = Noise.field

    def spy(noise, number, region, scale):
        found = field(noise, number, region, scale)
        seen.append((number, region, scale, noise.origin, found))
        return found

    monkeypatch.setattr(Noise, "field", spy)
    mx.eval(decoder(latents))
    whole = {number: found for number, *_, found in seen}
    seen.clear()
    limit = LIMITS["windows"] if tiling == 1 else "1GB"
    plan = plan_decode(decoder, latents.shape, memory_limit=limit, tiling=tiling)
    if tiling == 1:
        plan = plan_decode(decoder, latents.shape, memory_limit=int(plan.peak_bytes * 1.01), tiling=tiling)
    frames_of(decoder, latents, plan=plan)
    assert any(origin != (0, 0, 0) for *_, origin, _ in seen)
    for number, region, scale, (_, top, left), found in seen:
        rows = slice(top * scale + region.height.start, top * scale + region.height.stop)
        columns = slice(left * scale + region.width.start, left * scale + region.width.stop)
        assert mx.array_equal(found, whole[number][rows, columns])


def written(decoder, latents, path, **options):
    report = decode_to_file(decoder, latents, path, **options)
    assert not [name for name in os.listdir(path.parent) if "partial" in name]
    return report, np.load(path)


@pytest.mark.parametrize("limit", LIMITS)
def test_file_and_report(decoder, latents, limit, tmp_path):
    report, frames = written(decoder, latents, tmp_path / "out.npy", memory_limit=LIMITS[limit])
    assert_rounded(frames, decoder(latents))
    assert (report.path, report.frames, report.resumed_frames) == (str(tmp_path / "out.npy"), 25, 0)
    assert report.plan == plan_decode(decoder, latents.shape, memory_limit=LIMITS[limit])
    assert 0.5 * report.plan.peak_bytes < report.peak_bytes <= 1.05 * report.plan.memory_limit
    assert report.footprint_bytes > report.peak_bytes and report.seconds > 0
    assert "25 frames in" in str(report) and "predicted" in str(report)


def test_prores_takes_sixteen_bits(decoder, latents, tmp_path, monkeypatch):
    seen = []
    finish = job.finish
    monkeypatch.setattr(job, "finish", lambda piece, kind: seen.append(kind) or finish(piece, kind))
    decode_to_file(decoder, latents[:, :, :2], tmp_path / "out.MOV")
    assert set(seen) == {"uint16"}


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("limit", ["streamed", "windows"])
def test_a_disk_that_fills_up_loses_nothing(decoder, latents, limit, tmp_path, monkeypatch):
    path, options = tmp_path / "out.npy", {"memory_limit": LIMITS[limit]}
    expected = frames_of(decoder, latents, **options)
    place, name, most = (npy, "_flush", 4) if limit == "streamed" else (store.os, "pwrite", 30)
    write, calls = getattr(place, name), []
    with monkeypatch.context() as patch:
        patch.setattr(
            place, name, lambda *a: full_disk() if len(calls) > most else calls.append(1) or write(*a)
        )
        with pytest.raises(OSError, match="No space left"):
            decode_to_file(decoder, latents, path, **options)
    kept = finished_frames(path)
    assert 0 < min(kept) < 25
    report, frames = written(decoder, latents, path, resume=True, **options)
    assert report.resumed_frames == min(kept)
    assert (frames == expected).all()


def test_a_disk_without_room_is_found_before_decoding(decoder, latents, tmp_path, monkeypatch):
    """Several windows keep their frames beside the output; how large H.264 gets nobody knows before."""
    raw, array = 25 * 128 * 96 * 3, 25 * 128 * 96 * 3 + 128
    # A row of an image has a byte more; what zlib cannot shrink takes a little more than it is.
    images = 25 * (128 * (1 + 96 * 3) * 1001 // 1000 + 4096)
    cases = [
        (".npy", "whole", array),
        (".npy", "windows", raw + array),
        (".mp4", "windows", raw),
        ("_%d.png", "whole", images),
        ("_%d.png", "windows", raw + images),
    ]
    for suffix, limit, needed in cases:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, n=needed: SimpleNamespace(free=n - 1))
        with monkeypatch.context() as patch:
            patch.setattr(VideoDecoder, "run", None)  # the decode must not begin
            with pytest.raises(OSError, match=f"need {needed} bytes"):
                decode_to_file(decoder, latents, tmp_path / f"out{suffix}", memory_limit=LIMITS[limit])
    assert [entry.name for entry in tmp_path.iterdir()] == ["temporary"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert decode_to_file(decoder, latents, tmp_path / "out.mp4", memory_limit="1GB").frames == 25


@pytest.mark.parametrize("begun", [None, 9, 22])
def test_the_disk_never_holds_twice_a_video(decoder, latents, begun, tmp_path, monkeypatch):
    """With all that lies beside the output while it is made, continued and closed, and gets its name."""
    path, options = tmp_path / "out.mp4", {"fps": 4, "memory_limit": LIMITS["streamed"]}
    if begun:
        interrupted(decoder, latents, path, monkeypatch, frame=begun, **options)
    with monkeypatch.context() as patch:
        taken = watched(tmp_path, patch)
        report = decode_to_file(decoder, latents, path, resume=bool(begun), **options)
    assert bool(report.resumed_frames) == bool(begun)
    assert len(taken) > 50 and max(taken) <= 2 * path.stat().st_size


def test_an_output_is_replaced_only_when_told_and_complete(decoder, latents, tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    np.save(path, np.zeros(3))
    old = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"exists already; replace it \(overwrite=True, --overwrite\)"):
        decode_to_file(decoder, latents, path)
    assert sorted(os.listdir(tmp_path)) == ["out.npy", "temporary"]
    interrupted(decoder, latents, path, monkeypatch, overwrite=True)
    assert path.read_bytes() == old and finished_frames(path) > [0]
    # Begun again, and then continued: that the output may be replaced was said when it was begun.
    interrupted(decoder, latents, path, monkeypatch, overwrite=True, frame=20)
    report, frames = written(decoder, latents, path, resume=True, memory_limit=LIMITS["streamed"])
    assert report.resumed_frames > 12
    assert_rounded(frames, decoder(latents))


def test_another_file_that_has_come_meanwhile_is_not_replaced(decoder, latents, tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    interrupted(decoder, latents, path, monkeypatch)
    np.save(path, np.zeros(3))
    with pytest.raises(FileExistsError, match="exists already"):
        decode_to_file(decoder, latents, path, resume=True, memory_limit=LIMITS["streamed"])
    assert len(np.load(path)) == 3 and finished_frames(path) > [0]


@pytest.mark.parametrize("limit", ["streamed", "windows"])
@pytest.mark.parametrize("name", ["out.npy", "out.mp4", "out_%d.png"])
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_when_all_was_written(decoder, latents, limit, name, earlier, tmp_path, monkeypatch):
    """An output that has its name is complete, although its journal is there still; an older one is not."""
    path, options = tmp_path / name, {"memory_limit": LIMITS[limit]}
    if earlier:
        decode_to_file(decoder, latents[:, :, :2], path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "remove", Mock(side_effect=KeyboardInterrupt))
        decode_to_file(decoder, latents, path, overwrite=earlier, **options)
    before = {file: file.read_bytes() for file in tmp_path.glob("out*") if file.is_file()}
    assert list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="seed"):
        decode_to_file(decoder, latents, path, resume=True, seed=1, **options)
    with monkeypatch.context() as patch:
        patch.setattr(VideoDecoder, "run", None)
        report = decode_to_file(decoder, latents, path, resume=True, **options)
    assert (report.frames, report.resumed_frames) == (25, 25)
    assert {file: file.read_bytes() for file in tmp_path.glob("out*")} == before


def test_an_older_output_is_not_taken_for_a_complete_one(decoder, latents, tmp_path, monkeypatch):
    path, options = tmp_path / "out.npy", {"memory_limit": LIMITS["windows"]}
    np.save(path, np.zeros(3))
    # One window is finished, and no frame of the output yet.
    interrupted(decoder, latents, path, monkeypatch, overwrite=True, **options)
    assert unfinished_frames(path) is None
    report, frames = written(decoder, latents, path, resume=True, **options)
    assert report.frames == len(frames) == 25


def test_an_unfinished_output_without_a_journal(decoder, latents, tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    shutil.rmtree(interrupted(decoder, latents, path, monkeypatch))
    for resume, told in ((False, "unfinished output"), (True, "not of which decode; begin again")):
        with pytest.raises(FileExistsError, match=told):
            decode_to_file(decoder, latents, path, resume=resume)
    _, frames = written(decoder, latents, path, overwrite=True, resume=True)
    assert_rounded(frames, decoder(latents))


def test_what_is_kept_is_asked_only_where_nobody_writes(decoder, latents, tmp_path, monkeypatch):
    """Looking into an unfinished output cuts off its end."""
    path, found, write, looked = tmp_path / "out.npy", [], VideoWriter.write, Mock()
    with monkeypatch.context() as patch:
        patch.setattr(output, "unfinished_frames", looked)
        patch.setattr(VideoWriter, "write", lambda *a: found.append(output.kept_frames(path)) or write(*a))
        decode_to_file(decoder, latents, path, memory_limit=LIMITS["streamed"])
    assert found and set(found) == {None} and not looked.called


def test_the_sound_of_a_window(decoder, latents, tmp_path):
    """Frames 8 to 24 of 25 at 8 frames a second: one tone ends and another begins at frame 16."""
    rate = 8000
    at = np.arange(rate * 25 // 8) / rate
    tone = 8000 * np.sin(2 * np.pi * np.where(at < 2, 500, 1500) * at)
    with wave.open(str(tmp_path / "clip.wav"), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(tone.astype("<i2").tobytes())
    options = {"fps": 8, "audio": tmp_path / "clip.wav", "window": Window(slice(8, 24))}
    decode_to_file(decoder, latents, tmp_path / "out.mov", codec="h264", **options)
    with av.open(tmp_path / "out.mov") as video:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in video.decode(audio=0)])
    assert abs(len(heard) - 2 * rate) <= 256
    for start, pitch in ((0, 500), (1, 1500)):
        second = heard[start * rate + 500 : start * rate + 7500]
        assert np.abs(np.fft.rfft(second)).argmax() * rate / 7000 == pytest.approx(pitch, abs=2)
    with pytest.warns(AudioWarning, match=r"3.12 s of sound for a clip of 2.50 s"):
        decode_to_file(decoder, latents, tmp_path / "fast.mov", codec="h264", **options | {"fps": 10})
    with pytest.raises(ValueError, match="audio is for"):
        decode_to_file(decoder, latents, tmp_path / "out.npy", audio=tmp_path / "clip.wav")


def test_a_path_that_cannot_be_written_is_found_before_decoding(decoder, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "frames_of", None)
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere" / "out.npy", tmp_path / "file" / "out.npy"):
        with pytest.raises(OSError, match="no such directory"):
            decode_to_file(decoder, latents, path)
    with pytest.raises(ValueError, match="path must end in"):
        decode_to_file(decoder, latents, tmp_path / "out.webm")


def finished_frames(path):
    """Of each part of an unfinished decode."""
    done = json.loads((path.with_name(path.name + ".partial") / "journal.json").read_text())["done"]
    return done or [unfinished_frames(path)[1]]


def interrupted(decoder, latents, path, monkeypatch, frame=12, **options):
    """A decode to `path` that was ended by Ctrl-C at a frame; returns its store's folder."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_frame(patch, frame, 1, raises=KeyboardInterrupt())
        decode_to_file(decoder, latents, path, **{"memory_limit": LIMITS["streamed"], **options})
    return path.with_name(path.name + ".partial")


@pytest.mark.parametrize("limit", ["streamed", "windows"])
@pytest.mark.parametrize("second_limit", LIMITS)
def test_resume_gives_the_same_frames(decoder, latents, limit, second_limit, tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    _, expected = written(decoder, latents, tmp_path / "expected.npy", memory_limit=LIMITS[limit])
    interrupted(decoder, latents, path, monkeypatch, memory_limit=LIMITS[limit])
    done = finished_frames(path)
    assert max(done) > 0 and min(done) < 25
    options = {"memory_limit": LIMITS[second_limit], "resume": True}
    if limit == "streamed" and second_limit == "windows":
        # One window was begun, and its state does not fit; a fresh run would.
        told = r"begun with 1 window, .* got .* MB: .* begin again .*overwrite.* with \d windows, which fits"
        with pytest.raises(ValueError, match=told):
            decode_to_file(decoder, latents, path, **options)
        assert written(decoder, latents, path, memory_limit=LIMITS[second_limit], overwrite=True)
        return
    report, frames = written(decoder, latents, path, **options)
    assert report.resumed_frames == min(done)
    assert (frames == expected).all()


def test_ctrl_c_leaves_a_playable_file(decoder, latents, tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    interrupted(decoder, latents, path, monkeypatch)
    (done,) = finished_frames(path)
    with av.open(tmp_path / "out.partial.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == done > 0
    decode_to_file(decoder, latents, path, memory_limit=LIMITS["streamed"], resume=True)
    with av.open(path) as video:
        assert sum(1 for _ in video.decode(video=0)) == 25


def test_resume_of_blended_tiles_and_of_a_halo(decoder, latents, tmp_path, monkeypatch):
    tiling = TilingConfig.temporal_only(16, 8)
    path, options = tmp_path / "out.npy", {"tiling": tiling, "memory_limit": "1GB"}
    _, expected = written(decoder, latents, tmp_path / "expected.npy", **options)
    stream = VideoDecoder.run_tiled
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            VideoDecoder,
            "run_tiled",
            lambda *a, **o: (1 // (i < 1) and x for i, x in enumerate(stream(*a, **o))),
        )
        decode_to_file(decoder, latents, path, **options)
    report, frames = written(decoder, latents, path, resume=True, **options)
    assert report.resumed_frames > 0 and (frames == expected).all()
    options = {"tiling": 1, "memory_limit": LIMITS["windows"]}
    _, expected = written(decoder, latents, tmp_path / "expected.npy", overwrite=True, **options)
    path = tmp_path / "halo.npy"
    interrupted(decoder, latents, path, monkeypatch, **options)
    _, frames = written(decoder, latents, path, resume=True, **options)
    assert (frames == expected).all()


def test_resume_without_an_earlier_decode_begins_one(decoder, latents, tmp_path):
    (tmp_path / "out.npy.partial").mkdir()  # killed before the first journal
    for overwrite in (False, True):
        options = {"resume": True, "overwrite": overwrite, "memory_limit": "1GB"}
        report, _ = written(decoder, latents, tmp_path / "out.npy", **options)
        assert report.resumed_frames == 0


def test_two_decodes_to_one_output(decoder, latents, tmp_path):
    """The second is told, whichever process it is of, and the first is not disturbed."""
    path, told = tmp_path / "out.npy", []
    program = (
        "import mlx.core as mx, sys; from mlx_vae_tiling import *; d = load_decoder('demo'); "
        "l = load_latents('demo')[:, :, :1, :2, :2]; "
        "decode_to_file(d, l, sys.argv[1], resume=len(sys.argv) > 2)"
    )

    class Rival(VideoDecoder):
        def run(self, *given):
            for resume in ([], ["resume"]):
                command = [sys.executable, "-c", program, str(path), *resume]
                told.append(subprocess.run(command, capture_output=True, text=True).stderr)
            return super().run(*given)

    rival = Rival(decoder.config)
    rival.update(decoder.parameters())
    _, frames = written(rival, latents, path, memory_limit="1GB")
    assert len(told) == 2 and all("another process is decoding to this output now" in line for line in told)
    assert_rounded(frames, decoder(latents))


def test_files_of_others_stay(decoder, latents, tmp_path):
    """What lies beside the store is not the store's to delete."""
    folder = tmp_path / "out.npy.partial"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    decode_to_file(decoder, latents, tmp_path / "out.npy", memory_limit="1GB")
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_an_earlier_decode_is_not_overwritten(decoder, latents, tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    folder = interrupted(decoder, latents, path, monkeypatch)
    unfinished = tmp_path / "out.partial.npy"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}, unfinished.read_bytes()
    with pytest.raises(FileExistsError, match="resume it") as told:
        decode_to_file(decoder, latents, path)
    assert told.value.filename == str(folder)
    assert ({file.name: file.read_bytes() for file in folder.iterdir()}, unfinished.read_bytes()) == before


def other_weights(decoder):
    other = VideoDecoder(decoder.config).init_random(seed=1)
    other.conv_out.conv.bias = other.conv_out.conv.bias + 1e-6
    return other


CHANGES = {
    "latents": lambda d, x: (d, x + 1e-3, {}),
    "latent dtype": lambda d, x: (d, x.astype(mx.bfloat16), {}),
    "weights": lambda d, x: (other_weights(d), x, {}),
    "seed": lambda d, x: (d, x, {"seed": 1}),
    "normalized": lambda d, x: (d, x, {"normalized": False}),
    "timestep": lambda d, x: (d, x, {"timestep": 0.1}),
    "tiling": lambda d, x: (d, x, {"tiling": 2}),
    "output": lambda d, x: (d, x, {"window": Window(slice(0, 20))}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_what_has_changed(latents, change, tmp_path, monkeypatch):
    path, decoder = tmp_path / "out.npy", small_decoder("0.9.5" if change == "timestep" else "ltx-2.3")
    folder = interrupted(decoder, latents, path, monkeypatch)
    other, changed, options = CHANGES[change](decoder, latents)
    with pytest.raises(ValueError, match=f"begun with, but .*{change}.* differs from .*delete {folder}"):
        decode_to_file(other, changed, path, resume=True, memory_limit=LIMITS["streamed"], **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda journal, frames: frames.unlink() if frames.exists() else journal.write_text(""),
        lambda journal, frames: os.truncate(frames if frames.exists() else journal, 100),
        lambda journal, frames: journal.write_text("{"),
        lambda journal, frames: journal.write_bytes(b"\xff\xfe\x00"),
        lambda journal, frames: journal.write_text("[1, 2]"),
        lambda journal, frames: journal.write_text(journal.read_text().replace('"done"', '"gone"')),
        lambda journal, frames: journal.write_text(
            journal.read_text().replace('"parts": [', '"parts": [[],')
        ),
    ],
)
@pytest.mark.parametrize("limit", ["streamed", "windows"])
def test_a_damaged_store_is_refused(decoder, latents, damage, limit, tmp_path, monkeypatch):
    path, options = tmp_path / "out.npy", {"memory_limit": LIMITS[limit]}
    folder = interrupted(decoder, latents, path, monkeypatch, **options)
    damage(folder / "journal.json", folder / "frames")
    with pytest.raises(ValueError, match=r"journal.json cannot be read \(.*\); delete .*out.npy.partial"):
        decode_to_file(decoder, latents, path, resume=True, **options)


def test_chunks_shrink_when_more_is_measured_than_the_limit(decoder, latents, monkeypatch):
    plan = plan_decode(decoder, latents.shape, memory_limit=LIMITS["streamed"])
    paces = record_paces(monkeypatch)
    monkeypatch.setattr(job.PeakMeter, "read", lambda meter: plan.memory_limit + 1)
    assert_rounded(frames_of(decoder, latents, plan=plan), decoder(latents))
    assert paces[-1].limit(8) < Pace(plan.latent_frames_per_step, plan.max_chunk_frames).limit(8)


def test_chunks_grow_once_when_much_less_is_measured(decoder, monkeypatch):
    latents = random_latents(decoder, 1, 12, 2, 2)
    streamed = plan_decode(decoder, latents.shape, memory_limit="1GB", chunk=(1, 1))
    plan = plan_decode(decoder, latents.shape, memory_limit=streamed.peak_bytes)
    assert plan.limited_by == "the memory limit"
    paces = record_paces(monkeypatch)
    monkeypatch.setattr(job.PeakMeter, "read", lambda meter: plan.lasting_bytes // 2)
    assert_rounded(frames_of(decoder, latents, plan=plan), decoder(latents))
    expected = Pace(plan.latent_frames_per_step, plan.max_chunk_frames)
    expected.double(8)
    assert paces == [expected]


def record_paces(monkeypatch):
    paces = []
    monkeypatch.setattr(job, "Pace", lambda *given: paces.append(Pace(*given)) or paces[-1])
    return paces


def test_memory_that_is_held_otherwise_does_not_count(decoder, latents):
    plan = plan_decode(decoder, latents.shape, memory_limit=LIMITS["streamed"])
    other = mx.zeros(10**7)
    mx.eval(other)
    sizes = [len(piece) for piece in decode_frames(decoder, latents, plan=plan)]
    del other
    assert sizes == [len(piece) for piece in decode_frames(decoder, latents, plan=plan)]


def test_frames_are_a_lazy_iterator(decoder, latents):
    assert len(next(islice(decode_frames(decoder, latents, memory_limit=LIMITS["streamed"]), 1))) < 25


@pytest.mark.parametrize(("computing", "halved"), [(0.1, False), (1000.0, True)])
def test_slow_evaluations_halve_the_chunks_and_a_slow_consumer_does_not(
    decoder, latents, computing, halved, monkeypatch
):
    """By a stand-in clock: seconds of a piece, and a hundred thousand for each that the consumer has."""
    now, finish = [0.0], job.finish

    def slow_finish(*given):
        now[0] += computing
        return finish(*given)

    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(job, "finish", slow_finish)
    paces, plan = (
        record_paces(monkeypatch),
        plan_decode(decoder, latents.shape, memory_limit="1GB", chunk=(1, None), backend=METAL),
    )
    monkeypatch.setattr(job.PeakMeter, "read", lambda meter: plan.peak_bytes)
    count = 0
    for frames in decode_frames(decoder, latents, plan=plan):
        now[0] += 1e5
        count += len(frames)
    begun = Pace(plan.latent_frames_per_step, plan.max_chunk_frames)
    assert count == 25 and (paces[-1].limit(8) < begun.limit(8)) == halved


@pytest.mark.parametrize("limit", LIMITS)
def test_frames_asked_for_in_one_thread_are_decoded_in_another(decoder, latents, limit):
    """What was only scheduled in the first thread cannot be computed in the second."""
    fresh = VideoDecoder(decoder.config)
    fresh.load_weights([(name, value + 0) for name, value in tree_flatten(decoder.parameters())])
    pieces = decode_frames(fresh, latents + 0, memory_limit=LIMITS[limit])
    with ThreadPoolExecutor(1) as pool:
        frames = np.concatenate(pool.submit(list, pieces).result())
    assert_rounded(frames, decoder(latents))
