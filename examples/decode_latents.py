"""Decode saved latents to a video, within a memory budget.

python examples/decode_latents.py [LATENTS [VAE [OUT [MEMORY]]]]
python examples/decode_latents.py shot.safetensors ltx-2.3-vae.safetensors shot.mp4 8GB
"""

import sys

from mlx_vae_tiling import decode_to_file, load_decoder, load_latents, plan_decode


def main(latents_file="demo", vae="demo", out="demo.mp4", memory=None):
    latents = load_latents(latents_file)
    decoder = load_decoder(vae)
    plan = plan_decode(decoder, latents.shape, memory_limit=memory)
    print(plan)
    plan.require_fit()
    print(decode_to_file(decoder, latents, out, fps=25, plan=plan, progress=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
