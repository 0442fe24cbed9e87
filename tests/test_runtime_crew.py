"""Connections between ranks: what each hears of the others, and of their end. All in one process."""

import contextlib
import socket
import threading

import pytest

from mlx_vae_tiling.arguments import one_line
from mlx_vae_tiling.runtime.ranks import crew as crews
from mlx_vae_tiling.runtime.ranks import meeting
from mlx_vae_tiling.runtime.ranks.crew import Crew, RankError
from mlx_vae_tiling.runtime.ranks.wire import MOST_FIELD_BYTES, Wire

pytestmark = pytest.mark.cpu

SILENCE_SECONDS = 30


@pytest.fixture
def connected():
    """Makes pairs of wires: rank 0's to another, and that one's to rank 0."""
    opened = []

    def pair(rank, silence=SILENCE_SECONDS):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            there = socket.create_connection(listener.getsockname())
            here, _ = listener.accept()
        for end in (here, there):
            end.settimeout(silence)
        opened.extend((here, there))
        return Wire(here, rank), Wire(there, 0)

    yield pair
    for end in opened:
        with contextlib.suppress(OSError):  # gone already
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@pytest.fixture
def three(connected):
    """The crews of three ranks."""
    pairs = {rank: connected(rank) for rank in (1, 2)}
    first = Crew(0, 3, {rank: here for rank, (here, _) in pairs.items()})
    return [first, *(Crew(rank, 3, {0: there}) for rank, (_, there) in pairs.items())]


def failure_of(crew):
    """What a crew says has failed; an assertion if it never does."""
    found = []
    thread = threading.Thread(target=lambda: found.append(str(crew.failure())), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it was not noticed"
    return found[0]


def test_messages_come_whole_and_in_order(three):
    first, second, _ = three
    data = bytes(range(256)) * 20_000
    for number in range(3):
        second.tell(0, "frames", {"number": number}, data)
    for number in range(3):
        message = first.hear()
        assert (message.rank, message.kind, message.fields) == (1, "frames", {"number": number})
        assert message.data == data
    assert first.hear(wait=False) is None
    first.tell_all("go")
    assert [one.hear().kind for one in three[1:]] == ["go", "go"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_one_is_everyone_s(three, failing, monkeypatch):
    monkeypatch.setattr(crews, "LEAVING_SECONDS", 0.1)  # nobody answers
    three[failing].leave(ValueError("no\nroom"))
    for rank, one in enumerate(three):
        if rank != failing:
            assert failure_of(one) == f"rank {failing}: no room"
            with pytest.raises(RankError, match=f"rank {failing}: no room"):
                one.hear()
            with pytest.raises(RankError, match=f"rank {failing}: no room"):
                one.tell_all("frames")


def test_who_goes_without_a_word_is_lost(three):
    three[2]._wires[0].connection.shutdown(socket.SHUT_RDWR)
    for one in three[:2]:
        assert failure_of(one) == "rank 2 was lost"


def test_who_falls_silent_is_lost(connected):
    here, there = connected(1, silence=0.2)
    first = Crew(0, 2, {1: here})
    assert failure_of(first) == "rank 1 was lost"
    there.close()


def test_a_rank_that_has_nothing_to_say_is_heard_of(connected, monkeypatch):
    monkeypatch.setattr(crews, "BEAT_SECONDS", 0.01)
    here, there = connected(1)
    first = Crew(0, 2, {1: here})
    assert [there.receive().kind for _ in range(3)] == ["beat"] * 3
    there.send("beat")
    there.send("frames")
    assert first.hear().kind == "frames"
    there.close()


def test_it_beats_within_the_silence_that_is_allowed():
    assert 3 * crews.BEAT_SECONDS < meeting.SILENCE_SECONDS < 30


def test_who_leaves_well_is_not_lost(three):
    last = threading.Thread(target=three[2].leave)
    last.start()
    message = three[0].hear()
    assert (message.rank, message.kind) == (2, "bye")
    leaving = [threading.Thread(target=one.leave) for one in three[:2]]
    for thread in leaving:
        thread.start()
    for thread in (last, *leaving):
        thread.join(30)
        assert not thread.is_alive()
    for one in three:
        one.check()


def test_what_is_told_of_an_error():
    assert one_line(KeyboardInterrupt()) == "interrupted"
    assert one_line(FileNotFoundError(2, "No such file", "a.npy")) == "a.npy: No such file"
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(ValueError()) == "ValueError"


def accepting(listener, missing):
    found = []
    thread = threading.Thread(target=lambda: found.append(meeting._accept(listener, "secret", set(missing))))
    thread.start()
    return thread, found


def test_only_who_knows_the_token_is_let_in():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread, found = accepting(listener, {1})
        strangers = [socket.create_connection(listener.getsockname()) for _ in range(4)]
        strangers[0].close()
        strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(40))
        Wire(strangers[2]).send("card", {"token": "guess", "rank": 1})
        Wire(strangers[3]).send("card", {"token": "secret", "rank": 7})
        for stranger in strangers[1:]:
            stranger.settimeout(30)
            with contextlib.suppress(ConnectionResetError):  # closed with something unread
                assert stranger.recv(1) == b""
            stranger.close()
        where = {"addresses": ["127.0.0.1"], "port": listener.getsockname()[1], "token": "secret"}
        reached = meeting._reach(where, 1)
        thread.join(30)
        (wires,) = found
        assert list(wires) == [1] and wires[1].rank == 1
        reached.send("frames", {}, b"abc")
        assert wires[1].receive().data == b"abc"
        for wire in (reached, *wires.values()):
            wire.close()


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(ConnectionError, match=r"rank 1, 3 did not reach rank 0 in"):
            meeting._accept(listener, "secret", {1, 3})
        where = {"addresses": ["127.0.0.1"], "port": 9, "token": "secret"}
        with pytest.raises(ConnectionError, match=r"rank 1 cannot reach rank 0 at port 9 .*127.0.0.1: "):
            meeting._reach(where, 1)


def test_nonsense_is_no_message(connected):
    here, there = connected(1)
    there.connection.sendall((MOST_FIELD_BYTES + 1).to_bytes(4, "big") + bytes(8))
    with pytest.raises(ValueError, match="a message of"):
        here.receive()
