"""The parser of the command line: each command declares its own arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mlx_vae_tiling import __version__
from mlx_vae_tiling.cli import NAME, bench, decode, fetch, info, plan, verify
from mlx_vae_tiling.vae.published import NAMES

COMMANDS = {
    "decode": decode,
    "plan": plan,
    "info": info,
    "fetch": fetch,
    "bench": bench,
    "verify": verify,
}


class Parser(argparse.ArgumentParser):
    """One line for what is wrong, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message}; see {self.prog} --help\n")


def new_parser() -> Parser:
    """The parser; what it parses has as `run` the function of the command."""
    parser = Parser(NAME, description="Decode LTX video latents with MLX, exactly, within a memory budget.")
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.PURPOSE,
            description=f"{module.PURPOSE[0].upper()}{module.PURPOSE[1:]}.",
            epilog=f"examples:{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        if module is not fetch:
            command.add_argument(
                "--config",
                help=f"for a VAE that tells no version: {', '.join(NAMES)}, or a .json file",
            )
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
