"""Two ranks on two cores decode twice the frames that one process decodes on one core: how much longer?

Each process keeps to one core. A decode is timed from the call, when weights and latents are loaded and all
ranks are there, to the closed file; starting and loading are printed apart from it. Every round also runs
two processes at once that know nothing of each other, each with the frames of the one: what they take more
than one alone, the machine takes, whose two cores share caches, memory and, as hyperthreads, arithmetic.
The ratio of the ranks is that, times the halo that both compute, which is counted, times what is left: one
waiting for the other, and rank 0's taking, putting together and writing.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent))

from group_cases import ends, environment, start_ranks
from group_program import decoder_of, latents_of

from mlx_vae_tiling import decode_to_file, plan_decode
from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.ranks.crew import joined
from mlx_vae_tiling.runtime.ranks.shares import divide

CORES = (0, 1)
MEMORY = "2GB"


def run_process(settings):
    """What each process does: decodes, and notes its seconds in a file."""
    rank = int(os.environ.get("MLX_RANK", settings.get("core", 0)))
    os.sched_setaffinity(0, {CORES[rank]})
    decoder, latents = decoder_of(settings), latents_of(settings)
    mx.eval(decoder.parameters(), latents)
    group = mx.distributed.init(strict=True, backend="ring") if "MLX_RANK" in os.environ else None
    with joined(group) if group else contextlib.nullcontext() as crew:
        if group:
            mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
        ready = time.time()
        report = decode_to_file(decoder, latents, settings["output"], fps=4, memory_limit=MEMORY, group=crew)
        seconds = time.time() - ready
    told = {
        "start": ready - settings["began"],
        "decode": seconds,
        "computing": report.decoding_seconds,
    }
    Path(f"{settings['notes']}{rank}").write_text(json.dumps(told))


class Bench:
    """The decodes, in a folder of their own."""

    def __init__(self, folder, frames, side, width):
        self.folder, self.frames, self.side, self.width = folder, frames, side, width

    def settings(self, times, **more):
        size = [self.frames * times, self.side, self.side]
        notes = str(self.folder / "notes")
        return {"size": size, "dtype": "float32", "width": self.width, "notes": notes} | more

    def command(self, settings):
        text = json.dumps(settings | {"began": time.time()})
        return [str(Path(__file__)), "--process", text]

    def at_once(self, count):
        """So many processes beside each other, each on its own core with frames of its own."""
        started = []
        for core in range(count):
            settings = self.settings(1, core=core, output=str(self.folder / f"{core}.npy"))
            command = [sys.executable, *self.command(settings)]
            started.append(
                subprocess.Popen(
                    command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        return self.ended(started)

    def ranks(self):
        """Two ranks with the frames of both."""
        settings = self.settings(2, output=str(self.folder / "ranks.npy"))
        return self.ended(start_ranks(self.folder, len(CORES), self.command(settings)))

    def ended(self, started):
        for status, errors in ends(started, 600):
            assert status == 0, errors
        notes = [json.loads((self.folder / f"notes{n}").read_text()) for n in range(len(started))]
        for path in (*self.folder.glob("notes*"), *self.folder.glob("*.npy")):
            path.unlink()
        return notes

    def counted(self):
        """The busier rank's operations over those of the one process, and how the work is divided."""
        decoder = decoder_of(self.settings(1))
        operations = []
        for times, ranks in ((1, 1), (2, len(CORES))):
            shape = tuple(latents_of(self.settings(times)).shape)
            plan = plan_decode(decoder, shape, memory_limit=MEMORY)
            model = CostModel(decoder, shape, decoder.dtype, plan.backend)
            division = divide(model, plan.output, [plan.memory_limit] * ranks)
            operations.append(division.most)
        return operations[1] / operations[0], division


def longest(notes, what="decode"):
    return max(note[what] for note in notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100, help="latent frames of the one process")
    parser.add_argument("--side", type=int, default=4, help="latents along height and width")
    parser.add_argument("--width", type=int, default=24, help="base channels of the decoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        run_process(json.loads(args.process))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.frames, args.side, args.width)
        halo, division = bench.counted()
        print(f"{division}\nthe busier rank has {halo:.3f} of the work of the one process, counted")
        for _ in range(args.rounds):
            load = os.getloadavg()[0]
            (alone,), both, ranks = bench.at_once(1), bench.at_once(2), bench.ranks()
            one, two = alone["decode"], longest(ranks)
            shared = longest(both) / one
            found.append((two / one, shared, two / one / halo / shared))
            computing = " and ".join(f"{note['computing']:.2f}" for note in ranks)
            print(
                f"one process {one:.2f} s, two at once {longest(both):.2f} s, two ranks {two:.2f} s: "
                f"ratio {found[-1][0]:.3f} = machine {shared:.3f} x halo {halo:.3f} x rest {found[-1][2]:.3f}"
                f"; computing {computing} s of these, "
                f"started in {alone['start']:.1f}, {longest(ranks, 'start'):.1f} s, load before {load:.1f}",
                flush=True,
            )
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    print("medians: ratio {:.3f} (at most 1.35 is wanted), machine {:.3f}, rest {:.3f}".format(*medians))


if __name__ == "__main__":
    main()
