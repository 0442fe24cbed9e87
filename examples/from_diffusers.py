"""LTX-2 in diffusers, decoding with this package: python examples/from_diffusers.py "a boat at dawn" """

import sys

import mlx.core as mx
import numpy as np
import torch
from diffusers import LTX2Pipeline
from diffusers.utils.export_utils import encode_video

from mlx_vae_tiling import decode_frames, load_decoder


def replace_decode(vae, decoder, memory_limit=None):
    def decode(z, temb=None, causal=None, return_dict=False):
        latents = mx.array(z.float().cpu().numpy())
        count, channels, *size = decoder.output_shape(latents.shape)
        video = np.empty((count, *size, channels), np.float32)
        # The pipeline has un-normalised the latents, and mixed noise into them where its version does.
        options = {"normalized": False, "noise_scale": 0, "causal": causal, "memory_limit": memory_limit}
        for i, left in enumerate(video):
            options["timestep"] = None if temb is None else temb[i].item()
            for piece in decode_frames(decoder, latents[i : i + 1], bits=32, **options):
                left[: len(piece)] = 2 * piece - 1
                left = left[len(piece) :]
        return (torch.from_numpy(video).permute(0, 4, 1, 2, 3),)

    vae.decode, vae.decoder = decode, None


def main(prompt, out="clip.mp4", memory_limit="8GB", vae="ltx-2", device="mps", **options):
    pipe = LTX2Pipeline.from_pretrained("Lightricks/LTX-2", torch_dtype=torch.bfloat16)
    replace_decode(pipe.vae, load_decoder(vae), memory_limit)
    (video,), (sound,) = pipe.to(device)(prompt, output_type="np", return_dict=False, **options)
    encode_video(video, 24, out, sound.float().cpu(), pipe.vocoder.config.output_sampling_rate)


if __name__ == "__main__":
    main(*sys.argv[1:])
