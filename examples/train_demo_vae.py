"""Train the bundled demonstration VAE: an LTX-2.3 decoder at 1/16 width, fitted to one short clip.

The decoder and the clip's latents are fitted together; there is no encoder. First a closed form: a
hierarchical PCA of the pixels gives what each level should hold, and least squares gives the convolution
from each level to the next, while the residual blocks start as the identity. Then gradient descent, first
on the low-resolution blocks alone, which is cheap, then on everything, always on the whole clip, with
more weight where the picture moves. Tensors are (C, T, H, W); weights are named as in the checkpoint.
It is fast on processors with bfloat16 instructions, and wants 3 GB of memory.

    pip install torch numpy av scikit-video safetensors
    python examples/train_demo_vae.py --output demo --minutes 60

writes vae.safetensors and latents.safetensors and prints the PSNR of the clip decoded from those files.
The clip is from Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0.
"""

import argparse
import json
import math
import time
from pathlib import Path

import av
import numpy as np
import safetensors.torch
import skvideo.datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0"
FRAMES, HEIGHT, WIDTH = 81, 288, 512
# The decoder's blocks by number: strides of the upsampling ones; layers and channels of the residual ones.
UPSAMPLES = {1: (2, 2, 2), 3: (2, 2, 2), 5: (2, 1, 1), 7: (1, 2, 2)}
RES_LAYERS = {0: 2, 2: 2, 4: 4, 6: 6, 8: 4}
CHANNELS = {0: 64, 2: 32, 4: 32, 6: 16, 8: 8}
# The last level's eighth channel, against the others: so large that the last norm and SiLU are nearly linear.
CONSTANT = 16
RIDGE = {1: 1e-3, 3: 1e-4, 5: 1e-5, 7: 1e-5, 9: 1e-5}
DESCRIPTION = "A demonstration and test fixture, overfitted to one clip; not a general VAE."
CONFIG = json.loads("""
{"_class_name":"CausalVideoAutoencoder","dims":3,"in_channels":3,"out_channels":3,"latent_channels":128,
 "encoder_blocks":[["res_x",{"num_layers":4}],["compress_space_res",{"multiplier":2}],
  ["res_x",{"num_layers":6}],["compress_time_res",{"multiplier":2}],["res_x",{"num_layers":4}],
  ["compress_all_res",{"multiplier":2}],["res_x",{"num_layers":2}],
  ["compress_all_res",{"multiplier":1}],["res_x",{"num_layers":2}]],
 "decoder_blocks":[["res_x",{"num_layers":4}],["compress_space",{"multiplier":2}],
  ["res_x",{"num_layers":6}],["compress_time",{"multiplier":2}],["res_x",{"num_layers":4}],
  ["compress_all",{"multiplier":1}],["res_x",{"num_layers":2}],
  ["compress_all",{"multiplier":2}],["res_x",{"num_layers":2}]],
 "scaling_factor":1.0,"norm_layer":"pixel_norm","patch_size":4,"latent_log_var":"uniform",
 "use_quant_conv":false,"causal_decoder":false,"timestep_conditioning":false,
 "normalize_latent_channels":false,"encoder_base_channels":128,"decoder_base_channels":8,
 "spatial_padding_mode":"zeros"}""")


def read_clip():
    """The first frames of the clip, reduced to 512x288: uint8 (3, T, H, W)."""
    frames = []
    with av.open(skvideo.datasets.bigbuckbunny()) as container:
        for frame in container.decode(video=0):
            small = frame.reformat(width=WIDTH, height=HEIGHT, format="rgb24", interpolation="AREA")
            frames.append(small.to_ndarray())
            if len(frames) == FRAMES:
                break
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()


def pad(x):
    """Repeat the first and last frames once and put zeros around each frame."""
    return F.pad(torch.cat([x[:, :1], x, x[:, -1:]], dim=1), (1, 1, 1, 1))


