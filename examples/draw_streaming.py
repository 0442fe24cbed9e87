"""Draw examples/streaming.png: 384 of 2176 pixel rows of LTX-2.3, and what each level computes for them."""

from pathlib import Path

from mlx_vae_tiling import VideoDecoder, Window
from mlx_vae_tiling.media.figures import Level, draw_streaming
from mlx_vae_tiling.vae.blocks import ResBlocks
from mlx_vae_tiling.vae.published import PUBLISHED

LATENT_ROWS, PIXEL_ROWS = 68, 2176
WINDOW = slice(896, 1280)


def main() -> None:
    """Ask the decoder for its regions, which takes no weights, and draw them."""
    config = PUBLISHED["LTX-2.3 / 2.5"]
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
