"""What waits at rank 0: never more than its plan has room for, whoever is fast and whoever is slow."""

import random
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling import plan_decode
from mlx_vae_tiling.runtime.assembly import put_together
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.runtime.ranks.division import Division
from mlx_vae_tiling.runtime.ranks.group import Team, serve
from mlx_vae_tiling.runtime.ranks.shares import divide
from mlx_vae_tiling.runtime.ranks.waiting import FrameBands, Room, ranges_of, room_for
from mlx_vae_tiling.runtime.ranks.wire import Message
from mlx_vae_tiling.runtime.resuming.store import FrameStore
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import PUBLISHED
from mlx_vae_tiling.vae.regions import Region, Span

FRAMES, HEIGHT, WIDTH = 61, 6, 10

BANDS = [((0, FRAMES), (0, 3)), ((0, FRAMES), (3, 7)), ((0, FRAMES), (7, WIDTH))]
RANGES = [((0, 25), (0, WIDTH)), ((25, 44), (0, WIDTH)), ((44, FRAMES), (0, WIDTH))]


def parts_of(cuts):
    found = []
    for frames, columns in cuts:
        region = Region(Span(*frames, FRAMES), Span(0, HEIGHT, HEIGHT), Span(*columns, WIDTH))
        found.append(Part(region, region))
    return tuple(found)


def expected_frames():
    values = np.arange(FRAMES * HEIGHT * WIDTH * 3) * 7 % 251
    return values.reshape(FRAMES, HEIGHT, WIDTH, 3).astype(np.uint8)


class Others:
    """Ranks 1 and 2 as rank 0 hears them: each sends all that it may, and one is only heard at last."""

    def __init__(self, parts, piece, slow, seed):
        self.rank, self.size, self.parts, self.piece, self.slow = 0, 3, parts, piece, slow
        self.done, self.until, self.inbox = {}, {}, {1: [], 2: []}
        self.random, self.last, self.observe = random.Random(seed), b"", lambda: None

    def tell(self, rank, kind, fields):
        numbers = fields["numbers"] if kind == "share" else [fields["part"]]
        until = fields["until"] if kind == "share" else [fields["frame"]]
        for number, frame in zip(numbers, until, strict=True):
            self.until[number] = frame
            self.done.setdefault(number, 0)
        self.send()

    def send(self):
        for number, done in self.done.items():
            time, _, columns = self.parts[number].pixels
            while done < min(self.until[number], time.length):
                stop = min(done + self.piece, self.until[number], time.length)
                frames = expected_frames()[time.start + done : time.start + stop, :, columns.slice]
                fields = {"part": number, "shape": frames.shape}
                message = Message(number, "frames", fields, bytearray(np.ascontiguousarray(frames)))
                self.inbox[number].append(message)
                done = stop
            self.done[number] = done
        self.observe()

    def hear(self, wait=True):
        there = [rank for rank, messages in self.inbox.items() if messages]
        quick = [rank for rank in there if rank != self.slow]
        if not quick and not wait:
            return None
        assert there, "rank 0 waits for ranks that wait for it"
        message = self.inbox[self.random.choice(quick or there)].pop(0)
        self.last = message.data
        self.observe()
        return message


@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.parametrize("piece", [1, 5, 8, 100])
@pytest.mark.parametrize("cuts", [BANDS, RANGES], ids=["bands", "ranges"])
def test_no_more_waits_than_there_is_room_for(cuts, piece, slow, tmp_path):
    parts, room = parts_of(cuts), Room(8, HEIGHT * WIDTH * 3)
    crew = Others(parts, piece, slow, seed=piece)
    division = Division(parts, (0, 1, 2), (1, 1, 1))
    shape, dtype = (FRAMES, HEIGHT, WIDTH, 3), np.dtype(np.uint8)
    store = FrameBands(parts, shape, dtype) if cuts is BANDS else FrameStore(tmp_path, parts, shape, dtype)

    def decode(part, done):
        own = expected_frames()[part.pixels.time.slice, :, part.pixels.width.slice]
        for start in range(done, len(own), 8):
            yield own[start : start + 8]

    own = SimpleNamespace(plan=SimpleNamespace(require_fit=lambda: None), decode=decode)
    plan = SimpleNamespace(parts=parts, backend=SimpleNamespace(arithmetic={}))
    job, most = SimpleNamespace(plan=plan, dtype=dtype), 0

    def observe():
        nonlocal most
        waiting = sum(len(message.data) for messages in crew.inbox.values() for message in messages)
        held = [frame for frames in getattr(store, "_held", []) for frame in frames]
        assert all(frame.base is None for frame in held)
        waiting += len(crew.last) + sum(frame.nbytes for frame in held)
        most = max(most, waiting)
        assert waiting <= room.nbytes(ranges_of(parts))

    crew.observe = observe
    team = Team(crew, job, own, division, [10**6] * 3, room)
    frames = np.concatenate(list(put_together(team.pieces(job, store, lambda _: None), store, 0)))
    assert (frames == expected_frames()).all()
    assert most > room.frames * room.frame_bytes / 2


