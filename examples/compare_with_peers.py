"""Decode the same latents with the same weights here, in an mlx-video fork and in diffusers, on the CPU.

In an environment of its own, with those peers that you like to compare with, and on Linux with OpenBLAS,
which is preloaded for the fork: MLX's wheel for Linux has a slow BLAS, of which this package makes no use.

    pip install . mlx-video-with-audio==0.1.37 torch diffusers
    apt-get install libopenblas0-pthread
    python examples/compare_with_peers.py --threads 1 [--version ltx-2.3] [--latents 9x9x16] [--runs 2]

The weights are random. Every decode has a process of its own, which on Linux runs on as many cores as it has
threads. Runs go in turn, so that a busy machine is busy for everybody. A decode that leaves the machine less
than a gigabyte is ended (on Linux). Of each: the least seconds and seconds of processor time, peak memory
above the loaded weights, of arrays (of MLX, and of what this package computes in beside it) and of the whole
process, and the largest difference from the first candidate's frames, in levels of 255.
"""

import argparse
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

PEERS = {
    "planned": ((), "this package, as planned"),
    "whole": ((), "this package, in one piece"),
    "fork": (("mlx_video",), "mlx-video fork, in one piece"),
    "fork-aggressive": (("mlx_video",), "mlx-video fork, `aggressive` tiles"),
    "diffusers": (("torch", "diffusers"), "diffusers, in one piece"),
}
PACKAGES = {"mlx_video": "mlx-video-with-audio==0.1.37"}

LEFT_FREE_BYTES = 10**9


def config_of(args):
    from mlx_vae_tiling.vae.published import published_version

    return replace(published_version(args.version).config, base_channels=args.width)


