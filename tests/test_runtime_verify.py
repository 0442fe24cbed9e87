"""How far an approximate decode is from the exact one: scores by their definitions, seams where they are."""

import math

import mlx.core as mx
import numpy as np
import pytest
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling import TilingConfig, Window, decode_frames, plan_decode, verify_decode
from mlx_vae_tiling.runtime.verification import verify
from mlx_vae_tiling.runtime.verification.compare import Comparison, Score, total
from mlx_vae_tiling.runtime.verification.seams import Seams, seams_of
from mlx_vae_tiling.runtime.verification.verification import Verification
from mlx_vae_tiling.tiling import SpatialTilingConfig, TemporalTilingConfig
from mlx_vae_tiling.vae import cpu
from mlx_vae_tiling.vae.kernels.workspace import Workspace

SIZE = (4, 4, 3)
"""Latents: 25 frames of 96x128 pixels."""

TILES = TilingConfig(SpatialTilingConfig(64, 32), TemporalTilingConfig(16, 8))
"""For these latents: rows overlap in 32:64 and 64:96, columns in 32:64, frames in 0:9 and 8:17."""


@pytest.fixture(scope="module")
def decoder():
    return small_decoder("ltx-2.3")


@pytest.fixture(scope="module")
def latents(decoder):
    mx.random.seed(0)
    return random_latents(decoder, 1, *SIZE)


def frames_of(decoder, latents, **options):
    return np.concatenate(list(decode_frames(decoder, latents, **options)))


def reference_ssim(first, second):
    """SSIM of every position (h - 10, w - 10), the mean of three channels, in float64."""
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (
        np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (11, 11), axis=(0, 1))
        for image in (first, second)
    )

    def mean(field):
        return (field * window).sum(axis=(-1, -2))

    mean_x, mean_y = mean(x), mean(y)
    dx, dy = x - mean_x[..., None, None], y - mean_y[..., None, None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_x * mean_y + c1) * (2 * mean(dx * dy) + c2)
    ssim /= (mean_x**2 + mean_y**2 + c1) * (mean(dx * dx) + mean(dy * dy) + c2)
    return ssim.mean(axis=2)


def ssim_of(first, second):
    """Of every position of frames."""
    return np.stack([reference_ssim(*pair) for pair in zip(first, second, strict=True)])


def assert_scored(score, first, second, ssim, chosen):
    """Against the definitions in float64, of the chosen (f, h, w) pixels of frames (f, h, w, 3)."""
    difference = first.astype(np.float64) - second
    error = (difference[chosen] ** 2).mean()
    assert score.psnr == pytest.approx(10 * math.log10(255**2 / error) if error else math.inf, rel=1e-12)
    assert score.largest == abs(difference[chosen]).max()
    assert score.values == 3 * chosen.sum()
    # Measured: 2e-7, float32's rounding.
    assert score.ssim == pytest.approx(ssim[chosen[:, 5:-5, 5:-5]].mean(), abs=3e-6)


