"""Take the frames as they are decoded: here into a file of raw RGB, with their mean colours on stdout.

python examples/stream_to_disk.py [LATENTS [VAE [OUT [FIRST:STOP]]]]
ffplay -f rawvideo -pixel_format rgb24 -video_size 512x288 -framerate 25 demo.rgb
"""

import sys

from mlx_vae_tiling import Window, decode_frames, load_decoder, load_latents


def main(latents_file="demo", vae="demo", out="demo.rgb", frames=":"):
    first, stop = (int(bound) if bound else None for bound in frames.split(":"))
    window = Window(frames=slice(first, stop))
    index = first or 0
    with open(out, "wb") as file:
        # No more than a few frames are in memory at a time, however long the video is.
        for piece in decode_frames(load_decoder(vae), load_latents(latents_file), window=window):
            for frame in piece:
                file.write(frame.tobytes())
                red, green, blue = frame.mean(axis=(0, 1))
                print(f"frame {index}: mean colour {red:.0f} {green:.0f} {blue:.0f}")
                index += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
