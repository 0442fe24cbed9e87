"""The ranks of a decode: each connected to rank 0, all of them ended by the failure or loss of one.

MLX's group brings the ranks together, whichever of its back ends it has; frames and everything else go over
sockets of our own. What MLX's primitives do on the ring decided this, as measured with MLX 0.32.4:
`send` and `recv` reach neighbours only; `all_gather` brings every rank's frames to every rank, and waits for
all of them each time, so that no rank may be ahead by a piece or have another number of pieces; a rank whose
peer is gone learns of it only in its next call, without which rank it was; and a peer that stops without
going, as when a cable is pulled, is waited for without end. Over one socket each, a rank's band comes
when it is done, an end is noticed at once and silence after seconds, with the rank and what it said.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import one_line
from mlx_vae_tiling.runtime.ranks.meeting import meet
from mlx_vae_tiling.runtime.ranks.wire import Fields, Message, Wire

BEAT_SECONDS = 3.0
LEAVING_SECONDS = 5.0
"""For what was said last to arrive."""


class RankError(ConnectionError):
    """Another rank has failed or was lost, and with it the decode."""


class Crew:
    """All ranks, as one of them sees them.

    Args:
        rank: Of this process.
        size: Number of ranks.
        wires: Those to the others at rank 0, the one to rank 0 elsewhere, by rank.
    """

    def __init__(self, rank: int, size: int, wires: Mapping[int, Wire]):
        self.rank, self.size, self._wires = rank, size, wires
        self._inbox: deque[Message] = deque()
        self._changed = threading.Condition()
        self._failure: RankError | None = None
        self._over = threading.Event()
        self._readers = [threading.Thread(target=self._read, args=[w], daemon=True) for w in wires.values()]
        beats = [threading.Thread(target=self._beat, args=[w], daemon=True) for w in wires.values()]
        for thread in (*self._readers, *beats):
            thread.start()

    def check(self) -> None:
        """Raises a `RankError` if another rank has failed or was lost."""
        if self._failure is not None:
            raise self._failure

    def failure(self) -> RankError:
        """Waits until another rank has failed or was lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure)
        assert self._failure is not None
        return self._failure

    def tell(self, rank: int, kind: str, fields: Fields | None = None, data: Any = b"") -> None:
        """Says something to a rank; as `Wire.send`.

        Raises:
            RankError: If a rank has failed or was lost.
        """
        self.check()
        try:
            self._wires[rank].send(kind, fields, data)
        except OSError:
            # It may have said why it went.
            with self._changed:
                self._changed.wait_for(lambda: self._failure, LEAVING_SECONDS)
            self._fail(rank, None)
            self.check()

    def tell_all(self, kind: str, fields: Fields | None = None) -> None:
        """Says something to everyone that this rank is connected to."""
        for rank in self._wires:
            self.tell(rank, kind, fields)

    def hear(self, wait: bool = True) -> Message | None:
        """The next message.

        Args:
            wait: False to return None if there is none yet.

        Raises:
            RankError: If a rank has failed or was lost.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._inbox or self._failure)
            self.check()
            return self._inbox.popleft() if self._inbox else None

    def leave(self, error: BaseException | None = None) -> None:
        """Ends the connections; an error of this rank's own is the end of all ranks."""
        self._over.set()
        for wire in self._wires.values():
            with contextlib.suppress(OSError):  # who is gone need not be told
                if error is None or error is self._failure:
                    wire.send("bye")
                else:
                    wire.send("error", {"rank": self.rank, "text": one_line(error)})
                wire.end()
        for reader, wire in zip(self._readers, self._wires.values(), strict=True):
            # Closed with something unread, a connection would take back what was said last.
            reader.join(LEAVING_SECONDS)
            wire.close()

    def _read(self, wire: Wire) -> None:
        while True:
            try:
                message = wire.receive()
            except (EOFError, OSError, ValueError):
                return None if self._over.is_set() else self._fail(wire.rank, None)
            if message.kind == "error":
                self._fail(message.fields["rank"], message.fields["text"])
            elif message.kind != "beat":
                with self._changed:
                    self._inbox.append(message)
                    self._changed.notify_all()
            if message.kind in ("bye", "error"):
                return None

    def _beat(self, wire: Wire) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                wire.send("beat", wait=False)
            except OSError:
                return  # of which the reader tells

    def _fail(self, rank: int, text: str | None) -> None:
        """Notes the first failure, and at rank 0 tells everyone else."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = RankError(f"rank {rank} was lost" if text is None else f"rank {rank}: {text}")
            self._changed.notify_all()
        if self.rank == 0:
            for wire in self._wires.values():
                if wire.rank != rank:
                    with contextlib.suppress(OSError):  # of which its own reader tells
                        wire.send("error", {"rank": rank, "text": text})


@contextlib.contextmanager
def joined(group: mx.distributed.Group | Crew) -> Iterator[Crew]:
    """The ranks of a group while the block runs. An exception in it ends all of them.

    Args:
        group: MLX's, of two ranks or more; or what this has made of it, which is then not ended here.

    Raises:
        RankError: If the ranks do not come together.
    """
    if isinstance(group, Crew):
        yield group
        return
    try:
        crew = Crew(group.rank(), group.size(), meet(group))
    except ConnectionError as error:
        raise RankError(str(error)) from error
    try:
        yield crew
    except GeneratorExit:
        crew.leave()
        raise
    except BaseException as error:
        crew.leave(error)
        raise
    crew.leave()