def prepare(args):
    """Weights and latents in files."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_vae_tiling.vae.build import build_decoder

    weights = build_decoder(config_of(args)).init_random().parameters()
    mx.save_safetensors(f"{args.folder}/weights.safetensors", dict(tree_flatten(weights)))
    size = [1, 128, *map(int, args.latents.split("x"))]
    mx.save_safetensors(
        f"{args.folder}/latents.safetensors", {"x": mx.random.normal(size, key=mx.random.key(1))}
    )


def ours(args, weights, latents):
    import mlx.core as mx
    import numpy as np

    from mlx_vae_tiling import decode_frames, plan_decode
    from mlx_vae_tiling.vae.build import build_decoder

    decoder = build_decoder(config_of(args))
    decoder.load_weights(list(weights.items()))
    whole = (latents.shape[2], None) if args.only == "whole" else None
    plan = plan_decode(decoder, latents.shape, memory_limit=args.memory, chunk=whole)
    backend = plan.backend.opened()

    def run():
        frames, start = np.empty((plan.frames, *plan.size, 3), np.uint8), 0
        for piece in decode_frames(decoder, latents, plan=replace(plan, backend=backend)):
            frames[start : start + len(piece)] = piece
            start += len(piece)
        return frames

    return run, lambda: mx.get_peak_memory() + backend.held_workspace_bytes


def fork(args, weights, latents):
    import mlx.core as mx
    from mlx_video.models.ltx.video_vae.convolution import PaddingModeType
    from mlx_video.models.ltx.video_vae.decoder import LTX2VideoDecoder
    from mlx_video.models.ltx.video_vae.tiling import TilingConfig

    config, blocks = config_of(args), []
    strides = {(2, 2, 2): "compress_all", (2, 1, 1): "compress_time", (1, 2, 2): "compress_space"}
    for block in reversed(config.decoder_blocks):
        if hasattr(block, "stride"):
            options = {"multiplier": block.multiplier, "residual": block.residual}
            blocks.append([strides[tuple(block.stride)], options])
        else:
            blocks.append(["res_x", {"num_layers": block.num_layers}])
    decoder = LTX2VideoDecoder(
        decoder_blocks=blocks,
        timestep_conditioning=False,
        spatial_padding_mode=PaddingModeType(config.spatial_padding_mode),
    )
    decoder.latents_mean = weights.pop("per_channel_statistics.mean")
    decoder.latents_std = weights.pop("per_channel_statistics.std")
    named = {name.replace(".conv.conv.", ".conv."): value for name, value in weights.items()}
    named = {name.replace(".conv.", ".conv.conv."): value for name, value in named.items()}
    decoder.load_weights(list(named.items()), strict=False)
    if args.only == "fork":
        return lambda: decoder(latents), mx.get_peak_memory
    tiling = TilingConfig.aggressive()
    return lambda: decoder.decode_tiled(latents, tiling, tiling_mode="aggressive"), mx.get_peak_memory


def diffusers(args):
    import torch
    from diffusers import AutoencoderKLLTX2Video
    from safetensors import safe_open

    torch.set_num_threads(args.threads)
    config = config_of(args)
    options = {"upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3}
    multipliers, layers = (2, 4, 8), (5,) * 4
    if args.version == "ltx-2.3":
        options = {"upsample_residual": (False,) * 4, "upsample_factor": (2, 2, 1, 2)}
        options["upsample_type"] = ("spatiotemporal", "spatiotemporal", "temporal", "spatial")
        multipliers, layers = (2, 4, 4, 8), (4, 6, 4, 2, 2)
    vae = AutoencoderKLLTX2Video(
        **options,
        block_out_channels=(8, 16, 32, 64),  # of the encoder, which is not used
        decoder_block_out_channels=tuple(args.width * m for m in multipliers),
        decoder_layers_per_block=layers,
        decoder_spatio_temporal_scaling=(True,) * len(multipliers),
        decoder_inject_noise=(False,) * len(layers),
        decoder_causal=False,
        decoder_spatial_padding_mode=config.spatial_padding_mode,
    ).eval()
    parameters = dict(vae.decoder.named_parameters())
    with safe_open(f"{args.folder}/weights.safetensors", "pt") as file, torch.no_grad():
        mean, std = (file.get_tensor(f"per_channel_statistics.{name}") for name in ("mean", "std"))
        names = file.keys()
        for name in names:
            if not name.startswith("per_channel"):
                value = file.get_tensor(name)
                value = value.permute(0, 4, 1, 2, 3) if value.ndim == 5 else value
                parameters.pop(theirs(name)).copy_(value)
    assert not parameters, parameters
    with safe_open(f"{args.folder}/latents.safetensors", "pt") as file:
        latents = file.get_tensor("x") * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)
    return torch.inference_mode()(lambda: vae.decode(latents).sample.numpy())


def theirs(name):
    """Diffusers' name of a tensor: blocks are counted in pairs, an upsampler and what follows it."""
    if not name.startswith("up_blocks."):
        return name
    _, number, rest = name.split(".", 2)
    place = "mid_block" if number == "0" else f"up_blocks.{(int(number) - 1) // 2}"
    return (
        f"{place}.{rest.replace('res_blocks', 'resnets') if int(number) % 2 == 0 else 'upsamplers.0.' + rest}"
    )


