import comfy.model_management
import comfy.utils
import mlx.core as mx
import numpy as np
import torch

from mlx_vae_tiling import decode_frames


def decode_to_images(decoder, samples, **options):
    """What ComfyUI calls LATENT as what it calls IMAGE, with its progress bar, until it is interrupted."""
    latents = samples["samples"]
    latents = latents.unbind()[0] if latents.is_nested else latents  # the other one is the sound
    latents = mx.array(latents.float().cpu().numpy())
    count, channels, frames, *size = decoder.output_shape(latents.shape)
    images, done = np.empty((count * frames, *size, channels), np.float32), 0
    bar = comfy.utils.ProgressBar(len(images))
    for one in latents.split(count):
        for piece in decode_frames(decoder, one, bits=32, **options):
            comfy.model_management.throw_exception_if_processing_interrupted()
            images[done : done + len(piece)] = piece
            done += len(piece)
            bar.update(len(piece))
    return torch.from_numpy(images)
