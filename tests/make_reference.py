"""Freeze outputs of the reference implementation, one small file per published decoder version in tests/data.

The reference is diffusers 0.42.1 with torch 2.13 (CPU), safetensors 0.8 and NumPy 2.4; the tests need only
the files. `python tests/make_reference.py [folder]` writes the same files again, from fixed seeds.

Each decoder has the published blocks and layers; it is scaled down in width only and its weights are random.
A file holds

- the decoder under the keys and in the layout of the original checkpoints. Kernels and matrices are int8:
  multiply by `kernel_scale` (2**-8) of the metadata. Other weights are float16. All are exact in bfloat16.
- `case.K.latents` (B, C, F, H, W), normalised; `case.K.output` (B, 3, 8(F-1)+1, 32H, 32W), of which only
  every `stride`-th row and column is kept, from 0 on; `case.K.noise`, where noise is mixed into the latents;
  `case.K.injected.I` (h, w), the injected noise of 0.9.1, one map per convolution in decode order.
- metadata: `version`, `config` (the original JSON form), `diffusers_config`, `kernel_scale`, and `cases`,
  a list of {latents: shape, timestep, noise_scale, causal, stride}.

The maths runs in float64 on these exact weights, but for the variances and sinusoids that diffusers keeps in
float32 in 0.9.x; outputs are stored in float32. PixelNorm's eps is too small to show in them.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoResnetBlock3d
from safetensors.numpy import save

LATENT_CHANNELS = 8
KERNEL_SCALE = 2.0**-8
TIMESTEP, CAUSAL_TIMESTEP, NOISE_SCALE = 0.05, 0.25, 0.025  # the second only shows that it is used

COMMON = json.loads("""{"_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3,
 "out_channels": 3, "scaling_factor": 1.0, "norm_layer": "pixel_norm", "patch_size": 4,
 "latent_log_var": "uniform", "use_quant_conv": false, "causal_decoder": false}""")
COMMON["latent_channels"] = LATENT_CHANNELS


def res(num_layers, **options):
    return ["res_x", {"num_layers": num_layers, **options}]


def up(kind="compress_all", multiplier=2, **options):
    return [kind, {**options, "multiplier": multiplier}]


BLOCKS_090 = [["res_x", 4], ["compress_all", 1], ["res_x_y", 1], ["res_x", 3], ["compress_all", 1]]
BLOCKS_090 += [["res_x_y", 1], ["res_x", 3], ["compress_all", 1], ["res_x", 3], ["res_x", 4]]
UP = up(residual=True)
BLOCKS_091 = [res(5, inject_noise=True), UP, res(6, inject_noise=True), UP, res(7, inject_noise=True), UP]
BLOCKS_091 += [res(8, inject_noise=False)]
PLAIN = res(5, inject_noise=False)
BLOCKS_095 = [PLAIN, UP, PLAIN, UP, PLAIN, UP, PLAIN]
BLOCKS_23 = [res(4), up("compress_space"), res(6), up("compress_time"), res(4), up(multiplier=1)]
BLOCKS_23 += [res(2), up(), res(2)]
LTX2 = {"timestep_conditioning": False, "normalize_latent_channels": False}
# Widths 1024, 512, 384, 256, 128, 64 with 3 for 64. How the converted file writes the two narrowing blocks is
# not known, but that it names their channels.
BLOCKS_PRUNA = [*BLOCKS_23[:4], ["res_x_y", {"in_channels": 18, "out_channels": 12}], *BLOCKS_23[4:6]]
BLOCKS_PRUNA += [["res_x_y", {"in_channels": 24, "out_channels": 18}], *BLOCKS_23[6:]]

# What each version adds to COMMON, with as few base channels as its blocks permit: residual upsamples need
# channels divisible by 8, hence 4; PixelNorm over fewer than 3 channels is ill-conditioned. Whether the
# published JSON of LTX-2 names its padding is not known, so it is spelled out here.
ORIGINAL = {
    "0.9.0": {"decoder_base_channels": 4, "blocks": BLOCKS_090},
    "0.9.1": {"decoder_base_channels": 4, "timestep_conditioning": True, "decoder_blocks": BLOCKS_091},
    "0.9.5": {"decoder_base_channels": 4, "timestep_conditioning": True, "decoder_blocks": BLOCKS_095},
    "ltx-2": LTX2
    | {"decoder_base_channels": 4, "spatial_padding_mode": "reflect", "decoder_blocks": BLOCKS_095},
    "ltx-2.3": LTX2
    | {"decoder_base_channels": 3, "spatial_padding_mode": "zeros", "decoder_blocks": BLOCKS_23},
    "ltx-2.3-pruna": LTX2
    | {"decoder_base_channels": 3, "spatial_padding_mode": "zeros", "decoder_blocks": BLOCKS_PRUNA},
}

# Widths are multiples of the base channels; the encoder is never used and only has to be constructible.
RESIDUAL = {
    "decoder_block_out_channels": (2, 4, 8),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
}
DIFFUSERS = {
    "0.9.0": {"decoder_block_out_channels": (1, 2, 4, 4)},
    "0.9.1": RESIDUAL
    | {
        "decoder_layers_per_block": (5, 6, 7, 8),
        "decoder_inject_noise": (True, True, True, False),
        "timestep_conditioning": True,
    },
    "0.9.5": RESIDUAL | {"timestep_conditioning": True},
    "ltx-2": RESIDUAL | {"decoder_causal": False, "decoder_spatial_padding_mode": "reflect"},
    "ltx-2.3": {
        "decoder_block_out_channels": (2, 4, 4, 8),
        "decoder_layers_per_block": (4, 6, 4, 2, 2),
        "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5,
        # In decode order: diffusers reverses every other tuple, but not this one.
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_residual": (False,) * 4,
        "upsample_factor": (2, 2, 1, 2),
        "decoder_causal": False,
        "decoder_spatial_padding_mode": "zeros",
    },
}

DIFFUSERS["ltx-2.3-pruna"] = DIFFUSERS["ltx-2.3"] | {"decoder_block_out_channels": (2, 4, 6, 16)}

# (batch, frames, height, width of the latents, causal, stride). Strides are coprime to 32, to meet every
# phase of upsampling and patches. Reflection needs two latents a side.
SMALL = {"zeros": [(1, 1, 1, 1, False, 1), (1, 1, 1, 2, False, 1)]}
SMALL["reflect"] = [(1, 1, 2, 2, False, 1), (1, 1, 2, 3, False, 3)]
LARGER = [(1, 2, 3, 2, True, 7), (2, 3, 2, 2, False, 9), (1, 3, 3, 5, False, 13)]


def build(version):
    """The reference autoencoder of a version and the configuration it was built from."""
    base = ORIGINAL[version]["decoder_base_channels"]
    config = {**DIFFUSERS[version], "latent_channels": LATENT_CHANNELS}
    config["decoder_block_out_channels"] = tuple(base * m for m in config["decoder_block_out_channels"])
    config["block_out_channels"] = (8, 16, 32, 64) if version.startswith("ltx") else (8, 16, 32, 32)
    kind = AutoencoderKLLTX2Video if version.startswith("ltx") else AutoencoderKLLTXVideo
    vae = kind(**config)
    if version == "ltx-2.3-pruna":
        # The class divides the channels that arrive here by the upsampler's factor, and cannot run: from its
        # own module, the block that the published tensors are of.
        vae.decoder.up_blocks[2].conv_in = LTX2VideoResnetBlock3d(6 * base, 4 * base)
    vae = vae.double().eval()
    kept = {key: value for key, value in vae.config.items() if key != "_use_default_values"}
    return vae, {"_class_name": kind.__name__, **kept}


def names(version):
    """Pairs of (diffusers prefix, original prefix) below `decoder.`, most specific first."""
    pairs = [("mid_block.", "up_blocks.0.")]
    if version in ("0.9.0", "ltx-2.3-pruna"):
        parts = ["0.", "1.upsamplers.0.", "1.", "2.conv_in.", "2.upsamplers.0.", "2."]
        parts += ["3.conv_in.", "3.upsamplers.0.", "3."]
        if version == "ltx-2.3-pruna":
            parts = ["0.upsamplers.0.", "0.", "1.conv_in.", "1.upsamplers.0.", "1."]
            parts += ["2.conv_in.", "2.upsamplers.0.", "2.", "3.upsamplers.0.", "3."]
        pairs += [(f"up_blocks.{part}", f"up_blocks.{n}.") for n, part in enumerate(parts, start=1)]
    else:
        for i in range(4):
            pairs.append((f"up_blocks.{i}.upsamplers.0.", f"up_blocks.{2 * i + 1}."))
            pairs.append((f"up_blocks.{i}.", f"up_blocks.{2 * i + 2}."))
    pairs += [(name, f"last_{name}") for name in ("time_embedder.", "scale_shift_table")]
    return pairs


def original_name(name, version):
    """The key of the original checkpoints for a key of diffusers' decoder."""
    for diffusers_prefix, original_prefix in names(version):
        if name.startswith(diffusers_prefix):
            name = original_prefix + name.removeprefix(diffusers_prefix)
            break
    name = name.replace(".resnets.", ".res_blocks.").replace("conv_shortcut.conv.", "conv_shortcut.")
    return "decoder." + name.replace("norm3.", "norm3.norm.")


