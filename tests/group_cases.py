"""Local processes as the ranks of a group, on MLX's ring back end over loopback."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

PROGRAM = Path(__file__).parent / "group_program.py"


def environment():
    """That of one process: this checkout, one thread, no group."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    return {**others, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent.parent)}


def free_ports(count):
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


def start_ranks(folder, count, command, own=()):
    """Starts a command once for each rank; the arguments in `own` are each rank's own."""
    hostfile = folder / f"hosts{count}.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    return [
        subprocess.Popen(
            [sys.executable, *command, *(own[rank] if own else ())],
            env={**environment(), "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ends(ranks, seconds=120):
    """Each rank's exit status and what it wrote to stderr."""
    found = []
    for rank in ranks:
        try:
            _, errors = rank.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for other in ranks:
                other.kill()
            raise
        found.append((rank.returncode, errors))
    return found


def run_ranks(folder, count, settings, own=()):
    """Runs the test program as so many ranks; each must end well."""
    command = [str(PROGRAM), json.dumps(settings)]
    ranks = start_ranks(folder, count, command, [[json.dumps(one)] for one in own])
    for status, errors in ends(ranks):
        assert status == 0, errors


def run_alone(settings, **more):
    """Runs the test program as one process."""
    command = [sys.executable, str(PROGRAM), json.dumps(settings | more)]
    subprocess.run(command, env=environment(), check=True)
