"""mlx-video's own command, decoding with this package: the memory limit, then mlx-video's options.

python examples/from_mlx_video.py 8GB --prompt "a boat at dawn" --output-path clip.mp4
"""

import sys

from mlx_vae_tiling import DecodingArgs, DecodingStage, load_decoder


class Decoder:
    def __init__(self, source, memory_limit):
        self.stage = DecodingStage(load_decoder(source))
        self.args = DecodingArgs(memory_limit=memory_limit)
        statistics = self.per_channel_statistics = self.stage.vae.per_channel_statistics
        self.latents_mean, self.latents_std = statistics.mean, statistics.std

    def __call__(self, latents, **options):
        return 2 * self.stage.decode(latents, self.args) - 1

    def decode_tiled(self, latents, on_frames_ready=None, **options):
        frames = self(latents)
        if on_frames_ready is not None:
            on_frames_ready(frames, 0)
        return frames


def main(memory_limit, *options):
    from mlx_video import generate_av as command

    # Its own decoder is made too, and dropped: that draws random numbers, on which the clip depends.
    own = command.load_vae_decoder
    command.load_vae_decoder = lambda path, **given: (own(path, **given), Decoder(path, memory_limit))[1]
    sys.argv[1:] = options
    command.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
