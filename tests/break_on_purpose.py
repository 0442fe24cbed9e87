"""Breaks the package on purpose, one place at a time, and says which tests notice.

    python tests/break_on_purpose.py --jobs 2
    python tests/break_on_purpose.py --only runtime/job --results results.json

Each place of `break_places.PLACES` is broken in a copy of the repository, and the tests of its module run
there until one fails. A place whose text is no longer found exactly once, or that becomes no Python, is an
error: it has to be brought up to date. A survivor is a missing test, dead code, or explained beside its
place. What is in the file of results is not tried again.
"""

import argparse
import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from break_places import PLACES, Place

REPOSITORY = Path(__file__).parent.parent
COPIED = ("mlx_vae_tiling", "tests", "examples", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
LONGEST_SECONDS = 900
"""Of the tests of a place: a break that hangs is noticed too."""


def stale(place: Place) -> bool:
    """Whether the text is not there exactly once, or what it becomes is no Python, which any test notices."""
    whole = (REPOSITORY / "mlx_vae_tiling" / place.file).read_text()
    try:
        ast.parse(whole.replace(place.old, place.new))
    except SyntaxError:
        return True
    return whole.count(place.old) != 1


def noticed_by(place: Place, folder: Path) -> str | None:
    """The first test that fails once the place is broken; None if all pass."""
    path = folder / "mlx_vae_tiling" / place.file
    whole = path.read_text()
    path.write_text(whole.replace(place.old, place.new))
    # The package of the copy is found first, whatever is installed.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *shlex.split(place.tests),
    ]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "it hangs"
    finally:
        path.write_text(whole)
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (1, 2) or not failed:
        raise RuntimeError(
            f"{place.name}: pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
        )
    return failed[0].split(" - ")[0].split(maxsplit=1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="places whose file or text contain this")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are broken at the same time")
    parser.add_argument("--results", type=Path, help="a JSON file to continue")
    args = parser.parse_args()
    chosen = [place for place in PLACES if args.only in place.name]
    if old := [place.name for place in chosen if stale(place)]:
        print("not found exactly once, or broken beyond Python:", *old, sep="\n  ")
        return 2
    results = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folders: Queue[Path] = Queue()
        for number in range(args.jobs):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            for name in COPIED:
                copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
                copy(REPOSITORY / name, folder / name)
            folders.put(folder)

        def tried(place: Place) -> None:
            folder = folders.get()
            try:
                results[place.name] = noticed_by(place, folder)
            finally:
                folders.put(folder)
            print(f"{results[place.name] or 'SURVIVES'}: {place.name}", flush=True)
            if args.results:
                args.results.write_text(json.dumps(results, indent=1))

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(tried, [place for place in chosen if place.name not in results]))
    survivors = [place for place in chosen if results[place.name] is None]
    for place in survivors:
        print(f"survivor: {place.name}: {place.why or 'NOT EXPLAINED'}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    return any(not place.why for place in survivors)


if __name__ == "__main__":
    sys.exit(main())
