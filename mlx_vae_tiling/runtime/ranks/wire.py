"""Messages between ranks: fields as JSON, then bytes, over a socket."""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import Any, NamedTuple

Fields = dict[str, Any]

_LENGTHS = struct.Struct(">IQ")
"""Bytes of the fields, and of what follows them."""

MOST_FIELD_BYTES, MOST_DATA_BYTES = 2**26, 2**36
SLICE_BYTES = 2**20
"""Sent at a time, so that a time limit is one of silence and not of a whole message."""


class Message(NamedTuple):
    """What a rank says.

    Attributes:
        rank: Who says it.
        kind: What it is about.
        fields: The rest of it.
        data: Bytes that go with it.
    """

    rank: int
    kind: str
    fields: Fields
    data: bytearray


class Wire:
    """A connection to a rank. Several threads may send, one receives.

    Args:
        connection: A connected socket, whose time limit is that of silence.
        rank: Who is at the other end.
    """

    def __init__(self, connection: socket.socket, rank: int = -1):
        self.connection, self.rank = connection, rank
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: str, fields: Fields | None = None, data: Any = b"", wait: bool = True) -> None:
        """Sends a message.

        Args:
            kind: What it is about.
            fields: The rest of it, in types that JSON has.
            data: Contiguous bytes, or an array of them.
            wait: False to send nothing while another message is under way.

        Raises:
            OSError: If the other end is gone, or takes nothing for too long.
        """
        head, body = json.dumps({"kind": kind, **(fields or {})}).encode(), memoryview(data).cast("B")
        if not self._sending.acquire(blocking=wait):
            return
        try:
            self.connection.sendall(_LENGTHS.pack(len(head), len(body)) + head)
            for start in range(0, len(body), SLICE_BYTES):
                self.connection.sendall(body[start : start + SLICE_BYTES])
        finally:
            self._sending.release()

    def receive(self, most_data_bytes: int = MOST_DATA_BYTES) -> Message:
        """Waits for the next message.

        Args:
            most_data_bytes: More is taken for nonsense.

        Raises:
            EOFError: If the other end is gone.
            OSError: If it is, or if nothing came for too long.
            ValueError: If what came is no message.
        """
        head_bytes, data_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if head_bytes > MOST_FIELD_BYTES or data_bytes > most_data_bytes:
            raise ValueError(f"a message of {head_bytes} and {data_bytes} bytes")
        fields = json.loads(self._read(head_bytes))
        return Message(self.rank, fields.pop("kind"), fields, self._read(data_bytes))

    def end(self) -> None:
        """Sends no more; the other end still reads what was sent."""
        self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.connection.close()

    def _read(self, count: int) -> bytearray:
        read = bytearray(count)
        view = memoryview(read)
        while view:
            got = self.connection.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return read
