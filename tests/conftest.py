"""Every test starts from the same random state and an empty cache."""

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def fresh_mlx():
    mx.random.seed(0)
    mx.clear_cache()