class Leader:
    """Rank 0 as another rank hears it: it makes room for three more frames whenever there is none."""

    def __init__(self, parts, done):
        self.parts, self.done, self.sent, self.finished = parts, list(done), [[] for _ in parts], False
        self.until = [count + 3 for count in done]
        self.part = 0

    def hear(self):
        if not self.sent[0] and self.part == 0:
            self.part = 1
            told = [[list(span) for span in box] for box in self.parts[0]]
            other = [[list(span) for span in box] for box in self.parts[1]]
            fields = {"numbers": [0, 1], "parts": [told, other], "done": list(self.done)}
            return Message(0, "share", fields | {"until": list(self.until), "arithmetic": {}}, b"")
        for number, part in enumerate(self.parts):
            if self.done[number] < part.pixels.time.length:
                assert self.done[number] == self.until[number], "it waits, and there is room"
                self.until[number] += 3
                return Message(0, "until", {"part": number, "frame": self.until[number]}, b"")
        self.finished = True
        return Message(0, "finished", {}, b"")

    def tell(self, rank, kind, fields, data=b""):
        if kind == "frames":
            number = fields["part"]
            self.sent[number].append(np.frombuffer(data, np.uint8).reshape(fields["shape"]))
            self.done[number] += fields["shape"][0]
            assert self.done[number] <= self.until[number]


def test_a_rank_sends_what_there_is_room_for_and_waits_with_the_rest():
    parts, begun = parts_of(RANGES[1:]), [5, 0]
    leader = Leader(parts, begun)

    def decode(part, done):
        frames = expected_frames()[part.pixels.time.slice]
        for start in range(done, len(frames), 8):
            yield frames[start : start + 8]

    plan = SimpleNamespace(memory_limit=1, require_fit=lambda: None)
    job = SimpleNamespace(plan=plan, decode=decode, planned_anew=lambda parts, arithmetic: job)
    sent = serve(leader, job, {})
    assert leader.finished and sent == sum(part.pixels.time.length for part in parts) - 5
    for part, done, pieces in zip(parts, begun, leader.sent, strict=True):
        assert (np.concatenate(pieces) == expected_frames()[part.pixels.time.slice][done:]).all()


def test_rank_0_s_plan_has_its_share_and_the_frames_that_wait():
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, 3, 4, 5)
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB")
    job = Job.prepare(decoder, latents, decoder.options(), "uint8", plan)
    model = CostModel(decoder, latents.shape, decoder.dtype, plan.backend)
    room = Room(4, 3 * 128 * 160)
    half = divide(model, plan.output, [10**9] * 2)
    share = plan_decode(decoder, latents.shape, memory_limit="1GB", parts=half.parts[:1])
    budget = share.peak_bytes + room.nbytes(1)
    for less, fits in ((0, True), (1, False)):
        given = replace(job, plan=replace(plan, memory_limit=budget - less))
        team = Team.planned(SimpleNamespace(size=2), given, half, [budget - less, 10**9], room)
        found = team.job.plan
        assert team.own.plan.memory_limit == budget - less - room.nbytes(1)
        assert team.own.plan.parts == half.parts[:1] and found.parts == half.parts
        assert found.peak_bytes == team.own.plan.peak_bytes + room.nbytes(1)
        assert (found.waiting_bytes, found.memory_limit) == (room.nbytes(1), budget - less)
        assert found.operations == sum(half.operations) and found.recompute > plan.recompute
        assert (team.own.plan.chunk_bytes == share.chunk_bytes) == fits
    idle = Team.planned(SimpleNamespace(size=2), job, replace(half, owners=(1, 1)), [10**9] * 2, room)
    assert idle.own is None
    assert idle.job.plan.peak_bytes == model.weight_bytes + room.nbytes(1)


def model_of(size):
    decoder = build_decoder(PUBLISHED["ltx-2.3"].config)
    shape = (1, decoder.config.latent_channels, *size)
    return CostModel(decoder, shape, mx.bfloat16, decoder.policy("metal"))


def output_of(model):
    return plan_decode(model.decoder, model.latent_shape, backend="metal", dtype="bfloat16").output


def test_room_for_the_largest_useful_piece():
    """At 1080p a latent frame at a time, which gives eight frames; with little memory fewer."""
    model = model_of((16, 34, 60))
    output, frame = output_of(model), 1088 * 1920 * 3
    assert room_for(model, output, 1, 10**10) == Room(8, frame)
    assert room_for(model, output, 2, 10**10) == Room(8, 2 * frame)
    assert room_for(model, output, 1, 8 * 4 * 2 * frame) == Room(4, frame)
    assert room_for(model, output, 1, 2 * frame) == Room(1, frame)
    with pytest.raises(ValueError, match=r"rank 0 needs 12.53 MB for frames .* got 12.53 MB: raise"):
        room_for(model, output, 1, 2 * frame - 1)


def test_rank_0_has_its_windows_in_what_the_frames_leave():
    model = model_of((16, 34, 60))
    output = output_of(model)
    half = divide(model, output, [10**11] * 2).parts[0]
    needed = model.weight_bytes + model.cost(half, 1, 1).total
    room = Room(8, 10**7)
    alone, tight, wide = (
        divide(model, output, [budget] * 2, room=given)
        for budget, given in ((needed, None), (needed, room), (needed + room.nbytes(1), room))
    )
    assert [len(division.of(0)) for division in (alone, tight, wide)] == [1, 2, 1]
    for number in tight.of(0):
        cost = model.cost(tight.parts[number], 1, 1).total
        assert model.weight_bytes + cost <= needed - room.nbytes(1)
