"""The schedule: what it says is held is held, nothing is computed twice or from frames that are gone."""

import random
from itertools import product

import mlx.core as mx
import pytest
from vae_cases import VERSIONS, random_latents, small_decoder

from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.vae.backends import CPU
from mlx_vae_tiling.vae.regions import Attention, Convolution, Region, Same, Span, Upsampling, Window
from mlx_vae_tiling.vae.schedule import (
    Compute,
    Deliver,
    Forget,
    HeldLengths,
    Pace,
    Read,
    Step,
    regions_of,
    schedule,
    spans_of,
)

CASES_PER_VERSION = 44


def random_window(draw, size):
    """All of the output, or a part of some axes: with inner borders, at a border, of one position."""
    slices = []
    for length in size:
        low, high = sorted(draw.sample(range(length + 1), 2))
        choices = [None, slice(low, high), slice(0, high), slice(low, None), slice(low, low + 1)]
        slices.append(draw.choice(choices))
    return draw.choice([Window(), Window(*slices), Window(frames=slices[0])])


def cases():
    draw = random.Random(11)
    for version, number in product(VERSIONS, range(CASES_PER_VERSION)):
        size = draw.randint(1, 6), draw.randint(2, 4), draw.randint(2, 4)
        pixels = 8 * (size[0] - 1) + 1, 32 * size[1], 32 * size[2]
        causal, batch = draw.random() < 0.5, draw.choice([1, 1, 2])
        pace = draw.randint(1, size[0] + 1), draw.choice([None, None, 1, 2, 3, 5, 8])
        yield version, number, batch, size, random_window(draw, pixels), causal, pace


def follow(event, lengths, steps):
    """Does with numbers what a stream does with frames."""
    own = lengths[event.step]
    if isinstance(event, Compute):
        for producer, _ in steps[event.step].reads:
            lengths[producer].join()
        own.add(event.stop - event.start)
    elif isinstance(event, Forget):
        own.forget(event.before)
    else:
        own.deliver()