def on_grid(rng, low, high, shape, step=1 / 64):
    """Uniform values on a grid so coarse that bfloat16 and float16 hold them exactly."""
    return np.round(rng.uniform(low, high, shape) / step) * step


def normal_on_grid(rng, shape):
    """Standard normal values, clipped to 3, on such a grid."""
    return np.round(rng.standard_normal(shape).clip(-3, 3) * 32) / 32


def random_parameter(rng, name, shape):
    """Stored array of one parameter, such that activations stay near 1 and no branch vanishes."""
    if name == "timestep_scale_multiplier":
        return np.array(1000.0, dtype=np.float16)
    if len(shape) in (2, 5) and name.endswith("weight"):
        bound = 1.5 * np.sqrt(3 / np.prod(shape[1:]))
        return np.round(rng.uniform(-bound, bound, shape) / KERNEL_SCALE).clip(-127, 127).astype(np.int8)
    low, high = (0.5, 1.5) if "norm3.weight" in name else (-0.5, 0.5)
    return on_grid(rng, low, high, shape).astype(np.float16)


def dequantised(stored):
    return torch.from_numpy(stored).double() * (KERNEL_SCALE if stored.dtype == np.int8 else 1.0)


def set_parameters(decoder, rng, version):
    """Set random weights; return them under their original names."""
    tensors = {}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            stored = random_parameter(rng, name, tuple(parameter.shape))
            parameter.copy_(dequantised(stored))
            tensors[original_name(name, version)] = stored
    statistics = {"mean-of-means": (-0.5, 0.5), "std-of-means": (0.5, 1.5)}
    if version.startswith("0.9"):
        # Decode uses none of these three; the last name ends like the one that matters.
        statistics |= {"channel": (0, 1), "mean-of-stds": (0, 1), "mean-of-stds_over_std-of-means": (2, 3)}
    for name, (low, high) in statistics.items():
        values = on_grid(rng, low, high, LATENT_CHANNELS).astype(np.float16)
        tensors[f"per_channel_statistics.{name}"] = values
    return tensors


