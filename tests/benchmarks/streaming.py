"""Streaming: its peak over the number of frames, its time beside the whole decode, and what it holds."""

import gc
from collections import Counter
from dataclasses import replace
from statistics import median

import mlx.core as mx
from common import Measurement, measure, parse_quick, print_ratios

from mlx_vae_tiling.vae.config import DecoderConfig, ResBlocks, Upsample
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.streaming import FrameQueue

LTX_2_3 = DecoderConfig(
    decoder_blocks=(
        ResBlocks(2),
        Upsample((2, 2, 2), multiplier=2),
        ResBlocks(2),
        Upsample((2, 2, 2), multiplier=1),
        ResBlocks(4),
        Upsample((2, 1, 1), multiplier=2),
        ResBlocks(6),
        Upsample((1, 2, 2), multiplier=2),
        ResBlocks(4),
    )
)
Level = tuple[int, int, int]


def state_bytes(config: DecoderConfig, height: int, width: int, itemsize: int) -> dict[Level, int]:
    """Bytes of two frames of the input of every convolution, by its height, width and channels."""
    levels: Counter[Level] = Counter()
    scale = 1
    for layer in config.layers():
        level = (height * scale, width * scale, layer.in_channels)
        levels[level] += 2 * level[0] * level[1] * level[2] * itemsize
        scale *= layer.stride[1]
    return dict(levels)


def held_bytes() -> dict[Level, int]:
    """Bytes of the frames that the layers of all running streams hold, by level."""
    levels: Counter[Level] = Counter()
    for queue in gc.get_objects():
        if isinstance(queue, FrameQueue) and queue._frames is not None:
            levels[queue._frames.shape[2:]] += queue._frames.nbytes
    return dict(levels)


def drain(decoder: VideoDecoder, latents: mx.array, step: int = 1) -> None:
    for piece in decoder.stream(latents, latent_frames_per_step=step):
        mx.eval(piece)
        del piece


def main() -> None:
    """Print the three tables."""
    quick = parse_quick(__doc__)
    width, height_width, frame_counts, repeats = (
        (8, (2, 3), (9, 17), 1) if quick else (16, (4, 6), (9, 17, 33, 65), 7)
    )
    config = replace(LTX_2_3, base_channels=width, latent_channels=width)
    decoder = VideoDecoder(config).init_random()
    mx.eval(decoder.parameters())
    latents = [mx.random.normal((1, width, frames, *height_width)) for frames in frame_counts]
    mx.eval(latents)
    size = "x".join(str(32 * side) for side in reversed(height_width))
    rows = {
        f"{array.shape[2]} latent frames": measure(lambda array=array: drain(decoder, array))
        for array in latents
    }
    print_ratios(f"Streaming at {size}, LTX-2.3 at 1/{128 // width} width", rows)

    print()
    print_ratios(f"{frame_counts[0]} latent frames at {size}, interleaved", compare(decoder, latents[0], repeats))

    print(f"\n{'held between pieces':<28}{'measured':>14}{'formula':>14}")
    stream = decoder.stream(latents[-1])
    for _ in range(2):
        mx.eval(next(stream))
    measured, formula = held_bytes(), state_bytes(config, *height_width, itemsize=4)
    for level in sorted(measured.keys() | formula.keys(), key=lambda level: (level[0], -level[2])):
        name = f"{level[0]}x{level[1]}, {level[2]} channels"
        print(f"{name:<28}{measured.get(level, 0):>12} B{formula.get(level, 0):>12} B")
    print(f"{'total':<28}{sum(measured.values()):>12} B{sum(formula.values()):>12} B")


def compare(decoder: VideoDecoder, latents: mx.array, repeats: int) -> dict[str, Measurement]:
    """Whole and streamed, in turn, so that both see the same load."""
    steps = {"whole": latents.shape[2], "4 latent frames per step": 4, "1 latent frame per step": 1}
    runs: dict[str, list[Measurement]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            runs[name].append(measure(lambda step=step: drain(decoder, latents, step)))
    return {
        name: Measurement(median(run.seconds for run in own), max(run.peak_bytes for run in own))
        for name, own in runs.items()
    }


if __name__ == "__main__":
    main()
