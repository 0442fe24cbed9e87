"""Two ranks on two cores decode twice the frames that one process decodes on one core: how much longer?

Each process keeps to one core. What is above 1.0 is the halo that both ranks compute, which is counted and
printed too, starting and hashing, rank 0's putting together and writing, and what two busy cores of one
machine take from each other: caches, memory and, on hyperthreads, arithmetic.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from group_cases import PROGRAM, ends, environment, start_ranks


def settings_of(frames, side, width, folder, cores):
    size = [frames, side, side]
    output = str(folder / f"{frames}.npy")
    return {"size": size, "dtype": "float32", "width": width, "output": output, "cores": cores}


def seconds_alone(settings):
    began = time.perf_counter()
    text = json.dumps(settings | {"windows_of": 1})
    subprocess.run([sys.executable, str(PROGRAM), text], env=environment(), check=True)
    return time.perf_counter() - began


def seconds_of_ranks(settings, folder):
    began = time.perf_counter()
    for status, errors in ends(start_ranks(folder, 2, [str(PROGRAM), json.dumps(settings)]), 600):
        assert status == 0, errors
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100, help="latent frames of the one process")
    parser.add_argument("--side", type=int, default=4, help="latents along height and width")
    parser.add_argument("--width", type=int, default=16, help="base channels of the decoder")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(args.pairs):
            one = settings_of(args.frames, args.side, args.width, folder, [number % 2])
            two = settings_of(2 * args.frames, args.side, args.width, folder, [0, 1])
            alone, ranks = seconds_alone(one), seconds_of_ranks(two, folder)
            for path in folder.glob("*.npy"):
                path.unlink()
            ratios.append(ranks / alone)
            print(f"one process {alone:.1f} s, two ranks {ranks:.1f} s: {ratios[-1]:.2f}", flush=True)
    print(f"median {statistics.median(ratios):.2f} (at most 1.35 is wanted)")


if __name__ == "__main__":
    main()
