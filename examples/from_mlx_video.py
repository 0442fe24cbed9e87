"""mlx-video's own command, decoding with this package: the memory limit, then mlx-video's options.

python examples/from_mlx_video.py 8GB --prompt "a boat at dawn" --output-path clip.mp4
"""

import sys

from mlx_video import generate_av

from mlx_vae_tiling import DecodingArgs, DecodingStage, load_decoder


class Decoder:
    def __init__(self, own, source, memory_limit):
        self.latents_mean, self.latents_std = own.latents_mean, own.latents_std
        self.stage = DecodingStage(load_decoder(source))
        self.args = DecodingArgs(memory_limit=memory_limit)

    def __call__(self, latents):
        return 2 * self.stage.decode(latents, self.args) - 1

    def decode_tiled(self, latents, **tiling):
        return self(latents)


def main(memory_limit, *options):
    # Its own decoder is made too, and dropped: that draws random numbers, on which the clip depends.
    own = generate_av.load_vae_decoder
    generate_av.load_vae_decoder = lambda path, **given: Decoder(own(path, **given), path, memory_limit)
    sys.argv[1:] = options
    generate_av.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
