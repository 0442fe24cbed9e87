"""Freeze outputs of the reference implementation of the tiny LTX decoders in tests/data.

The reference is `taehv.py` of github.com/madebyollin/taehv: that of its main branch for `taeltx_2` and
`taeltx2_3`, that of the branch `2026_03_11_taeltx23_wide` for `taeltx2_3_wide`; with torch 2.13 (CPU),
tqdm, safetensors 0.8 and NumPy 2.4. The tests need only the files.

    python tests/make_reference_taehv.py MAIN/taehv.py WIDE/taehv.py [folder]

writes them again. Each decoder is put together from the reference's own modules, in its order, with fewer
channels, and in the wide one fewer blocks; its weights are random. It runs through `TAEHV.decode_video`.

A file holds the decoder under its own keys (kernels and biases are int8: multiply by `kernel_scale` of
the metadata), `case.K.latents` (B, C, F, H, W) and `case.K.output` (B, 3, 8(F-1)+1, 32H, 32W) in [0, 1],
of which only every `stride`-th row and column is kept, from 0 on; metadata: `kernel_scale`, and `cases`,
a list of {latents: shape, stride}. The maths runs in float64.
"""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from make_reference import with_sorted_metadata
from safetensors.numpy import save
from torch import nn

LATENT_CHANNELS = 8
KERNEL_SCALE = 2.0**-8

# The name in a published file, the widths of the levels, and blocks per level.
DECODERS = {
    "taeltx2_3": ((24, 16, 12, 8), 3),
    "taeltx2_3_wide": ((128, 64, 24, 8), 2),
}

# (batch, frames, height, width of the latents, stride). Strides are coprime to 32.
CASES = [(1, 1, 1, 1, 1), (2, 2, 3, 2, 5), (1, 4, 2, 3, 7), (1, 3, 5, 4, 13)]


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(taehv, widths, blocks, wide):
    """The reference's autoencoder with a decoder of these widths in place of its own."""
    kind = taehv.WideMemBlock if wide else taehv.MemBlock
    conv, layers = taehv.conv, [taehv.Clamp(), taehv.conv(LATENT_CHANNELS, widths[0]), nn.ReLU()]
    for width, following in pairwise(widths):
        layers += [kind(width, width) for _ in range(blocks)]
        layers += [nn.Upsample(scale_factor=2), taehv.TGrow(width, 2), conv(width, following, bias=False)]
    model = taehv.TAEHV(None, patch_size=4, latent_channels=LATENT_CHANNELS, decoder_time_upscale=(True,) * 3)
    model.decoder = nn.Sequential(*layers, nn.ReLU(), conv(widths[-1], 3 * model.patch_size**2))
    return model.double().eval()


def set_parameters(decoder, rng):
    """Set random weights; return them under the keys of the published files."""
    tensors = {}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            # Behind a ReLU half of the energy is left. Blocks add up, hence less of each.
            fan_in = np.prod(parameter.shape[1:]) if parameter.ndim > 1 else 12
            bound = (0.9 if ".conv." in name else 1.3) * np.sqrt(3 / fan_in)
            bound *= 0.5 if parameter.ndim == 1 else 1.0
            values = np.round(rng.uniform(-bound, bound, parameter.shape) / KERNEL_SCALE).clip(-127, 127)
            tensors[f"decoder.{name}"] = values.astype(np.int8)
            parameter.copy_(torch.from_numpy(values) * KERNEL_SCALE)
    return tensors


def make(name, taehv, folder):
    """Write the reference file of a decoder."""
    rng = np.random.default_rng(sum(name.encode()))
    model = build(taehv, *DECODERS[name], wide=name.endswith("wide"))
    tensors, described = set_parameters(model.decoder, rng), []
    with (
        torch.no_grad()
    ):  # The frames shall lie inside of [0, 1] for the most part, where nothing is clamped.
        last = model.decoder[-1]
        for part in ("weight", "bias"):
            key = f"decoder.{len(model.decoder) - 1}.{part}"
            tensors[key] = np.round(tensors[key] / 3).astype(np.int8) + (64 if part == "bias" else 0)
            getattr(last, part).copy_(torch.from_numpy(tensors[key].astype(float)) * KERNEL_SCALE)
    for index, (batch, frames, height, width, stride) in enumerate(CASES):
        latents = np.round(rng.standard_normal((batch, LATENT_CHANNELS, frames, height, width)) * 32) / 32
        with torch.no_grad():
            video = model.decode_video(torch.from_numpy(latents.swapaxes(1, 2)), show_progress_bar=False)
        video = video.numpy().swapaxes(1, 2)
        assert video.shape == (batch, 3, 8 * (frames - 1) + 1, 32 * height, 32 * width), video.shape
        inside = np.mean((video > 0) & (video < 1))
        print(f"{name} {index}: mean {video.mean():.2f}, deviation {video.std():.2f}, {inside:.0%} inside")
        tensors[f"case.{index}.latents"] = latents.astype(np.float32)
        tensors[f"case.{index}.output"] = np.ascontiguousarray(
            video[..., ::stride, ::stride], dtype=np.float32
        )
        described.append({"latents": latents.shape, "stride": stride})
    metadata = {"kernel_scale": str(KERNEL_SCALE), "cases": json.dumps(described)}
    path = folder / f"reference_{name}.safetensors"
    path.write_bytes(with_sorted_metadata(save(tensors, metadata)))
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sources = dict(zip(DECODERS, sys.argv[1:3], strict=True))
    target = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).parent / "data"
    for each, source in sources.items():
        make(each, load(source, f"reference_{each}"), target)
