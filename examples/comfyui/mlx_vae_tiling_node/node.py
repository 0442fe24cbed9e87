import folder_paths
import mlx.core as mx

from mlx_vae_tiling import load_decoder

from .images import decode_to_images


class DecodeWithMLX:
    CATEGORY, FUNCTION, RETURN_TYPES = "latent/video", "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        text = {"decoder": "ltx-2.3", "memory_limit": "8GB"}
        inputs = {name: ("STRING", {"default": value}) for name, value in text.items()}
        inputs["decoder_seed"] = "INT", {"default": 0, "min": 0, "max": 2**64 - 1}
        inputs["keep_decoder"] = "BOOLEAN", {"default": True}
        return {"required": {"samples": ("LATENT",), **inputs}}

    def run(self, samples, decoder, memory_limit, decoder_seed, keep_decoder):
        if decoder != self.name:
            self.free()
            self.decoder = load_decoder(folder_paths.get_full_path("vae", decoder) or decoder)
            self.name = decoder
        try:
            return (decode_to_images(self.decoder, samples, memory_limit=memory_limit, seed=decoder_seed),)
        finally:
            if not keep_decoder:
                self.free()

    def free(self):
        """Also what ComfyUI does when it drops the node: "Free model and node cache"."""
        self.name = self.decoder = None
        mx.clear_cache()

    __init__ = __del__ = free
