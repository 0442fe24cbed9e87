"""What the fuzzers share: one call under a watchdog, with its outcome and what it took."""

import contextlib
import resource
import signal
import sys
import time
import warnings
from dataclasses import dataclass

MOST_SECONDS = 5
"""Of the processor's time, so that a busy machine fails nothing."""

MOST_BYTES = 500 << 20

DOCUMENTED = ValueError | TypeError | OSError


@dataclass
class Outcome:
    """What a call gave or raised, the processor's seconds, and by how much the process's peak has grown."""

    value: object
    error: Exception | None
    seconds: float
    grown_bytes: int

    def check(self, where, longest=1500):
        """It took little, and an error is a documented one, of one line."""
        assert self.seconds < MOST_SECONDS and self.grown_bytes < MOST_BYTES, (where, self)
        if self.error is not None:
            text = str(self.error)
            assert isinstance(self.error, DOCUMENTED), (where, repr(self.error))
            assert 10 < len(text) < longest and "\n" not in text, (where, text[:2000])


class Hang(Exception):
    """Nothing came: of no documented type, as the system's own TimeoutError would be."""


@contextlib.contextmanager
def alarm(seconds):
    """Ends what hangs; no test depends on when."""

    def ring(number, frame):
        raise Hang(f"nothing came within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bounded(call):
    """Calls something; whatever it raises is the outcome, but for an interrupt or what ends the process."""
    before, began, value, error = footprint(), time.process_time(), None, None
    try:
        with alarm(120), warnings.catch_warnings():
            warnings.simplefilter("error")
            value = call()
    except Exception as raised:
        error = raised
    return Outcome(value, error, time.process_time() - began, footprint() - before)


def footprint():
    """The most bytes that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