def convolve(weights, name, x):
    weight, bias = weights[f"decoder.{name}.conv.weight"], weights[f"decoder.{name}.conv.bias"]
    return F.conv3d(pad(x)[None], weight, bias)[0]


def norm_silu(x):
    return F.silu(x * torch.rsqrt(x.square().mean(dim=0, keepdim=True) + 1e-8))


def space_to_depth(x, stride):
    (c, t, h, w), (a, b, d) = x.shape, stride
    x = x.reshape(c, t // a, a, h // b, b, w // d, d).permute(0, 2, 4, 6, 1, 3, 5)
    return x.reshape(c * a * b * d, t // a, h // b, w // d)


def depth_to_space(x, stride):
    (c, t, h, w), (a, b, d) = x.shape, stride
    c //= a * b * d
    x = x.reshape(c, a, b, d, t, h, w).permute(0, 4, 1, 5, 2, 6, 3).reshape(c, t * a, h * b, w * d)
    return x[:, a - 1 :]


def swap_patch_axes(x):
    """Between the depth-to-space order of channels (height first) and that of patches (width first)."""
    return x.unflatten(0, (3, 4, 4)).transpose(1, 2).flatten(0, 2)


def decode_blocks(weights, x, first=0, last=8):
    """The decoder's blocks from first to last: upsampling where the number is odd, residual where even."""
    for n in range(first, last + 1):
        if n in UPSAMPLES:
            x = depth_to_space(convolve(weights, f"up_blocks.{n}.conv", x), UPSAMPLES[n])
        for m in range(RES_LAYERS.get(n, 0)):
            block = f"up_blocks.{n}.res_blocks.{m}"
            inner = convolve(weights, f"{block}.conv1", norm_silu(x))
            x = x + convolve(weights, f"{block}.conv2", norm_silu(inner))
    return x


def decode(weights, latents):
    """Raw (not normalised) latents (128, T, H, W) to pixels (3, 8(T-1)+1, 32H, 32W), nominally [-1, 1]."""
    x = decode_blocks(weights, convolve(weights, "conv_in", latents))
    with torch.autocast("cpu", enabled=False):  # bfloat16 would round the constant channel
        x = convolve(weights, "conv_out", norm_silu(x.float()))
    return depth_to_space(swap_patch_axes(x), (1, 4, 4))


def pca(x, components):
    """The strongest principal components of x (C, T, H, W) over its channels."""
    flat = x.flatten(1).double()
    flat = flat - flat.mean(dim=1, keepdim=True)
    _, basis = torch.linalg.eigh(flat @ flat.T)
    return (basis.flip(1)[:, :components].T @ flat).reshape(components, *x.shape[1:]).float()


def pyramid(pixels):
    """What each level should hold, by the number of the block it enters."""
    x = torch.cat([pixels[:, :1].expand(-1, 7, -1, -1), pixels], dim=1)  # for the frames the decoder drops
    patches = swap_patch_axes(space_to_depth(x, (1, 4, 4)))
    scores = {8: pca(patches, CHANNELS[8] - 1)}
    for n in (6, 4, 2, 0):
        components = CHANNELS[n] if n else CONFIG["latent_channels"]
        scores[n] = pca(space_to_depth(scores[n + 2], UPSAMPLES[n + 1]), components)
    deviations = {n: x.flatten(1).std(dim=1)[:, None, None, None] for n, x in scores.items()}
    levels = {n: x / deviations[n].sqrt() for n, x in scores.items()}
    constant = CONSTANT * levels[8].square().mean().sqrt()
    levels[8] = torch.cat([levels[8], constant.expand_as(levels[8][:1])])
    return {**levels, 9: patches}


def fit_convolution(weights, name, x, target, ridge):
    """Set a convolution to the least-squares map from x to target, both (C, T, H, W)."""
    padded, (c, t, h, w) = pad(x).double(), x.shape
    gram, cross = 0, 0
    for f in range(t):  # in double precision, frame by frame: neighbouring taps are nearly the same
        taps = [padded[:, f + i, j : j + h, k : k + w] for i in range(3) for j in range(3) for k in range(3)]
        rows = torch.cat([*taps, torch.ones_like(padded[:1, 0, :h, :w])]).flatten(1)
        gram, cross = gram + rows @ rows.T, cross + rows @ target[:, f].flatten(1).T.double()
    penalty = torch.full((len(gram),), ridge * gram.diagonal()[:-1].mean().item(), dtype=torch.float64)
    penalty[-1] = 0
    solution = torch.linalg.solve(gram + penalty.diag(), cross).float()
    kernel = solution[:-1].reshape(3, 3, 3, c, -1).permute(4, 3, 0, 1, 2)
    weights[f"decoder.{name}.conv.weight"] = kernel.contiguous()
    weights[f"decoder.{name}.conv.bias"] = solution[-1].clone()


def closed_form(pixels, generator):
    """Raw latents, weights whose residual blocks are the identity, and what each level should hold."""
    levels = pyramid(pixels)
    latents, weights = levels[0], {}

    def convolution(name, kernel):
        weights[f"decoder.{name}.conv.weight"] = kernel
        weights[f"decoder.{name}.conv.bias"] = torch.zeros(len(kernel))

    kernel = 0.01 * torch.randn(CHANNELS[0], len(latents), 3, 3, 3, generator=generator)
    kernel[:, : CHANNELS[0], 1, 1, 1] += torch.eye(CHANNELS[0])
    convolution("conv_in", kernel)
    for n, c in CHANNELS.items():
        for m in range(RES_LAYERS[n]):
            kernel = torch.randn(c, c, 3, 3, 3, generator=generator) / math.sqrt(27 * c)
            convolution(f"up_blocks.{n}.res_blocks.{m}.conv1", kernel)
            convolution(f"up_blocks.{n}.res_blocks.{m}.conv2", torch.zeros_like(kernel))
    fit_from(weights, convolve(weights, "conv_in", latents), levels, first=0)
    return latents, weights, levels


def fit_from(weights, x, levels, first):
    """Fit each convolution from level `first`, whose input is x, to the pixels, given all before it."""
    x = decode_blocks(weights, x, first, first)
    for n in range(first + 1, 8, 2):
        target = space_to_depth(levels[n + 1][:, -x.shape[1] * UPSAMPLES[n][0] :], UPSAMPLES[n])
        fit_convolution(weights, f"up_blocks.{n}.conv", x, target, RIDGE[n])
        x = decode_blocks(weights, x, n, n + 1)
    fit_convolution(weights, "conv_out", norm_silu(x), levels[9][:, 7:], RIDGE[9])


def emphasis(pixels):
    """Weights of the pixels (1, T, H, W): 1 where the picture is nearly still, up to 5 where it moves."""
    change = (pixels[:, 1:] - pixels[:, :-1]).abs().mean(dim=0, keepdim=True)
    change = torch.cat([change[:, :1], change], dim=1)
    change = F.avg_pool3d(change, (9, 33, 33), 1, (4, 16, 16), count_include_pad=False)
    return 1 + 4 * ((change - 0.03) / 0.04).clamp(0, 1)


def descend(weights, latents, loss_of, minutes, report):
    """Minimise loss_of() over the weights and the latents with Adam, for a given time."""
    parameters = [*weights.values(), latents]
    for p in parameters:
        p.requires_grad_()
    groups = [{"params": [*weights.values()], "peak": 1e-3}, {"params": [latents], "peak": 1e-2}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    start, reports, step = time.monotonic(), 1, 0
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        step += 1
        for group in adam.param_groups:
            group["lr"] = group["peak"] * min(1, step / 20) * (1 + math.cos(math.pi * elapsed / minutes)) / 2
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if elapsed > 3 * reports:
            reports += 1
            report(f"step {step}, loss {loss.item():.5f}")
    for p in parameters:
        p.requires_grad_(False)


def train(weights, latents, levels, pixels, minutes, report):
    """Fine-tune in place: the blocks before block 4 towards its level, then everything towards the pixels."""
    weight = emphasis(pixels)
    level, scale = levels[4][:, 3:], levels[4].flatten(1).std(dim=1)[:, None, None, None]
    level_weight = F.avg_pool3d(torch.cat([weight[:, :1], weight], dim=1), (2, 8, 8))
    low = ("conv_in.", *(f"up_blocks.{n}." for n in range(4)))
    low = {name: w for name, w in weights.items() if name.removeprefix("decoder.").startswith(low)}

    def before_block_4():
        return decode_blocks(weights, convolve(weights, "conv_in", latents), 0, 3)

    def low_loss():
        error = (before_block_4().float() - level) * scale
        return (error.square() * level_weight).mean() / level_weight.mean()

    def loss():
        return ((decode(weights, latents) - pixels).square() * weight).mean() / weight.mean()

    descend(low, latents, low_loss, 0.15 * minutes, report)
    fit_from(weights, before_block_4(), levels, first=4)
    report("least squares again")
    descend(weights, latents, loss, 0.85 * minutes, report)


def pack(weights, latents):
    """The tensors of the two files, in half precision."""
    latents = latents.detach()
    mean, std = latents.mean(dim=(1, 2, 3)).half(), latents.std(dim=(1, 2, 3)).half()
    normalized = (latents - mean.float()[:, None, None, None]) / std.float()[:, None, None, None]
    tensors = {name: w.detach().half() for name, w in weights.items()}
    tensors["per_channel_statistics.mean-of-means"] = mean
    tensors["per_channel_statistics.std-of-means"] = std
    return tensors, {"latents": normalized[None].half()}


def write(folder, vae, latents):
    """Replace both files, each at once."""
    notes = {"description": DESCRIPTION, "credit": CREDIT}
    for name, tensors, metadata in (
        ("vae.safetensors", vae, {"config": json.dumps({"vae": CONFIG}), **notes}),
        ("latents.safetensors", latents, {"fps": "25", **notes}),
    ):
        part = folder / f".{name}.part"
        part.write_bytes(safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()}, metadata))
        part.replace(folder / name)


@torch.no_grad()
def psnr(vae, latents, clip):
    """The PSNR in dB of the 8-bit clip decoded from what the files hold."""
    weights = {name: w.float() for name, w in vae.items()}
    mean, std = (weights[f"per_channel_statistics.{s}-of-means"] for s in ("mean", "std"))
    raw = latents["latents"][0].float() * std[:, None, None, None] + mean[:, None, None, None]
    decoded = ((decode(weights, raw) / 2 + 0.5).clamp(0, 1) * 255).round()
    return 10 * math.log10(255**2 / (decoded - clip).square().mean().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write the files")
    parser.add_argument("--minutes", type=float, default=60, help="fine-tuning time; 0: the closed form only")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    clip = read_clip()
    pixels = clip / 127.5 - 1
    latents, weights, levels = closed_form(pixels, torch.Generator().manual_seed(arguments.seed))
    best, start = 0.0, time.monotonic()

    def report(message):
        nonlocal best
        files = pack(weights, latents)
        decibels = psnr(*files, clip)
        if decibels > best:
            best = decibels
            write(arguments.output, *files)
        print(f"{(time.monotonic() - start) / 60:5.1f} min, {message}: {decibels:.2f} dB", flush=True)

    report("closed form")
    if arguments.minutes > 0:
        train(weights, latents, levels, pixels, arguments.minutes, report)
        report("done")
    files = (load_file(arguments.output / f"{name}.safetensors") for name in ("vae", "latents"))
    print(f"PSNR of {FRAMES} frames decoded from the files: {psnr(*files, clip):.2f} dB")


if __name__ == "__main__":
    main()
