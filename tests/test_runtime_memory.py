"""Amounts of memory in words, MLX's limits that come back, and measured peaks."""

import mlx.core as mx
import pytest

from mlx_vae_tiling.runtime.planning import memory
from mlx_vae_tiling.runtime.planning.memory import (
    PeakMeter,
    available_bytes,
    footprint_bytes,
    format_bytes,
    memory_budget,
    memory_limits,
    parse_bytes,
)

AMOUNTS = [
    (1, 1),
    (2.9, 2),
    (8 * 10**9, 8 * 10**9),
    ("123", 123),
    ("800 MB", 800 * 10**6),
    ("8GB", 8 * 10**9),
    (" 8 gb ", 8 * 10**9),
    ("8G", 8 * 10**9),
    ("6.5GiB", 6979321856),
    ("0.5KiB", 512),
    ("1.5TB", 15 * 10**11),
    ("2TiB", 2 * 2**40),
    ("64b", 64),
]
NONSENSE = [
    "",
    "GB",
    "8 XB",
    "-8GB",
    "8,5GB",
    "1e9",
    "8GB of it",
    0,
    -1,
    0.5,
    True,
    2.0**63,
    "0GB",
    "9999999TB",
]
NONSENSE += [float("nan"), float("inf"), None, [8]]


@pytest.mark.parametrize(("amount", "expected"), AMOUNTS)
def test_parse(amount, expected):
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize("amount", NONSENSE)
def test_nonsense_is_refused(amount):
    with pytest.raises(ValueError, match=r"must be a positive number of bytes or a string such as '8GB'"):
        parse_bytes(amount)


@pytest.mark.parametrize("amount", ["0GB", "9" * 30])
def test_an_amount_is_refused_as_it_was_given(amount):
    with pytest.raises(ValueError, match=f"got '{amount}'$"):
        parse_bytes(amount)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (1.5e6, "1.50 MB"),
        (2**30, "1.07 GB"),
        (3e13, "30000.00 GB"),
    ],
)
def test_format(amount, text):
    assert format_bytes(amount) == text


def test_default_budget_is_a_share_of_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert memory_budget() == 700
    assert memory_budget("2KB") == 2000


def test_available_memory_is_plausible():
    assert 2**26 < available_bytes() < 2**50


@pytest.mark.parametrize(
    ("key", "held_counts"), [("max_recommended_working_set_size", 1), ("free_memory", 0)]
)
def test_available_on_a_gpu_is_what_is_not_yet_held(key, held_counts, monkeypatch):
    """Memory that is free, as CUDA tells, holds nothing yet."""

    class Gpu:
        type = mx.DeviceType.gpu

    held = mx.zeros(1000)
    mx.eval(held)
    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 10**12, key: 10**9})
    assert available_bytes() == 10**9 - held_counts * mx.get_active_memory()


@pytest.mark.parametrize("wired", ["x", -1, 0])
def test_a_wired_limit_is_checked_also_where_nothing_is_wired(wired):
    wrong = pytest.raises(ValueError, match=f"must be a positive number of bytes .*, got {wired!r}")
    with wrong, memory_limits("1GB", wired=wired):
        pass


@pytest.mark.parametrize("nothing", [0, "0GB"])
def test_a_cache_may_hold_nothing(nothing):
    with memory_limits("1GB", cache=nothing):
        assert current_limits() == [10**9, 0]


def current_limits():
    """Setting is the only way to ask; the limits are put back at once."""
    found = []
    for set_limit in (mx.set_memory_limit, mx.set_cache_limit):
        found.append(set_limit(1))
        set_limit(found[-1])
    return found


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_limits_are_set_and_restored(error):
    before = current_limits()
    try:
        with memory_limits("80MB", cache="3MB") as limit:
            assert limit == 80_000_000
            assert current_limits() == [80_000_000, 3_000_000]
            with memory_limits(4_000_000):
                assert current_limits() == [4_000_000, 500_000]
            assert current_limits() == [80_000_000, 3_000_000]
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert current_limits() == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_limits_that_interleave_are_restored_in_any_order(order):
    """While some are left the youngest prevails; at the end everything is as before."""
    before = current_limits()
    open_scopes = {
        number: memory_limits((number + 1) * 10**7, cache=(number + 1) * 10**6) for number in range(3)
    }
    for scope in open_scopes.values():
        scope.__enter__()
    for number in order:
        open_scopes.pop(number).__exit__(None, None, None)
        youngest = max(open_scopes, default=None)
        expected = before if youngest is None else [(youngest + 1) * 10**7, (youngest + 1) * 10**6]
        assert current_limits() == expected


def test_limits_are_restored_when_one_is_refused():
    before = current_limits()
    with pytest.raises(ValueError, match="memory must be"), memory_limits("1GB", cache="much"):
        pass
    assert current_limits() == before


def test_peak_meter():
    others = mx.zeros(500_000)
    mx.eval(others)
    meter = PeakMeter(mx.get_active_memory())
    large = mx.zeros(250_000)
    mx.eval(large)
    del large
    assert meter.read() == pytest.approx(10**6, rel=0.02)
    meter.restart()
    assert meter.read() < 10**5
    assert meter.highest == pytest.approx(10**6, rel=0.02)


def test_footprint_counts_what_numpy_holds():
    before = footprint_bytes()
    block = bytearray(200 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert footprint_bytes() >= max(before, 200 * 2**20)
