"""Files of the outside world: saved latents in, video files out."""
