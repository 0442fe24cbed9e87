"""Imports point one way: to a lower layer, or within the same sub-package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "mlx_vae_tiling"
ROOT = Path(__file__).parent.parent / PACKAGE
# From the bottom up; parts of one layer do not know each other.
TIERS = (
    ("arguments", "forks"),
    ("dtypes", "demo"),
    ("tiling", "media"),
    ("vae",),
    ("checkpoints", "runtime"),
    ("stage", "cli"),
    ("__main__", "public"),
    ("__init__",),
)
LAYERS = {part: layer for layer, parts in enumerate(TIERS) for part in parts}
MODULES = sorted(ROOT.rglob("*.py"))
# What importing the package may not pull in: optional, or slow to load.
FORBIDDEN = ("av", "matplotlib", "torch", "tqdm", "huggingface_hub")


def part_of(module: str) -> str:
    """Sub-package or top-level module that a dotted name inside the package belongs to."""
    return [*module.split("."), "__init__"][1]


def dotted_name(path: Path) -> str:
    return ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))


def imported_modules(source: str, module: str) -> set[str]:
    """Dotted names inside the package that a module imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            inside = [alias.name for alias in node.names if origin == PACKAGE and alias.name != "__version__"]
            names.update(f"{PACKAGE}.{name}" if name in LAYERS else PACKAGE for name in inside)
            names.update([origin] if origin != PACKAGE else [])
    return {name for name in names if name.split(".")[0] == PACKAGE}


def arrows_back(source: str, module: str) -> list[str]:
    here = part_of(module)
    targets = {part_of(name) for name in imported_modules(source, module)} - {here}
    return sorted(target for target in targets if LAYERS[target] >= LAYERS[here])


@pytest.mark.parametrize("path", MODULES, ids=dotted_name)
def test_imports_point_down(path):
    module = dotted_name(path)
    assert part_of(module) in LAYERS, f"give {part_of(module)} a layer in LAYERS and in the design"
    assert not arrows_back(path.read_text(), module)


@pytest.mark.parametrize(
    ("module", "source", "arrows"),
    [
        ("tiling.decode", "from mlx_vae_tiling.vae.config import DecoderConfig", ["vae"]),
        ("tiling.decode", "from mlx_vae_tiling.media import latents", ["media"]),
        ("tiling.decode", "def f():\n    import mlx_vae_tiling.runtime.planning.plan", ["runtime"]),
        ("tiling.decode", "from ..vae import config", ["vae"]),
        ("tiling.decode", "from .. import vae", ["vae"]),
        ("tiling.decode", "from mlx_vae_tiling import TilingConfig", ["__init__"]),
        ("tiling.decode", "import mlx_vae_tiling", ["__init__"]),
        ("vae.decoder", "from mlx_vae_tiling.checkpoints.load import load_decoder", ["checkpoints"]),
        ("dtypes", "from . import cli", ["cli"]),
        ("tiling.decode", "from .masks import compute_trapezoidal_mask_1d", []),
        ("vae.decoder", "from mlx_vae_tiling.tiling import decode_with_tiling\nimport mlx.core", []),
        ("runtime.run", "from mlx_vae_tiling import vae, media", []),
        ("runtime.run", "from mlx_vae_tiling import checkpoints", ["checkpoints"]),
        ("stage.decoding", "from mlx_vae_tiling.cli.options import parse_size", ["cli"]),
        ("cli.entry", "from mlx_vae_tiling import __version__", []),
        ("__init__", "from mlx_vae_tiling.cli import main", []),
    ],
)
def test_arrows_are_found(module, source, arrows):
    assert arrows_back(source, f"{PACKAGE}.{module}") == arrows


LONGEST_FILE, LONGEST_FUNCTION = 300, 50


@pytest.mark.parametrize("path", MODULES, ids=dotted_name)
def test_files_and_functions_hold_one_idea(path):
    """Lines of a file, and of a function besides its docstring."""
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
            assert node.end_lineno - node.lineno + 1 - docstring <= LONGEST_FUNCTION, node.name


DEVICE_QUESTIONS = ("default_device", "is_available", "device_info", "current_backend()", ".backend.name ==")


@pytest.mark.parametrize("path", MODULES, ids=dotted_name)
def test_only_backends_know_the_device(path):
    """A backend is passed in; only its own module, and the budget's default, ask for that of the device."""
    asked = [question for question in DEVICE_QUESTIONS if question in path.read_text()]
    backends = dict.fromkeys(
        ("vae/backend.py", "vae/backends.py", "vae/cpu.py", "vae/metal.py"), DEVICE_QUESTIONS
    )
    allowed = {**backends, "runtime/planning/memory.py": ("current_backend()",)}
    assert set(asked) <= set(allowed.get(path.relative_to(ROOT).as_posix(), ()))


def test_import_loads_nothing_optional():
    code = f"import sys, {PACKAGE}.public; print(*sorted(set(sys.modules) & set({FORBIDDEN!r})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def imported(source):
    """The first names of all absolute imports, and whether each is at the top of its module."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        yield from ((name.partition(".")[0], node in tree.body) for name in names)


def test_what_is_imported_is_declared():
    """Of what an extra brings nothing is imported with the package."""
    text = (ROOT.parent / "pyproject.toml").read_text()
    required, rest = re.search(r"^dependencies = \[(.*?)^\](.*)", text, re.M | re.S).groups()
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^test = ", rest, re.M | re.S)[1]
    always, sometimes = (set(re.findall(r'"(\w+)', part)) for part in (required, extras))
    assert {"mlx", "numpy", "tqdm"} <= always and sometimes == {"av", "matplotlib"}
    ours = {PACKAGE, *sys.stdlib_module_names}
    for path in MODULES:
        for name, at_the_top in imported(path.read_text()):
            allowed = always if at_the_top else always | sometimes
            assert name in ours | allowed, (path, name)
