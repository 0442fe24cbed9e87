"""Freeze outputs of the reference implementation of LTX-2.5's diffusion decoder in tests/data.

The reference is `LTX2VideoDiffusionDecoderModel` of diffusers 0.42.1 with torch 2.13 (CPU), safetensors
0.8 and NumPy 2.4; the tests need only the file. `python tests/make_reference_diffusion.py [folder]`
writes it again.

The decoder has the published kernels and strides. It is narrower and shallower and its weights are
random. The class's own attention on the CPU holds the scores of all tokens with all others, 23 GB for the
smallest clip, so that an attention processor that gathers each window takes its place; before anything is
written the two are compared on a grid that both can do. Clips below the size of a kernel, which the class
refuses, are padded to it by repetition (in time at the end, in space on both sides) and cropped, as the
producer's own code does.

The file holds

- the decoder under the keys of the original checkpoints. Matrices are int8: multiply by `kernel_scale`
  (2**-8) of the metadata. Other weights are float16. All are exact in bfloat16.
- `case.K.latents` (B, C, F, H, W), normalised; `case.K.output` (B, 3, 8(F-1)+1, 32H, 32W), of which only
  every `stride`-th row and column is kept, from 0 on.
- metadata: `config` (the original JSON form), `diffusers_config`, `kernel_scale`, and `cases`, a list of
  {latents: shape, steps, noise_seed, noise_shape, stride}. The noise, in the size of the padded clip, is
  `numpy.random.RandomState(noise_seed).standard_normal(noise_shape)` in float32.

The maths runs in float64 on these exact weights, but for the sinusoid and the rotations, which diffusers
keeps in float32.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import LTX2VideoDiffusionDecoderModel
from diffusers.models.autoencoders import ltx2_diffusion_decoder as reference
from make_reference import KERNEL_SCALE, dequantised, normal_on_grid, on_grid, with_sorted_metadata
from safetensors.numpy import save

LATENT_CHANNELS = 8
FLOOR = (3, 7, 7)
DECODER = json.loads("""{"_class_name": "NADiffusionDecoder", "in_channels": 8, "out_channels": 3,
 "patch_size": 4, "head_dim": 16, "stage_channels": [128, 64, 32, 32, 16], "stage_depths": [1, 2, 1, 1, 2],
 "stage_kernels": [[3, 7, 7], [3, 7, 7], [3, 5, 5], [3, 5, 5], [11, 11, 11]],
 "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]],
 "spatial_padding_mode": "zeros", "resampler_kind": "linear", "stage5_kernel": [11, 11, 11], "t_emb_dim": 24,
 "timestep_scale_multiplier": 1000.0, "default_num_inference_steps": 1}""")
CONFIG = {"_class_name": "CausalDiffusionVAE", "dims": 3, "decoder": DECODER, "model_output_type": "x0"}

# (batch, frames, height, width of the latents, inference steps, stride). Strides are coprime to 32.
CASES = [
    (1, 1, 7, 7, 1, 11),
    (1, 2, 7, 8, 1, 13),
    (1, 4, 8, 7, 1, 13),
    (2, 3, 7, 7, 1, 17),
    (1, 2, 3, 4, 1, 7),
    (1, 3, 7, 7, 2, 13),
    (1, 1, 7, 7, 3, 13),
]


def build():
    """The reference decoder, and the configuration that it was built from."""
    model = LTX2VideoDiffusionDecoderModel(
        latent_channels=LATENT_CHANNELS,
        decoder_head_dim=DECODER["head_dim"],
        decoder_stage_channels=tuple(DECODER["stage_channels"]),
        decoder_stage_depths=tuple(DECODER["stage_depths"]),
        decoder_t_emb_dim=DECODER["t_emb_dim"],
    )
    model = model.double().eval()
    kept = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return model, {"_class_name": type(model).__name__, **kept}


class WindowAttention:
    """Attention over gathered windows: each of the kernel's size, shifted inward at the borders."""

    def __call__(self, attn, hidden_states, block_mask=None):
        query, key, value = attn.project_qkv(hidden_states)
        sizes = hidden_states.shape[1:4]
        times, rows, columns = (
            torch.arange(size)[:, None].sub(kernel // 2).clamp(0, size - kernel) + torch.arange(kernel)
            for size, kernel in zip(sizes, attn.kernel_size, strict=True)
        )
        attended = torch.empty_like(query)
        for t, window in enumerate(times):
            for h, band in enumerate(rows):
                # (B, times, rows, W, columns, heads, D)
                k, v = (x[:, window][:, :, band][:, :, :, columns] for x in (key, value))
                scores = torch.einsum("bwnd,bijwknd->bwnijk", query[:, t, h], k)
                weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
                attended[:, t, h] = torch.einsum("bwnijk,bijwknd->bwnd", weights, v)
        return attn.to_out[0](attended.flatten(-2))


def check_attention():
    """The gathering processor equals the class's own on a grid small enough for both."""
    torch.manual_seed(0)
    attention = reference.LTX2VideoVaeNeighborhoodAttention(32, (3, 5, 7), head_dim=16).double()
    x = torch.randn(2, 6, 7, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        own = attention(x)
        attention.set_processor(WindowAttention())
        assert torch.allclose(own, attention(x), atol=1e-10), (own - attention(x)).abs().max()


def original_names(name):
    """The key of the original checkpoints for a key of diffusers' decoder; q, k and v share one."""
    name = name.replace("timestep_embedder.linear_1", "mlp.0").replace("timestep_embedder.linear_2", "mlp.2")
    name = (
        name.replace(".to_out.0.", ".proj.").replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")
    )
    for part in "qkv":
        name = name.replace(f".to_{part}.", ".qkv.")
    return f"decoder.{name}"


def random_parameter(rng, name, shape):
    """Stored array of one parameter, such that activations stay near 1 and no branch vanishes."""
    if len(shape) == 2 and name.endswith("weight"):
        bound = np.sqrt(3 / shape[1])
        return np.round(rng.uniform(-bound, bound, shape) / KERNEL_SCALE).clip(-127, 127).astype(np.int8)
    low, high = (0.5, 1.5) if "norm" in name else (-0.5, 0.5)
    return on_grid(rng, low, high, shape).astype(np.float16)


def set_parameters(decoder, rng):
    """Set random weights; return them under their original names."""
    tensors = {}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            stored = random_parameter(rng, name, tuple(parameter.shape))
            parameter.copy_(dequantised(stored))
            tensors.setdefault(original_names(name), []).append(stored)
    tensors = {name: np.concatenate(parts) for name, parts in tensors.items()}
    tensors["decoder.type_emb"] = np.zeros(LATENT_CHANNELS, np.float16)  # nothing reads it
    for name, (low, high) in {"mean": (-0.5, 0.5), "std": (0.5, 1.5)}.items():
        values = on_grid(rng, low, high, LATENT_CHANNELS).astype(np.float16)
        tensors[f"per_channel_statistics.{name}-of-means"] = values
    return tensors


def padded(latents):
    """The clip at the kernel's size, and what was added before it along each axis."""
    added = [max(floor - size, 0) for floor, size in zip(FLOOR, latents.shape[2:], strict=True)]
    before = [0, added[1] // 2, added[2] // 2]
    widths = [(first, n - first) for first, n in zip(before, added, strict=True)]
    return np.pad(latents, [(0, 0), (0, 0), *widths], mode="edge"), before


def add_case(tensors, index, case, decoder, rng):
    """Decode one case and add its tensors; return its description."""
    batch, frames, height, width, steps, stride = case
    latents = normal_on_grid(rng, (batch, LATENT_CHANNELS, frames, height, width))
    mean, std = (
        tensors[f"per_channel_statistics.{name}-of-means"].astype(np.float64).reshape(-1, 1, 1, 1)
        for name in ("mean", "std")
    )
    clip, before = padded(latents * std + mean)
    shape = (batch, 3, 8 * (clip.shape[2] - 1) + 1, 32 * clip.shape[3], 32 * clip.shape[4])
    noise = np.random.RandomState(index).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        context = decoder.forward_stage_4(decoder.forward_stages_1_to_3(torch.from_numpy(clip)))
        output = decoder.denoise(context, torch.from_numpy(noise).double(), steps).numpy()
    top, left = 32 * before[1], 32 * before[2]
    output = output[:, :, : 8 * (frames - 1) + 1, top : top + 32 * height, left : left + 32 * width]
    tensors[f"case.{index}.latents"] = latents.astype(np.float32)
    tensors[f"case.{index}.output"] = np.ascontiguousarray(output[..., ::stride, ::stride], dtype=np.float32)
    print(f"case {index}: {case}, output of standard deviation {output.std():.2f}")
    described = {"latents": latents.shape, "steps": steps, "noise_seed": index, "noise_shape": shape}
    return described | {"stride": stride}


def make(folder):
    """Write the reference file."""
    check_attention()
    rng = np.random.default_rng(25)
    model, diffusers_config = build()
    tensors = set_parameters(model.decoder, rng)
    model.set_attn_processor(WindowAttention())
    described = [add_case(tensors, index, case, model.decoder, rng) for index, case in enumerate(CASES)]
    metadata = {"config": json.dumps({"vae": CONFIG}), "cases": json.dumps(described)}
    metadata |= {"diffusers_config": json.dumps(diffusers_config), "kernel_scale": str(KERNEL_SCALE)}
    path = folder / "reference_ltx-2.5.safetensors"
    path.write_bytes(with_sorted_metadata(save(tensors, metadata)))
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
