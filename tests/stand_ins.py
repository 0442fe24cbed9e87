"""What the pages' scripts need of torch, diffusers, mlx-video, FastVideo and ComfyUI, and no more of it."""

import argparse
import sys
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import numpy as np


class Tensor:
    """Of torch's kind: NumPy gets it from the CPU and in float32 only, and shares its memory."""

    is_nested = False

    def __init__(self, array, dtype="float32", device="cpu"):
        self.array, self.dtype, self.device = array, dtype, device
        self.shape = array.shape

    def float(self):
        return Tensor(self.array, "float32", self.device)

    def cpu(self):
        return Tensor(self.array, self.dtype)

    def numpy(self):
        if (self.dtype, self.device) != ("float32", "cpu"):
            raise TypeError(f"can't convert {self.device} tensor of {self.dtype} to numpy")
        return self.array

    def permute(self, *axes):
        return Tensor(self.array.transpose(axes), self.dtype, self.device)

    def item(self):
        return self.array.item()

    def __getitem__(self, index):
        return Tensor(self.array[index], self.dtype, self.device)


class NestedTensor:
    """ComfyUI's latents of LTX-2: those of the video and of the sound."""

    is_nested = True

    def __init__(self, tensors):
        self.tensors = tensors

    def unbind(self):
        return self.tensors


class LTX2Pipeline:
    """The end of diffusers' pipeline: un-normalises latents, decodes them, and makes frames in [0, 1]."""

    def __init__(self, latents, mean, std, timestep=None):
        self.latents, self.mean, self.std, self.timestep = latents, mean, std, timestep
        self.vae = SimpleNamespace(decode=None, decoder="torch's", encoder="torch's")
        self.vocoder = SimpleNamespace(config=SimpleNamespace(output_sampling_rate=24000))
        self.device = None

    def to(self, device):
        self.device = device
        return self

    def __call__(self, prompt, output_type="np", return_dict=True):
        assert not return_dict
        per_channel = (1, -1, 1, 1, 1)
        latents = self.latents * self.std.reshape(per_channel) + self.mean.reshape(per_channel)
        latents = Tensor(latents, "bfloat16", "mps")
        if output_type == "latent":
            return latents, None
        video = self.vae.decode(latents, self.timestep, return_dict=False)[0]
        frames = np.clip(video.numpy() / 2 + 0.5, 0, 1).transpose(0, 2, 3, 4, 1)
        return frames, Tensor(np.zeros((len(frames), 2, 100), np.float32), "bfloat16", "mps")


def mlx_video_frames(vae, upsampled, tiling, on_frames_ready=None):
    """What mlx-video does once it has a decoder: noise for its second stage, and frames rounded down."""
    statistics = vae.per_channel_statistics
    mean, std = (value.reshape(1, -1, 1, 1, 1) for value in (statistics.mean, statistics.std))
    latents = (upsampled - mean) / std
    latents = latents + mx.random.normal(latents.shape) / 8
    if tiling == "none":
        video = vae(latents)
    else:
        streamed = {} if on_frames_ready is None else {"on_frames_ready": on_frames_ready}
        video = vae.decode_tiled(latents, tiling_config=object(), debug=True, **streamed)
    return levels_rounded_down(video)


def levels_rounded_down(video):
    video = mx.clip((mx.transpose(mx.squeeze(video, axis=0), (1, 2, 3, 0)) + 1.0) / 2.0, 0.0, 1.0)
    return np.array((video * 255).astype(mx.uint8))


class GenerateAV(ModuleType):
    """The command of mlx-video-with-audio; `frames` is what it writes."""

    def load_vae_decoder(self, path, timestep_conditioning=None, use_unified=False):
        assert (timestep_conditioning, use_unified) == (None, True)
        mx.random.normal((3,))  # The weights of a new model are random.

    def main(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--model-repo")
        parser.add_argument("--tiling", default="auto")
        options = parser.parse_args()
        vae = self.load_vae_decoder(options.model_repo, timestep_conditioning=None, use_unified=True)
        named = vae.per_channel_statistics
        assert vae.latents_mean is named.mean and vae.latents_std is named.std
        self.frames = mlx_video_frames(vae, self.upsampled, options.tiling)


class GenerateLTX2(ModuleType):
    """The command of mlx-video itself, which streams frames to its writer."""

    class VideoDecoder:
        @classmethod
        def from_pretrained(cls, path):
            mx.random.normal((3,))
            return cls()

    def main(self):
        written = []
        vae = self.VideoDecoder.from_pretrained("model/vae/decoder")
        self.frames = mlx_video_frames(vae, self.upsampled, "auto", lambda *given: written.append(given))
        [(video, start)] = written
        assert start == 0 and np.array_equal(levels_rounded_down(video), self.frames)


class VideoGenerator:
    """FastVideo's: it gives latents where it was told so and frames are asked for."""

    def __init__(self, options):
        self.options = options

    @classmethod
    def from_pretrained(cls, model, **options):
        return cls(options)

    def generate_video(self, prompt, return_frames=False, save_video=True):
        assert self.options["output_type"] == "latent" and return_frames and not save_video
        return {"samples": Tensor(self.latents)}


class FastVideoPipeline:
    """Stages in order, each of which is given the batch and the pipeline's arguments."""

    def __init__(self):
        self.decoding_stage = object()
        self.stages = [lambda batch, args: batch, self.decoding_stage]
        self.fastvideo_args = SimpleNamespace(
            model_loaded={"vae": True},
            model_paths={"vae": "demo"},
            output_type="pil",
            vae_cpu_offload=True,
            disable_autocast=False,
            enable_stage_verification=True,
            pipeline_config=SimpleNamespace(vae_precision="fp32", vae_decode_precision=None, vae_tiling=True),
        )

    def forward(self, batch):
        for stage in self.stages:
            batch = stage(batch, self.fastvideo_args)
        return batch


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class ProgressBar:
    """ComfyUI's; the last one is kept."""

    def __init__(self, total):
        self.total, self.current = total, 0
        ProgressBar.last = self

    def update(self, value):
        self.current += value


def module(name, monkeypatch, kind=ModuleType, **contents):
    """A module of that name, to be imported in place of a real one, below what is above it."""
    made = kind(name)
    vars(made).update(contents, __path__=[])
    monkeypatch.setitem(sys.modules, name, made)
    above, _, own = name.rpartition(".")
    if above:
        if above not in sys.modules:
            module(above, monkeypatch)
        monkeypatch.setattr(sys.modules[above], own, made, raising=False)
    return made


def torch_module(monkeypatch):
    return module("torch", monkeypatch, from_numpy=Tensor, bfloat16="bfloat16")
