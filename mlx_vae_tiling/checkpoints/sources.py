"""Where published versions lie on the Hugging Face Hub."""

from __future__ import annotations

from typing import NamedTuple


class HubFile(NamedTuple):
    """A file of a repository; where it is None, the one with a video decoder."""

    repo: str
    file: str | None


_DIFFUSERS = "vae/diffusion_pytorch_model.safetensors"

SOURCES: dict[str, tuple[HubFile, ...]] = {
    "ltx-0.9.0": (
        HubFile("Lightricks/LTX-Video", _DIFFUSERS),
        HubFile("Lightricks/LTX-Video", "ltx-video-2b-v0.9.safetensors"),
    ),
    "ltx-0.9.1": (
        HubFile("diffusers/LTX-Video-0.9.1", _DIFFUSERS),
        HubFile("Lightricks/LTX-Video", "ltx-video-2b-v0.9.1.safetensors"),
    ),
    "ltx-0.9.5": (
        HubFile("Lightricks/LTX-Video-0.9.5", _DIFFUSERS),
        HubFile("Lightricks/LTX-Video", "ltx-video-2b-v0.9.5.safetensors"),
    ),
    "ltx-2": (
        HubFile("Lightricks/LTX-2", _DIFFUSERS),
        HubFile("Kijai/LTXV2_comfy", "VAE/LTX2_video_vae_bf16.safetensors"),
        HubFile("Lightricks/LTX-2", "ltx-2-19b-dev.safetensors"),
    ),
    "ltx-2.3": (
        HubFile("Kijai/LTX2.3_comfy", "vae/LTX23_video_vae_bf16.safetensors"),
        HubFile("Lightricks/LTX-2.3", "ltx-2.3-22b-dev.safetensors"),
    ),
    "ltx-2.3-pruna": (
        HubFile("Kijai/LTX2.3_comfy", "vae/pruna_ltx2.3_vae_comfy_bf16.safetensors"),
        HubFile("PrunaAI/PrunaVAED", _DIFFUSERS),
    ),
    "ltx-2.5-conv": (
        HubFile("Lightricks/LTX-2.5", "vae/ltx-2.5-video-vae-conv-bf16.safetensors"),
        HubFile("Lightricks/LTX-2.5-Diffusers", _DIFFUSERS),
    ),
    "ltx-2.5": (
        HubFile("Lightricks/LTX-2.5", "vae/ltx-2.5-video-vae-bf16.safetensors"),
        HubFile("Lightricks/LTX-2.5-Diffusers", "diffusion_decoder/diffusion_pytorch_model.safetensors"),
    ),
    "taeltx2_3": (HubFile("Kijai/LTX2.3_comfy", "vae/taeltx2_3.safetensors"),),
}
"""By the names of `vae.published`: files of a VAE alone first, then those of whole models."""
