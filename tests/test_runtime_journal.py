"""The journal counts only frames that are on the disk, and is on the disk itself before it counts."""

import os

import numpy as np
import pytest
from fuzzing import alarm

from mlx_vae_tiling.runtime.planning.cost import Part
from mlx_vae_tiling.runtime.resuming.journal import Journal
from mlx_vae_tiling.runtime.resuming.journal_file import read_told, write_told
from mlx_vae_tiling.runtime.resuming.store import FrameStore
from mlx_vae_tiling.vae.regions import Region, Span

FRAMES = Region(Span(0, 6, 6), Span(0, 4, 4), Span(0, 5, 5))
SHAPE = (6, 4, 5, 3)


@pytest.fixture
def events(tmp_path, monkeypatch):
    """What reaches the disk, in order: the name of each file that is flushed or renamed."""
    found = []
    fsync, replace = os.fsync, os.replace

    def flushed(file):
        places = [tmp_path, *tmp_path.rglob("*")]
        found.extend(("flush", p.name) for p in places if os.path.samestat(p.stat(), os.fstat(file)))
        fsync(file)

    def renamed(source, target):
        found.append(("rename", os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return found


def test_frames_then_the_journal_then_its_name_reach_the_disk(tmp_path, events):
    folder = tmp_path / "x.npy.partial"
    folder.mkdir()
    parts = (Part(FRAMES, FRAMES),)
    journal = Journal(folder, parts, SHAPE, {}, {}, [0], None)
    store = FrameStore(folder, parts, SHAPE, np.dtype(np.uint8), journal)
    events.clear()
    for count in (2, 3):
        store.append(0, np.zeros((count, 4, 5, 3), np.uint8))
    store.close()
    once = [
        ("flush", "frames"),
        ("flush", "journal.json.new"),
        ("rename", "journal.json.new", "journal.json"),
        ("flush", "x.npy.partial"),
    ]
    assert events == 2 * once


def test_a_system_that_writes_a_few_bytes_at_a_time(tmp_path, monkeypatch):
    write, calls = os.pwrite, []

    def few(file, data, offset):
        calls.append(offset)
        return write(file, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", few)
    left, right = (FRAMES._replace(width=Span(*span)) for span in ((0, 2, 5), (2, 5, 5)))
    store = FrameStore(tmp_path, (Part(left, FRAMES), Part(right, FRAMES)), SHAPE, np.dtype(np.uint16))
    frames = np.random.default_rng(0).integers(0, 2**16, SHAPE, np.uint16)
    for part, span in enumerate((left, right)):
        for first in (0, 4):
            store.append(part, frames[first : first + 4, :, span.width.slice])
    assert (store.read(0, 6) == frames).all() and len(calls) > 100
    store.close()


def test_a_journal_that_another_hand_has_changed_is_refused(tmp_path):
    """However well it reads: with another count of frames, the frames would be of nobody knows what."""
    write_told(tmp_path, {"done": [4, 2], "shape": [6, 4, 5, 3]})
    assert read_told(tmp_path) == {"done": [4, 2], "shape": [6, 4, 5, 3]}
    journal = tmp_path / "journal.json"
    journal.write_text(journal.read_text().replace("4,", "3,", 1))
    with pytest.raises(ValueError, match="it is not as it was written"):
        read_told(tmp_path)


def test_a_journal_of_nested_brackets_is_named_so(tmp_path):
    (tmp_path / "journal.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="its brackets are nested without end"):
        read_told(tmp_path)


def test_a_pipe_in_place_of_a_journal_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "journal.json")
    with alarm(10), pytest.raises(ValueError, match="it is no file of a journal's size"):
        read_told(tmp_path)