PICTURES = {
    "noise": lambda draw: draw.integers(0, 256, (2, 50, 43, 3)),
    "flat, and a step": lambda draw: np.broadcast_to(
        np.where(np.arange(43) < 20, 30, 220)[:, None], (2, 50, 43, 3)
    ),
    "white": lambda draw: np.full((2, 50, 43, 3), 255),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("strength", [1, 40])
def test_scores_are_those_of_their_definitions(name, strength):
    draw = np.random.default_rng(3)
    first = PICTURES[name](draw).astype(np.uint8)
    second = np.clip(first + draw.integers(-strength, strength + 1, first.shape), 0, 255).astype(np.uint8)
    chosen = np.zeros(first.shape[:3], bool)
    chosen[:, 3:21], chosen[1, :, 30:] = True, True
    comparison = Comparison(50, 43)
    scores = [comparison.score(*frame) for frame in zip(first, second, chosen, strict=True)]
    ssim = ssim_of(first, second)
    assert_scored(total(one for one, _ in scores), first, second, ssim, chosen)
    assert_scored(total(other for _, other in scores), first, second, ssim, ~chosen)
    squared = ((first.astype(float) - second) ** 2).sum(axis=(0, 3))
    assert np.array_equal(comparison.squared_error, squared)


def test_equal_frames_have_the_scores_of_no_difference():
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    chosen = np.zeros((20, 30), bool)
    chosen[:, 10:] = True
    one, other = Comparison(20, 30).score(frame, frame.copy(), chosen)
    assert (one.psnr, one.ssim, one.largest, one.values) == (math.inf, 1, 0, 20 * 20 * 3)
    assert (other.ssim, other.windows) == (1, 10 * 5 * 3)
    assert math.isnan(Score().psnr) and math.isnan(Score().ssim)


def test_frames_too_small_for_the_window_are_refused():
    with pytest.raises(ValueError, match="at least 11 pixels high and wide to be compared, got 40x10"):
        Comparison(10, 40)


def chosen_of(frames, rows, columns):
    """(25, 128, 96): where spans of frames, rows or columns are."""
    chosen = np.zeros((25, 128, 96), bool)
    for axis, spans in enumerate((frames, rows, columns)):
        for start, stop in spans:
            chosen[(slice(None),) * axis + (slice(start, stop),)] = True
    return chosen


CASES = {
    # By hand: tiles of two latents, overlapping by one; in time those after the first begin one earlier.
    "blended": (TILES, ((0, 9), (8, 17)), ((32, 64), (64, 96)), ((32, 64),)),
    "in time": (TilingConfig.temporal_only(16, 8), ((0, 9), (8, 17)), (), ()),
    "in space": (TilingConfig.spatial_only(64, 0), (), ((32, 96),), ((32, 96),)),
    "one tile": (TilingConfig.default(), (), (), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_blended_tiles_are_scored_at_their_seams_and_elsewhere(decoder, latents, name):
    tiling, *spans = CASES[name]
    result = verify_decode(decoder, latents, tiling=tiling, memory_limit="1GB")
    assert result.seams[:3] == tuple(spans)
    tiled = frames_of(decoder, latents, tiling=tiling, memory_limit="1GB")
    exact = frames_of(decoder, latents, memory_limit="1GB")
    chosen, ssim = chosen_of(*spans), ssim_of(tiled, exact)
    assert result.seams.share == pytest.approx(chosen.mean())
    for score, pixels in ((result.seam_total, chosen), (result.elsewhere_total, ~chosen)):
        if pixels.any():
            assert_scored(score, tiled, exact, ssim, pixels)
        else:
            assert score == Score()
    frames = [(tiled[i].astype(float) - exact[i]).ravel() for i in range(25)]
    for index, difference in enumerate(frames):
        error = (difference**2).mean()
        expected = 10 * math.log10(255**2 / error) if error else math.inf
        assert result.frames[index].psnr == pytest.approx(expected)
    assert np.allclose(result.rms**2, ((tiled.astype(float) - exact) ** 2).mean(axis=(0, 3)))


def test_windows_with_a_small_halo_have_seams_where_they_meet(decoder, latents):
    plan = plan_decode(decoder, latents.shape, memory_limit=2_200_000, tiling=0)
    assert len(plan.parts) > 1
    result = verify_decode(decoder, latents, tiling=0, memory_limit=2_200_000)
    assert result.plan == plan
    edges = [{part.pixels[axis].start for part in plan.parts} - {0} for axis in (1, 2)]
    rows, columns = (tuple((edge - 32, edge + 32) for edge in sorted(axis)) for axis in edges)
    assert result.seams[:3] == ((), rows, columns) and rows + columns
    halo = frames_of(decoder, latents, plan=plan)
    exact = frames_of(decoder, latents, memory_limit="1GB")
    chosen = chosen_of((), rows, columns)
    # Exact windows round differently: some values are off by one level.
    assert result.seam_total.psnr == pytest.approx(
        10 * math.log10(255**2 / ((halo.astype(float) - exact)[chosen] ** 2).mean()), abs=0.05
    )


def test_windows_of_a_part_are_counted_from_its_corner():
    decoder = small_decoder("ltx-2.3")
    window = Window(slice(1, 5), slice(10, 128), slice(3, 90))
    plan = plan_decode(decoder, (1, 8, *SIZE), memory_limit=1_200_000, tiling=0, window=window)
    found = seams_of(plan)
    assert found and found.size == (4, 118, 87)
    starts = sorted({part.pixels.height.start for part in plan.parts} - {10})
    assert found.rows == tuple((max(start - 42, 0), min(start + 22, 118)) for start in starts)


@pytest.mark.parametrize("together", [True, False])
def test_scores_do_not_depend_on_the_memory_which_is_kept(decoder, latents, together, monkeypatch):
    kept, read = [], verify.read_store
    monkeypatch.setattr(verify, "read_store", lambda *args: kept.append(args) or read(*args))
    tiling = TilingConfig.temporal_only(16, 8)
    needed = plan_decode(decoder, latents.shape, tiling=tiling, memory_limit="1GB").peak_bytes
    limit = int(needed * (1.5 if together else 1.02))
    result = verify_decode(decoder, latents, tiling=tiling, memory_limit=limit)
    assert bool(kept) != together
    # Measured: at most 0.3 % above the limit.
    assert result.peak_bytes <= 1.02 * limit
    free = verify_decode(decoder, latents, tiling=tiling, memory_limit="1GB")
    for one, other in zip(result.frames, free.frames, strict=True):
        assert one.psnr == pytest.approx(other.psnr, abs=0.1)


@pytest.mark.cpu
@pytest.mark.parametrize("together", [True, False])
def test_both_decodes_compute_in_the_memory_that_is_counted(decoder, latents, together, monkeypatch):
    """What NumPy takes outside MLX is there once for both, as the peak has it."""
    opened = []

    class Watched(Workspace):
        def __init__(self):
            super().__init__()
            opened.append(self)

    monkeypatch.setattr(cpu, "Workspace", Watched)
    tiling = TilingConfig.temporal_only(16, 8)
    needed = plan_decode(decoder, latents.shape, tiling=tiling, memory_limit="1GB").peak_bytes
    limit = int(needed * (1.5 if together else 1.02))
    verify_decode(decoder, latents, tiling=tiling, memory_limit=limit)
    held = [workspace.nbytes for workspace in opened]
    assert sum(held) == max(held) > 0


def test_decodes_run_in_turns_and_hold_a_piece_each(decoder, monkeypatch):
    """Neither is ahead of the other by more than a piece, and no piece is the video."""
    latents = random_latents(decoder, 1, 12, 3, 3)
    done, order = {}, []

    def watched(job, *args):
        name = "tiles" if job.plan.tiling else "exact"
        for piece in frames(job, *args):
            done[name] = done.get(name, 0) + len(piece)
            order.append((name, len(piece)))
            yield piece

    frames = verify.frames_of
    monkeypatch.setattr(verify, "frames_of", watched)
    told, tiling = [], TilingConfig.temporal_only(16, 8)
    limit = int(1.35 * plan_decode(decoder, latents.shape, tiling=tiling, memory_limit="1GB").peak_bytes)
    verify_decode(decoder, latents, tiling=tiling, memory_limit=limit, report=told.append)
    assert done == {"tiles": 89, "exact": 89} and sum(told) == 89
    ahead, largest = 0, max(count for _, count in order)
    assert largest < 89 / 3
    for name, count in order:
        ahead += count if name == "tiles" else -count
        assert abs(ahead) <= largest


@pytest.mark.parametrize("form", ["array", "npy"])
def test_frames_are_compared_with_an_exact_decode(decoder, latents, form, tmp_path):
    frames = frames_of(decoder, latents, memory_limit="1GB")
    given = frames.copy()
    given[7, 30:40, 50:60] ^= 64
    if form == "npy":
        np.save(tmp_path / "frames.npy", given)
        given = str(tmp_path / "frames.npy")
    result = verify_decode(decoder, latents, against=given, memory_limit="1GB")
    assert result.worst_frame == 7 and result.frames[7].largest == 64
    assert result.total.squared_error == 100 * 3 * 64**2
    assert result.compared_with == (given if form == "npy" else "against")
    assert (
        verify_decode(decoder, latents, against=frames, memory_limit="1GB").verdict
        == "identical: 25 frames, no seams"
    )


def test_frames_are_compared_with_tiles_too(decoder, latents):
    """As tiles of another program with ours."""
    tiled = frames_of(decoder, latents, tiling=TILES, memory_limit="1GB")
    result = verify_decode(decoder, latents, tiling=TILES, against=tiled, memory_limit="1GB")
    assert result.verdict == "identical: 25 frames" and result.seams


def test_a_part_of_the_video_is_compared(decoder, latents):
    window = Window(slice(3, 9), slice(0, 40), slice(20, 96))
    given = frames_of(decoder, latents, window=window, memory_limit="1GB")
    given[2, 0, 0, 0] ^= 128
    result = verify_decode(decoder, latents, against=given, window=window, memory_limit="1GB")
    assert result.worst_frame == 2 and result.rms.argmax() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a tiling to verify, or frames"),
        ({"against": np.zeros((25, 128, 96, 3), np.float32)}, "must hold uint8 frames .* float32"),
        ({"against": np.zeros((24, 128, 96, 3), np.uint8)}, "has 24 frames, the decode 25"),
        ({"against": np.zeros((25, 96, 128, 3), np.uint8)}, "frames of 128x96 pixels, the decode of 96x128"),
        ({"against": "none.npy"}, "none.npy"),
        ({"tiling": TILES, "memory_limit": 1_000}, "no plan fits"),
        ({"tiling": TILES, "window": Window(slice(0, 3))}, "crop its frames"),
        ({"tiling": -1}, "from 0 on"),
        ({"against": np.zeros((9, 8, 8, 3), np.uint8), "window": Window(height=slice(0, 8))}, "11 pixels"),
        ({"tiling": TILES, "nois": 3}, "nois"),
    ],
)
def test_what_cannot_be_compared(decoder, latents, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
        verify_decode(decoder, latents, **options)


@pytest.mark.parametrize("count", [24, 26])
def test_videos_of_another_length(decoder, latents, count):
    """They tell how many frames they have only at their end."""
    frames = np.zeros((count, 128, 96, 3), np.uint8)
    saved = verify.SavedFrames("clip.mp4", None, (frame[None] for frame in frames))
    with pytest.raises(
        ValueError, match=r"clip.mp4 has (24 frames, the decode has more|more than the 25 frames)"
    ):
        list(verify._paired(iter([np.zeros((25, 128, 96, 3), np.uint8)]), saved.pieces, saved.path))


def test_limits_come_back_and_nothing_is_left(decoder, latents, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = mx.set_memory_limit(1)
    mx.set_memory_limit(before)
    with pytest.raises(KeyboardInterrupt):
        verify_decode(decoder, latents, tiling=0, memory_limit=2_200_000, report=interrupt)
    assert mx.set_memory_limit(before) == before and list(tmp_path.iterdir()) == []


def interrupt(_count):
    raise KeyboardInterrupt


def scored(*levels):
    """A frame of 1000 values with these differences in places, as (values, difference)."""
    values = sum(n for n, _ in levels)
    error = sum(n * level**2 for n, level in levels)
    return Score(values, error, max((level for _, level in levels), default=0), values, 0.9 * values)


CLEAN, ROUNDED, SOME, BAD = scored((1000, 0)), scored((1000, 1)), scored((1000, 2)), scored((1000, 9))
VERDICTS = [
    ("identical", [(CLEAN, CLEAN)], "identical: 1 frame", False),
    (
        "rounding",
        [(ROUNDED, CLEAN)],
        "equal to rounding, no value differs by more than 1 of 255: 1 frame",
        False,
    ),
    (
        "seams",
        [(SOME, ROUNDED), (BAD, ROUNDED)],
        "seams visible: 31.8 dB at the seams against 48.1 dB elsewhere, worst frame 1 (29.0 dB)",
        True,
    ),
    (
        "nothing elsewhere",
        [(BAD, CLEAN)],
        "seams visible: 29.0 dB at the seams against no difference elsewhere, worst frame 0 (29.0 dB)",
        True,
    ),
    (
        "seams everywhere",
        [(BAD, Score())],
        "seams visible: 29.0 dB at the seams, which are everywhere, worst frame 0 (29.0 dB)",
        True,
    ),
    (
        "below what is seen",
        [(SOME, ROUNDED)],
        "no seams visible: 42.1 dB at the seams against 48.1 dB elsewhere, worst frame 0 (42.1 dB)",
        False,
    ),
    (
        "the same elsewhere",
        [(BAD, BAD)],
        "visible differences, at the seams no more than elsewhere: "
        "29.0 dB at the seams against 29.0 dB elsewhere, worst frame 0 (29.0 dB)",
        True,
    ),
    ("no seams, visible", [(Score(), BAD)], "visible differences: 29.0 dB, worst frame 0 (29.0 dB)", True),
    ("no seams", [(Score(), SOME)], "no visible difference: 42.1 dB, worst frame 0 (42.1 dB)", False),
    (
        "some frames without seams",
        [(Score(), BAD), (BAD, SOME)],
        "visible differences, at the seams no more than elsewhere: "
        "29.0 dB at the seams against 31.8 dB elsewhere, worst frame 1 (29.0 dB)",
        True,
    ),
]


@pytest.mark.parametrize(
    ("scores", "verdict", "visible"), [case[1:] for case in VERDICTS], ids=[c[0] for c in VERDICTS]
)
def test_verdicts(scores, verdict, visible):
    at_seams, elsewhere = zip(*scores, strict=True)
    seams = Seams(((0, 1),), (), (), (len(scores), 32, 32))
    result = Verification(None, "exact", seams, at_seams, elsewhere, np.zeros((32, 32)), 0)
    assert str(result) == verdict and result.differs_visibly == visible