@pytest.fixture
def without_cache():
    """A buffer from MLX's cache may be larger than what is asked for, and counts as large as it is."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


@pytest.mark.cpu
@pytest.mark.usefixtures("without_cache")
@pytest.mark.parametrize(("version", "number", "batch", "size", "window", "causal", "pace"), list(cases()))
def test_what_is_said_to_be_held_is_held(version, number, batch, size, window, causal, pace):
    """To the byte, after every event: by the schedule's integers, by the stream, and by MLX's own count."""
    decoder = small_decoder(version)
    latents = random_latents(decoder, batch, *size)
    options = decoder.options(causal=causal)
    stream = decoder.open(latents, options, window.region(*decoder.output_shape(latents.shape)[2:]))
    steps, regions = stream.steps, stream.regions
    frame = [4 * batch * s.channels * r.area for s, r in zip(steps, regions, strict=True)]
    mx.eval(latents, decoder.parameters())
    before, held = mx.get_active_memory(), [[0, 0] for _ in steps]
    lengths = [HeldLengths(region.time.start) for region in regions]
    for event in schedule(steps, [region.time for region in regions], Pace(*pace)):
        pieces = stream.carry_out(event)
        span = held[event.step]
        follow(event, lengths, steps)
        if isinstance(event, Compute):
            span[:] = (span[0] if span[0] < span[1] else event.start), event.stop
        elif isinstance(event, Forget):
            span[0] = event.before
        else:
            assert [piece.nbytes for piece in pieces] == [(span[1] - span[0]) * frame[-1]]
            span[0] = span[1]
            del pieces
        told = [(stop - start) * size for (start, stop), size in zip(held, frame, strict=True)]
        assert told == [frames.nbytes for frames in stream.held]
        for numbers, frames, size in zip(lengths, stream.held, frame, strict=True):
            assert [count * size for count in numbers.pieces] == [piece.nbytes for piece in frames.pieces]
            assert not numbers.pieces or numbers.start == frames.start
        if not options.timestep:  # whose embeddings are computed with the first chunk
            assert mx.get_active_memory() - before == sum(told)
    assert not any(told)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_events_make_sense(version, causal):
    """Every frame is computed once, in order, from frames that are held; in the end nothing is held."""
    draw = random.Random(3)
    decoder = small_decoder(version)
    steps = decoder.steps(decoder.options(causal=causal))
    for _ in range(20):
        frames = draw.randint(1, 12)
        size = 8 * (frames - 1) + 1, 64, 64
        regions = regions_of(steps, random_window(draw, size).region(*size))
        times = [region.time for region in regions]
        held = [Span(time.start, time.start, time.size) for time in times]
        made = [time.start for time in times]
        for event in schedule(steps, times, Pace(draw.randint(1, 4), draw.choice([None, 1, 2, 5]))):
            own = held[event.step]
            if isinstance(event, Compute):
                assert event.start == made[event.step] < event.stop <= times[event.step].stop
                output = own._replace(start=event.start, stop=event.stop)
                for producer, need in steps[event.step].reads:
                    seen = need.along(0, output)
                    assert held[producer].start <= seen.start and seen.stop <= held[producer].stop
                made[event.step] = event.stop
                held[event.step] = own._replace(stop=event.stop)
            elif isinstance(event, Forget):
                assert own.start < event.before <= own.stop
                held[event.step] = own._replace(start=event.before)
            else:
                assert isinstance(event, Deliver) and own.length
                held[event.step] = own._replace(start=own.stop)
        assert made == [time.stop for time in times]
        assert all(span.length == 0 for span in held)


LONG = Region(Span(0, 8 * 59 + 1, 8 * 59 + 1), Span(0, 64, 64), Span(0, 64, 64))


@pytest.mark.parametrize("time", [(0, 473), (3, 470), (16, 473), (0, 401), (200, 473)])
@pytest.mark.parametrize(("step", "cap"), [(1, None), (2, None), (3, 5), (1, 1), (5, None)])
@pytest.mark.parametrize("version", ["0.9.0", "ltx-2", "ltx-2.3"])
def test_a_long_decode_costs_what_a_short_one_does(version, step, cap, time, monkeypatch):
    """The planner leaves out the middle of a long video; nothing is lost by that."""
    decoder = small_decoder(version)
    shape = (1, decoder.config.latent_channels, 60, 2, 2)
    latents = Region(*(Span(0, length, length) for length in shape[2:]))
    part = Part(LONG.over(*time), latents)
    short = CostModel(decoder, shape, mx.float32, CPU).cost(part, step, cap)
    monkeypatch.setattr(CostModel, "_shortened", lambda model, pixels, step: pixels)
    assert CostModel(decoder, shape, mx.float32, CPU).cost(part, step, cap) == short


def brute_force(need, axis, span):
    """Positions of the input that a span of the output sees, one by one."""
    seen = set()
    for position in range(span.start, span.stop):
        if isinstance(need, Same):
            seen.add(position)
        elif isinstance(need, Convolution):
            before, after = need.reach if axis == 0 else (1, 1)
            seen.update(range(position - before, position + after + 1))
        elif isinstance(need, Upsampling):
            factor = need.factors[axis]
            seen.add((position + (factor - 1 if axis == 0 and need.drops_first else 0)) // factor)
        else:
            kernel = need.kernel[axis]
            middle = min(max(position, kernel // 2), span.size - 1 - kernel // 2)
            seen.update(range(middle - kernel // 2, middle + kernel // 2 + 1))
    return seen


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "need",
    [
        *(Same(), Convolution((1, 1)), Convolution((2, 0)), Convolution((1, 0)), Convolution((0, 0))),
        *(Upsampling((2, 2, 2)), Upsampling((1, 4, 4)), Upsampling((2, 2, 2), drops_first=False)),
        *(Attention((3, 7, 7)), Attention((11, 11, 11))),
    ],
    ids=str,
)
def test_needs_are_what_positions_see(need, axis):
    factor = need.stride[axis]
    for size in (11 * factor, 13 * factor, 24 * factor):
        size -= factor - 1 if axis == 0 and getattr(need, "drops_first", True) else 0
        for start, stop in ((a, b) for a in range(size) for b in range(a + 1, size + 1)):
            span = need.along(axis, Span(start, stop, size))
            expected = brute_force(need, axis, Span(start, stop, size)) & set(range(span.size))
            assert set(range(span.start, span.stop)) == expected


def test_regions_join_what_all_readers_need():
    decoder = small_decoder("ltx-2")
    steps = decoder.steps(decoder.options())
    pixels = Window(slice(4, 5), slice(40, 41), slice(0, 9)).region(9, 96, 96)
    regions = regions_of(steps, pixels)
    assert regions[-1] == pixels
    for number, step in enumerate(steps):
        for producer, need in step.reads:
            seen = need.before(regions[number])
            for held, needed in zip(regions[producer], seen, strict=True):
                assert held.joined(needed) == held


def test_what_two_readers_need_is_joined_where_neither_needs_all():
    def step(*reads):
        return Step(pytest.fail, pytest.fail, tuple(Read(*read) for read in reads), 1)

    steps = [step(), step((0, Convolution((3, 0)))), step((1, Same()), (0, Convolution((0, 4))))]
    time, size = Span(10, 12, 40), 40
    assert spans_of(steps, 0, time) == [Span(7, 16, size), time, time]