def resident(peak):
    """Bytes of the process, now (where /proc says it) or at most."""
    if not peak and Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def candidate(args):
    """One decode, in this process: its figures on stdout, its frames in a file."""
    import numpy as np

    if args.only == "diffusers":
        run, peak = diffusers(args), None
    else:
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
        weights, latents = (mx.load(f"{args.folder}/{n}.safetensors") for n in ("weights", "latents"))
        mx.eval(weights, latents)
        run, peak = (fork if args.only.startswith("fork") else ours)(args, weights, latents["x"])
        active = mx.get_active_memory()
        mx.reset_peak_memory()
    before, wall, cpu = resident(peak=False), time.perf_counter(), time.process_time()
    frames = np.asarray(run())
    figures = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    figures["process"] = max(0, resident(peak=True) - before)
    figures["arrays"] = peak() - active if peak else None
    if frames.dtype != np.uint8:
        frames = np.rint((frames[0].clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0)
    np.save(f"{args.folder}/{args.only}.npy", frames)
    print(json.dumps(figures))


def start(args, name, folder):
    """The figures of a candidate, run in a process of its own; None where it was ended."""
    environment = dict(os.environ, PYTHONWARNINGS="ignore")
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        # This package's workers each call BLAS; the others leave threads to their libraries.
        environment[variable] = "1" if name in ("planned", "whole") else str(args.threads)
    openblas = sorted(Path("/usr/lib").glob("*/openblas-pthread/libblas.so.3"))
    if name.startswith("fork") and openblas:
        environment["LD_PRELOAD"] = str(openblas[0])
    keys = ("version", "width", "latents", "threads", "memory")
    options = [f"--{key}={getattr(args, key)}" for key in keys if getattr(args, key) is not None]
    command = [sys.executable, __file__, *options, f"--folder={folder}", f"--only={name}"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(0.1)
            if name != "prepare" and available_bytes() < LEFT_FREE_BYTES:
                process.kill()
        out = process.stdout.read()
    if process.returncode == -signal.SIGKILL:
        return None
    if process.returncode:
        raise SystemExit(f"{name} failed")
    return json.loads(out.splitlines()[-1]) if name != "prepare" else {}


def available_bytes():
    """What the machine has left, where /proc says it."""
    if not Path("/proc/meminfo").exists():
        return float("inf")
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def compare(args):
    import numpy as np

    found = {}
    for name in args.candidates.split(","):
        missing = [module for module in PEERS[name][0] if not importlib.util.find_spec(module)]
        if missing:
            print(f"{name} is missing: pip install", *(PACKAGES.get(m, m) for m in missing))
        else:
            found[name] = []
    with tempfile.TemporaryDirectory() as folder:
        start(args, "prepare", folder)
        for _ in range(args.runs):
            for name in list(found):
                figures = start(args, name, folder)
                print(name, figures or "does not fit into memory", file=sys.stderr, flush=True)
                if figures:
                    found[name].append(figures)
                else:
                    print(f"{PEERS[name][1]}: does not fit into this machine's memory")
                    del found[name]
        if not found:
            return found
        frames = {name: np.load(f"{folder}/{name}.npy").astype(int) for name in found}
    reference = next(iter(frames.values()))
    first = [min(run[key] for run in next(iter(found.values()))) for key in ("seconds", "cpu")]
    print(f"{args.version}, width {args.width}, latents {args.latents}, threads: {args.threads}\n")
    print(
        "| | seconds | of the first | processor seconds | of the first | arrays' peak | process's peak "
        "| largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        times = []
        for key, unit in zip(("seconds", "cpu"), first, strict=True):
            least = min(run[key] for run in runs)
            times += [f"{least:.1f}", f"{least / unit:.2f}"]
        peaks = [
            runs[0][key] and f"{max(run[key] for run in runs) / 1e9:.3f} GB" for key in ("arrays", "process")
        ]
        difference = np.abs(frames[name] - reference).max()
        row = (PEERS[name][1], *times, *peaks, difference)
        print("|", " | ".join(str(cell or "-" if cell != 0 else 0) for cell in row), "|")
    return found


def main(*arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", default="ltx-2", choices=("ltx-2", "ltx-2.3"))
    parser.add_argument("--width", type=int, default=128, help="128 is that of the published weights")
    parser.add_argument("--latents", default="5x8x12", help="frames x height x width")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", help="of this package's decode, as decode_frames' memory_limit")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--candidates", default=",".join(PEERS), help="some of %(default)s")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.only and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    return {None: compare, "prepare": prepare}.get(args.only, candidate)(args)


if __name__ == "__main__":
    main(*sys.argv[1:])
