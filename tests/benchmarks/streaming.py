"""Streaming: its peak over the number of frames, its time beside the whole decode, and what it holds."""

from collections import Counter
from dataclasses import replace
from statistics import median

import mlx.core as mx
from common import Measurement, measure, parse_quick, print_ratios

from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import PUBLISHED
from mlx_vae_tiling.vae.schedule import Pace
from mlx_vae_tiling.vae.stream import Stream

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


def held_bytes(stream: Stream) -> dict[Level, int]:
    """Bytes of the frames that the steps of a stream hold, by level."""
    levels: Counter[Level] = Counter()
    for frames in stream.held:
        for piece in frames.pieces:
            levels[piece.shape[2:]] += piece.nbytes
    return dict(levels)


def drain(decoder: VideoDecoder, latents: mx.array, step: int = 1) -> None:
    for piece in decoder.stream(latents, latent_frames_per_step=step):
        mx.eval(piece)
        del piece


def random_decoder(width: int) -> VideoDecoder:
    """LTX-2.3 at a part of its width, with random weights."""
    config = replace(PUBLISHED["ltx-2.3"].config, base_channels=width, latent_channels=width)
    decoder = VideoDecoder(config).init_random()
    mx.eval(decoder.parameters())
    return decoder


def random_latents(decoder: VideoDecoder, frames: int, height: int, width: int) -> mx.array:
    latents = mx.random.normal((1, decoder.config.latent_channels, frames, height, width))
    mx.eval(latents)
    return latents


def main() -> None:
    """Print the three tables."""
    quick = parse_quick(__doc__)
    small = random_decoder(8 if quick else 16)
    height, width = (2, 3) if quick else (4, 6)
    rows = {}
    for frames in (9, 17) if quick else (9, 17, 33, 65):
        latents = random_latents(small, frames, height, width)
        rows[f"{frames} latent frames"] = measure(lambda latents=latents: drain(small, latents))
    print_ratios(f"Streaming at {describe(small, latents)}", rows)

    print(f"\n{'held between pieces':<28}{'measured':>14}{'formula':>14}")
    stream = small.open(latents, small.options())
    pieces = stream.run(Pace())
    for _ in range(2):
        mx.eval(next(pieces))
    measured, formula = held_bytes(stream), state_bytes(small.config, height, width, itemsize=4)
    for level in sorted(measured.keys() | formula.keys(), key=lambda level: (level[0], -level[2])):
        name = f"{level[0]}x{level[1]}, {level[2]} channels"
        print(f"{name:<28}{measured.get(level, 0):>12} B{formula.get(level, 0):>12} B")
    print(f"{'total':<28}{sum(measured.values()):>12} B{sum(formula.values()):>12} B\n")

    large = small if quick else random_decoder(32)
    latents = random_latents(large, 9, 2 * height, 2 * width)
    title = f"9 latent frames at {describe(large, latents)}, in turn"
    print_ratios(title, compare(large, latents, repeats=1 if quick else 3))


def describe(decoder: VideoDecoder, latents: mx.array) -> str:
    height, width = (decoder.config.spatial_scale * side for side in latents.shape[3:])
    return f"{width}x{height}, LTX-2.3 at 1/{128 // decoder.config.base_channels} width"


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
