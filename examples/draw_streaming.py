"""Draw examples/streaming.png: 384 of 2176 pixel rows of LTX-2.3, and what each level computes for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_vae_tiling import VideoDecoder, Window
from mlx_vae_tiling.vae.blocks import ResBlocks
from mlx_vae_tiling.vae.published import PUBLISHED

LATENT_ROWS, PIXEL_ROWS = 68, 2176
WINDOW = slice(896, 1280)
KEPT, OUTPUT, FORGOTTEN = "#fdae6b", "#a1d99b", "#dddddd"


class Level(NamedTuple):
    """What one level of a decoder computes of an axis for a window of the output.

    Args:
        name: What the level is called in the picture.
        scale: Positions per latent.
        start, stop: Positions that are computed.
        window_start, window_stop: Of these, the positions under the window itself.
    """

    name: str
    scale: float
    start: float
    stop: float
    window_start: float
    window_stop: float


def draw_streaming(path: str | os.PathLike[str], levels: Sequence[Level], size: int) -> None:
    """Draws tails and delays in time beside a halo that shrinks in space.

    Args:
        path: Picture to write; its suffix says the format.
        levels: From the latents to the pixels.
        size: Length of the axis in latents.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _new_figure(width=13, height=5.2)
    time, space = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_tails(time)
    _draw_halo(space, levels, size)
    figure.savefig(path, dpi=110)


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'mlx_vae_tiling[figures]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_tails(axes: Any) -> None:
    """A residual block just after the frames 4 and 5 arrived: each convolution lags one frame."""
    rows = (("input, and skip", 2, 6), ("after convolution 1", 1, 5), ("output", 0, 4))
    for name, y, ready in rows:
        axes.text(-0.7, y, name, ha="right", va="center", fontsize=9)
        newest = KEPT if y else OUTPUT
        for x in range(8):
            color = FORGOTTEN if x < ready - 2 else newest
            _draw_frame(axes, x, y, color if x < ready else "white")
    for seen in (3, 4, 5):
        _arrow(axes, (seen, 1.68), (4, 1.32), "#555555")
        _arrow(axes, (seen - 1, 0.68), (3, 0.32), "#555555")
    _arrow(axes, (3.42, 2.0), (3.42, 0.0), "#d94801", curve=-0.05)
    axes.text(4.1, 0.46, "the skip waits:\ninput 3 joins output 3", color="#d94801", fontsize=9, va="center")
    colors = {"forgotten": FORGOTTEN, "kept as tail": KEPT, "leaves now": OUTPUT, "not there yet": "white"}
    _legend(axes, colors)
    axes.set(xlim=(-3.6, 7.6), ylim=(-0.6, 2.6))
    axes.set_title("Time: two frames come, two leave, two stay behind per convolution", fontsize=11)
    axes.axis("off")


def _draw_halo(axes: Any, levels: Sequence[Level], size: int) -> None:
    for y, level in enumerate(reversed(levels)):
        start, stop, low, high = (position / level.scale for position in level[2:])
        for left, right, color in ((0, size, "white"), (start, stop, KEPT), (low, high, OUTPUT)):
            axes.barh(y, right - left, left=left, height=0.62, color=color, edgecolor="#bbbbbb")
        factor = (stop - start) / (high - low)
        axes.text(
            size * 1.02, y, f"{level.stop - level.start:g} rows, {factor:.2f}x", va="center", fontsize=9
        )
    axes.set_yticks(range(len(levels)), [level.name for level in reversed(levels)], fontsize=9)
    axes.set_xlim(0, size * 1.3)
    axes.set_xticks([0, size // 4, size // 2, size - size // 4, size])
    axes.set_xlabel("rows of the frame, in latents", fontsize=9)
    axes.set_title("Space: what a window needs of every level", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _legend(axes, {"the window": OUTPUT, "halo": KEPT, "not computed": "white"})


def _draw_frame(axes: Any, x: int, y: int, color: str) -> None:
    from matplotlib.patches import Rectangle

    shade = "#bbbbbb" if color == "white" else "#333333"
    axes.add_patch(Rectangle((x - 0.4, y - 0.3), 0.8, 0.6, facecolor=color, edgecolor=shade))
    axes.text(x, y, str(x), ha="center", va="center", fontsize=9, color=shade)


def _arrow(
    axes: Any, start: tuple[float, float], stop: tuple[float, float], color: str, curve: float = 0
) -> None:
    style = {"arrowstyle": "->", "color": color, "connectionstyle": f"arc3,rad={curve}"}
    axes.annotate("", xy=stop, xytext=start, arrowprops=style)


def _legend(axes: Any, colors: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="#888888", label=name) for name, color in colors.items()]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
    axes.legend(handles=handles, ncols=4, fontsize=9, frameon=False, **place)


def main() -> None:
    """Ask the decoder for its regions, which takes no weights, and draw them."""
    config = PUBLISHED["ltx-2.3"].config
    pixels = Window(height=WINDOW).region(1, PIXEL_ROWS, config.spatial_scale)
    names = ["latents", "conv_in"]
    for block in config.decoder_blocks:
        is_residual = isinstance(block, ResBlocks)
        names.append(f"{block.num_layers} residual blocks" if is_residual else f"upsample {block.stride}")
    levels = []
    for name, region in zip([*names, "conv_out"], VideoDecoder(config).regions(pixels), strict=True):
        start, stop, size = region.height
        under_window = (WINDOW.start * size / PIXEL_ROWS, WINDOW.stop * size / PIXEL_ROWS)
        levels.append(Level(name, size / LATENT_ROWS, start, stop, *under_window))
    draw_streaming(Path(__file__).parent / "streaming.png", levels, LATENT_ROWS)


if __name__ == "__main__":
    main()
