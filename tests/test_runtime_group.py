"""Several local processes decode what one decodes: the same bytes, whoever computes them."""

import numpy as np
import pytest
from group_cases import run_alone, run_ranks

WIDE, LONG = [3, 4, 5], [60, 2, 2]
"""Latents that are divided into bands, and into ranges of frames."""


def settings_of(size, dtype="float32", **more):
    return {"size": size, "dtype": dtype, "width": 4, **more}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [WIDE, LONG], ids=["bands", "ranges"])
def test_byte_identical_to_one_process(size, ranks, dtype, tmp_path):
    settings = settings_of(size, dtype, frames=True)
    run_ranks(tmp_path, ranks, settings | {"output": str(tmp_path / "ranks.npy")})
    run_alone(settings, windows_of=ranks, output=str(tmp_path / "alone.npy"))
    assert (tmp_path / "ranks.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    run_alone(settings, windows_of=1, output=str(tmp_path / "whole.npy"))
    frames, whole = np.load(tmp_path / "ranks.npy"), np.load(tmp_path / "whole.npy")
    assert frames.std() > 10
    if size == LONG:
        assert (frames == whole).all()
    # In other windows sums are in another order: some of what is nearly between two integers.
    assert np.abs(frames.astype(int) - whole).max() <= 1 and (frames != whole).mean() < 1e-3
