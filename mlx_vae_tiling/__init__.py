"""Decode LTX video latents with MLX: exact, streamed, within a memory budget."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlx_vae_tiling.public import *  # noqa: F403
else:
    # Loading MLX takes a while, in which the command must be there already to answer Ctrl-C.
    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        offered = vars(import_module("mlx_vae_tiling.public"))
        names = offered["__all__"]
        globals().update({"__all__": ["__version__", *names], **{key: offered[key] for key in names}})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
