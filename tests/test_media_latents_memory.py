"""Loading latents takes the memory of the array once, whatever the file."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.cpu

LATENTS = np.random.default_rng(0).standard_normal((1, 128, 20, 48, 64)).astype(np.float32)  # 31 MB

PROGRAM = """
import sys
import mlx.core as mx
from mlx_vae_tiling.media.latents import load_latents

def resident(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

load_latents(sys.argv[2])  # what only the first call takes
mx.clear_cache()
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
latents = load_latents(sys.argv[1])
mx.eval(latents)
print((resident("VmHWM") - before) / latents.nbytes, mx.get_peak_memory() / latents.nbytes)
"""


def save(path, array: np.ndarray) -> None:
    if path.suffix == ".npz":
        (np.savez_compressed if "packed" in path.name else np.savez)(path, latents=array)
    elif path.suffix == ".npy":
        np.save(path, array)
    else:
        key = "latent_tensor" if path.suffix == ".latent" else "latents"
        tensor = mx.array(array)
        mx.save_safetensors(str(path), {key: tensor.astype(mx.bfloat16) if "half" in path.name else tensor})
        if path.suffix == ".latent":  # mx appends its suffix
            path.with_name(f"{path.name}.safetensors").rename(path)


FILES = ["a.safetensors", "half.safetensors", "a.latent", "half.latent", "a.npy", "a.npz", "packed.npz"]
MADE = {
    "swapped.npy": LATENTS.astype(">f4"),
    "fortran.npy": np.asfortranarray(LATENTS),
    "double.npy": LATENTS.astype("f8"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset and read in /proc")
@pytest.mark.parametrize("name", [*FILES, *MADE])
def test_peak_is_once_the_array(tmp_path, name):
    save(tmp_path / name, MADE.get(name, LATENTS))
    save(tmp_path / f"small_{name}", MADE.get(name, LATENTS)[:, :, :1, :2, :2])
    command = [sys.executable, "-c", PROGRAM, tmp_path / name, tmp_path / f"small_{name}"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    resident, of_mlx = (float(number) for number in result.stdout.split())
    # Pieces of 1 MiB and what converts them lie beside the array: at most 12 MB in all.
    array_bytes = LATENTS.nbytes // (2 if "half" in name else 1)
    assert resident < 1 + 12e6 / array_bytes
    assert of_mlx < 1 + 12e6 / array_bytes
