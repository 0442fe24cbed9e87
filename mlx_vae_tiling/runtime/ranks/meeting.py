"""How ranks come together: MLX's group tells everyone where rank 0 is, who then connects to it."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.runtime.ranks.wire import Fields, Wire

CARD_BYTES = 4096
"""Of what the ranks tell each other through MLX."""

MEETING_SECONDS, ATTEMPT_SECONDS = 20.0, 5.0

SILENCE_SECONDS = 12.0
"""After which a rank is taken for lost: several beats of `crew`."""


def launched() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    sizes = (os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return "MLX_RANK" in os.environ or any(size not in ("", "1") for size in sizes)


def meet(group: mx.distributed.Group) -> dict[int, Wire]:
    """Connects every rank to rank 0.

    Returns:
        Rank 0's connections to the others, or a rank's to rank 0, by rank.

    Raises:
        ConnectionError: If a rank does not come.
    """
    if group.rank():
        where = _exchange(group, {})[0]
        return {0: _reach(where, group.rank())}
    addresses = list(_addresses())
    local = all(address.startswith("127.") for address in addresses)
    with socket.create_server(("127.0.0.1" if local else "", 0)) as listener:
        where = {
            "addresses": addresses,
            "port": listener.getsockname()[1],
            "token": secrets.token_hex(32),
        }
        _exchange(group, where)
        return _accept(listener, where["token"], set(range(1, group.size())))


def _exchange(group: mx.distributed.Group, card: Fields) -> list[Fields]:
    """What all ranks tell each other."""
    data = np.frombuffer(json.dumps(card).encode().ljust(CARD_BYTES), np.uint8)
    try:
        told = np.array(mx.distributed.all_gather(mx.array(data), group=group))
    except RuntimeError as error:
        raise ConnectionError(f"a rank was lost before the ranks had met ({error})") from error
    return [json.loads(bytes(row)) for row in told.reshape(group.size(), CARD_BYTES)]


def _addresses() -> Iterator[str]:
    """Where rank 0 may be reached, the launcher's own addresses first."""
    found: list[str] = []
    hostfile = os.environ.get("MLX_HOSTFILE", "")
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):  # other launchers have none
        found += [place.rpartition(":")[0].strip("[]") for place in json.loads(Path(hostfile).read_text())[0]]
    found.append(os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0])
    found.append(os.environ.get("NCCL_HOST_IP", ""))
    found = [place for place in found if place]
    if not found or not all(place.startswith("127.") for place in found):
        found.append(socket.gethostname())
        with contextlib.suppress(OSError):  # a name that only others can resolve
            found += [str(info[4][0]) for info in socket.getaddrinfo(found[-1], None, socket.AF_INET)]
    yield from dict.fromkeys(found)


def _accept(listener: socket.socket, token: str, missing: set[int]) -> dict[int, Wire]:
    wires: dict[int, Wire] = {}
    deadline = time.monotonic() + MEETING_SECONDS
    while missing:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            for wire in wires.values():
                wire.close()
            ranks = ", ".join(map(str, sorted(missing)))
            raise ConnectionError(f"rank {ranks} did not reach rank 0 in {MEETING_SECONDS:.0f} s") from None
        connection.settimeout(SILENCE_SECONDS)
        wire = Wire(connection)
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError):  # whoever else knocks at the port
            card = wire.receive(most_data_bytes=0).fields
            if hmac.compare_digest(str(card["token"]), token) and card["rank"] in missing:
                wire.rank = card["rank"]
                wire.send("welcome")
                wires[wire.rank] = wire
                missing.discard(wire.rank)
        if wire.rank < 0:
            wire.close()
    return wires


def _reach(where: Fields, rank: int) -> Wire:
    deadline, errors = time.monotonic() + MEETING_SECONDS, {}
    while time.monotonic() < deadline:
        for address in where["addresses"]:
            try:
                connection = socket.create_connection((address, where["port"]), ATTEMPT_SECONDS)
                connection.settimeout(SILENCE_SECONDS)
                wire = Wire(connection, 0)
                wire.send("card", {"token": where["token"], "rank": rank})
                wire.receive()
            except (OSError, EOFError, ValueError) as error:
                errors[address] = str(error) or "refused"
            else:
                return wire
        time.sleep(0.2)
    tried = "; ".join(f"{address}: {error}" for address, error in errors.items())
    raise ConnectionError(f"rank {rank} cannot reach rank 0 at port {where['port']} ({tried})")
