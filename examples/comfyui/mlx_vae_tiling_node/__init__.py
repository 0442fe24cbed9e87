"""A node for ComfyUI: put this folder into `custom_nodes`."""

from .node import DecodeWithMLX

NODE_CLASS_MAPPINGS = {"DecodeLTXVideoWithMLX": DecodeWithMLX}
NODE_DISPLAY_NAME_MAPPINGS = {"DecodeLTXVideoWithMLX": "VAE Decode (LTX video, MLX)"}