def decode(decoder, latents, timestep, causal):
    """Reference decode of un-normalised latents; returns the pixels."""
    for module in decoder.modules():
        if isinstance(module, LTXVideoCausalConv3d):
            module.is_causal = causal
    options = {} if hasattr(decoder.conv_in, "is_causal") else {"causal": causal}
    temb = None if timestep is None else torch.full((len(latents),), timestep, dtype=torch.float64)
    with torch.no_grad():
        return decoder(torch.from_numpy(latents), temb, **options).numpy()


def add_case(tensors, index, case, decoder, rng):
    """Decode one case and add its tensors; return its description."""
    batch, frames, height, width, causal, stride = case
    shape = (batch, LATENT_CHANNELS, frames, height, width)
    conditioned = decoder.timestep_scale_multiplier is not None
    timestep = (CAUSAL_TIMESTEP if causal else TIMESTEP) if conditioned else None
    noise_scale = NOISE_SCALE if conditioned and batch > 1 else 0.0
    latents = normal_on_grid(rng, shape)
    mixed, injected = latents, []
    if noise_scale:
        noise = normal_on_grid(rng, shape)
        tensors[f"case.{index}.noise"] = noise.astype(np.float32)
        # Original order. Pipelines of diffusers mix after un-normalising: another noise level per channel.
        mixed = (1 - noise_scale) * latents + noise_scale * noise
    mean, std = (
        tensors[f"per_channel_statistics.{name}-of-means"].astype(np.float64).reshape(-1, 1, 1, 1)
        for name in ("mean", "std")
    )

    def recorded(size, *, dtype, **_):
        injected.append(rng.standard_normal(tuple(size)).astype(np.float16))
        return torch.from_numpy(injected[-1]).to(dtype)

    with mock.patch.object(torch, "randn", recorded):
        output = decode(decoder, mixed * std + mean, timestep, causal)
    assert output.shape == (batch, 3, 8 * (frames - 1) + 1, 32 * height, 32 * width), output.shape
    tensors[f"case.{index}.latents"] = latents.astype(np.float32)
    tensors[f"case.{index}.output"] = np.ascontiguousarray(output[..., ::stride, ::stride], dtype=np.float32)
    tensors |= {f"case.{index}.injected.{i}": noise for i, noise in enumerate(injected)}
    description = {"latents": shape, "timestep": timestep, "noise_scale": noise_scale}
    return description | {"causal": causal, "stride": stride}


def with_sorted_metadata(data):
    """The same file with its metadata in order: safetensors writes them in another one at each run."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    return data[:8] + text.ljust(end - 8) + data[end:]


def make(version, folder):
    """Write the reference file of a version."""
    rng = np.random.default_rng(sum(version.encode()))
    vae, diffusers_config = build(version)
    tensors = set_parameters(vae.decoder, rng, version)
    config = COMMON | ORIGINAL[version]
    cases = SMALL[config.get("spatial_padding_mode", "zeros")] + LARGER
    described = [add_case(tensors, index, case, vae.decoder, rng) for index, case in enumerate(cases)]
    metadata = {"version": version, "config": json.dumps({"vae": config}), "cases": json.dumps(described)}
    metadata |= {"diffusers_config": json.dumps(diffusers_config), "kernel_scale": str(KERNEL_SCALE)}
    path = folder / f"reference_{version}.safetensors"
    path.write_bytes(with_sorted_metadata(save(tensors, metadata)))
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    for each in ORIGINAL:
        make(each, target)
