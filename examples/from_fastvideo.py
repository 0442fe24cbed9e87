"""FastVideo, decoding with this package: python examples/from_fastvideo.py "a boat at dawn" """

import sys

import mlx.core as mx
import numpy as np
import torch
from fastvideo import VideoGenerator

from mlx_vae_tiling import DecodingStage, decode_to_file, load_decoder


class TensorStage(DecodingStage):
    def __call__(self, batch, args):
        tensors = batch.latents, batch.trajectory_latents
        arrays = (x if x is None else mx.array(x.float().cpu().numpy()) for x in tensors)
        batch.latents, batch.trajectory_latents = arrays
        batch = super().__call__(batch, args)
        batch.latents, batch.trajectory_latents = tensors
        batch.output = torch.from_numpy(np.asarray(batch.output))  # the same memory
        steps = batch.trajectory_decoded
        batch.trajectory_decoded = steps and [torch.from_numpy(step) for step in steps]
        return batch


def replace_stage(pipeline, decoder, memory_limit=None):
    index = pipeline.stages.index(pipeline.decoding_stage)
    pipeline.stages[index] = pipeline.decoding_stage = TensorStage(decoder)
    pipeline.fastvideo_args.memory_limit = memory_limit


def main(prompt, out="clip.mp4", model="FastVideo/LTX2-Distilled-Diffusers", vae="ltx-2", memory_limit="8GB"):
    generator = VideoGenerator.from_pretrained(model, num_gpus=1, output_type="latent")
    latents = generator.generate_video(prompt, return_frames=True, save_video=False)["samples"]
    print(decode_to_file(load_decoder(vae), mx.array(latents.numpy()), out, memory_limit=memory_limit))


if __name__ == "__main__":
    main(*sys.argv[1:])
