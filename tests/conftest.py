"""Every test starts from the same random state and an empty cache, on the device that it is for."""

import mlx.core as mx
import pytest


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "gpu"], help="on which to test; default: MLX's own choice")


def pytest_configure(config):
    if device := config.getoption("--device"):
        mx.set_default_device(getattr(mx, device))


@pytest.fixture(autouse=True)
def fresh_mlx(request):
    device = mx.default_device()
    if request.node.get_closest_marker("cpu"):
        mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    mx.clear_cache()
    yield
    mx.set_default_device(device)
