"""Mutated checkpoints of every layout: the right weights, to the bit, or one clear error; soon, in few bytes.

What is right is said by the safetensors library, and by which tensor of the unharmed file is which parameter.
"""

import json
import random
import time
import tracemalloc
import warnings
from functools import lru_cache, partial
from itertools import permutations

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import parameters, write
from diffusion_cases import reference_decoder as diffusion_decoder
from safetensors import SafetensorError, deserialize
from test_checkpoints_kinds import LAYOUTS as DIFFUSION_LAYOUTS
from test_checkpoints_load import LAYOUTS, decoder
from tiny_cases import reference_decoder as tiny_decoder
from tiny_cases import stored_tensors

from mlx_vae_tiling.checkpoints.load import load_decoder

MUTANTS_PER_CASE = 14


def in_taehv_file(folder, version):
    return write(folder / f"{version}.safetensors", stored_tensors(version))


CASES = [(make, version) for make, versions, _ in LAYOUTS for version in versions]
CASES += [(lambda folder, _, make=make: make(folder), make.__name__) for make, _ in DIFFUSION_LAYOUTS]
CASES += [(in_taehv_file, version) for version in ("taeltx2_3", "taeltx2_3_wide")]
DECODERS = {make.__name__: diffusion_decoder for make, _ in DIFFUSION_LAYOUTS}
DECODERS |= {version: partial(tiny_decoder, version) for _, version in CASES if version.startswith("taeltx")}


def decoder_of_case(version):
    return DECODERS.get(version, partial(decoder, version))()


TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
AXES = [axes for axes in permutations(range(5)) if axes[0] == 0]
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    64,
    10**6,
    2**63,
    10**30,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
]
VALUES += [
    "reflect",
    "zeros",
    "F32",
    "F16",
    "BF16",
    "I8",
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    "res_x",
    "compress_all",
]


@lru_cache
def unharmed(make, version, folder):
    """The files of a case; its source; and for each parameter its parts' file, name and axes, by contents."""
    source = make(folder, version)
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stored = [
        (path, name, array_of(tensor))
        for path, content in files.items()
        if path.suffix != ".json"
        for name, tensor in deserialize(content)
        if tensor["dtype"] in TYPES
    ]
    places = {}
    for ours, value in parameters(decoder_of_case(version)).items():
        wanted = np.array(value)
        whole = places_of(wanted, stored)
        # Queries, keys and values may be stored apart.
        thirds = [] if whole else [places_of(part, stored) for part in np.split(wanted, 3)]
        assert whole or all(thirds), ours
        places[ours] = [found[0] for found in ([whole] if whole else thirds)]
    return files, source.relative_to(folder), places


def places_of(wanted, stored):
    return [
        (path, name, axes)
        for path, name, array in stored
        if array.size == wanted.size
        for axes in axes_of(array)
        if squeezed(array.transpose(axes)) == squeezed(wanted)
        and np.array_equal(array.transpose(axes).reshape(wanted.shape), wanted)
    ]


def squeezed(array):
    return [size for size in array.shape if size > 1]


def axes_of(array):
    return {5: AXES, 4: [(0, 2, 3, 1)]}.get(array.ndim, [tuple(range(array.ndim))])


def array_of(tensor):
    return np.frombuffer(tensor["data"], TYPES[tensor["dtype"]]).reshape(tensor["shape"])


def test_parameters_are_distinct():
    """Or the unharmed file would not tell which tensor is which."""
    for _, version in CASES:
        values = [
            np.array(value).tobytes()
            for value in parameters(decoder_of_case(version)).values()
            if value.size > 1
        ]
        assert len(set(values)) == len(values), version


def split_header(content):
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(fields, data, text=None):
    text = json.dumps(fields).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + data


def any_tensor(rng, fields):
    return rng.choice([name for name in fields if name != "__metadata__"] or ["none"])


def mutate_json(rng, value, depth=0):
    """The value with one part of it replaced, removed or repeated."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = mutate_json(rng, value[key], depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        how = rng.random()
        if how < 0.15:
            return value[:at] + value[at + 1 :]
        if how < 0.3:
            return value[:at] + value[at : at + 1] * rng.choice([2, 70, 20_000]) + value[at:]
        return [*value[:at], mutate_json(rng, value[at], depth + 1), *value[at + 1 :]]
    return rng.choice(VALUES)


def cut(rng, content):
    return content[: rng.randrange(len(content))]


def extended(rng, content):
    return content + rng.randbytes(rng.choice([1, 8, 1000]))


def flipped(rng, content):
    """A few bits anywhere in the header or in the first bytes behind it."""
    end = min(len(content), 16 + int.from_bytes(content[:8], "little")) if len(content) > 8 else len(content)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 5])):
        changed[rng.randrange(min(end, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def data_flipped(rng, content):
    fields, data = split_header(content)
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 100])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return joined(fields, bytes(changed))


def overwritten(rng, content):
    start, size = rng.randrange(len(content)), rng.choice([1, 8, 200, 5000])
    block = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])
    return content[:start] + block + content[start + size :]


def header_length(rng, content):
    length = int.from_bytes(content[:8], "little")
    values = [0, 1, 2, length - 1, length + 1, 2 * length, len(content), 2**31, 2**63, 2**64 - 1]
    return rng.choice(values).to_bytes(8, "little") + content[8:]


def header_value(rng, content):
    fields, data = split_header(content)
    return joined(mutate_json(rng, fields), data)


def tensor_field(rng, content):
    """One value of one tensor's entry."""
    fields, data = split_header(content)
    name = any_tensor(rng, fields)
    fields[name] = mutate_json(rng, fields[name])
    return joined(fields, data)


def offsets_swapped(rng, content):
    fields, data = split_header(content)
    one, other = any_tensor(rng, fields), any_tensor(rng, fields)
    fields[one]["data_offsets"], fields[other]["data_offsets"] = (
        fields[other]["data_offsets"],
        fields[one]["data_offsets"],
    )
    return joined(fields, data)


def offsets_shared(rng, content):
    """A tensor lies where another of its size does, or a little beside its own place."""
    fields, data = split_header(content)
    one = any_tensor(rng, fields)
    start, stop = fields[one]["data_offsets"]
    alike = [o["data_offsets"] for n, o in fields.items() if n not in ("__metadata__", one)]
    alike = [place for place in alike if place[1] - place[0] == stop - start]
    shift = rng.choice([-8, -4, -2, 2, 4, 8])
    fields[one]["data_offsets"] = rng.choice([*alike, [start + shift, stop + shift]])
    return joined(fields, data)


def names_swapped(rng, content):
    fields, data = split_header(content)
    one, other = any_tensor(rng, fields), any_tensor(rng, fields)
    fields[one], fields[other] = fields[other], fields[one]
    return joined(fields, data)


def renamed(rng, content):
    fields, data = split_header(content)
    one = any_tensor(rng, fields)
    to = rng.choice(
        ["x", one + ".x", one[:-1], f"{one[:5]}.{one}", "decoder.up_blocks.99999.x.weight", one.upper()]
    )
    return joined({to if name == one else name: field for name, field in fields.items()}, data)


def removed(rng, content):
    """With its bytes, so that nothing but the tensor is missing."""
    fields, data = split_header(content)
    start, stop = fields.pop(any_tensor(rng, fields), {"data_offsets": (0, 0)})["data_offsets"]
    for name, field in fields.items():
        if name != "__metadata__" and field["data_offsets"][0] >= stop:
            field["data_offsets"] = [offset - stop + start for offset in field["data_offsets"]]
    return joined(fields, data[:start] + data[stop:])


def added(rng, content):
    fields, data = split_header(content)
    prefix = any_tensor(rng, fields).rpartition("up_blocks")[0]
    names = [
        "x",
        f"{prefix}up_blocks.0.y",
        f"{prefix}up_blocks.11.res_blocks.70.conv1.conv.weight",
        "decoder.z",
    ]
    fields[rng.choice(names)] = {"dtype": "F32", "shape": [], "data_offsets": [len(data), len(data) + 4]}
    return joined(fields, data + b"\0\0\0\0")


def twice(rng, content):
    fields, data = split_header(content)
    one = any_tensor(rng, fields)
    text = (
        json.dumps(fields)[:-1] + f", {json.dumps(one)}: {json.dumps(fields[any_tensor(rng, fields)])}" + "}"
    )
    return joined(None, data, text.encode())


def nested(rng, content):
    fields, data = split_header(content)
    depth = rng.choice([10, 900, 100_000])
    text = json.dumps(fields)[:-1] + ', "n": ' + "[" * depth + "]" * depth + "}"
    return joined(None, data, text.encode())


def reordered(rng, content):
    """The same tensors at other places: nothing is wrong with it."""
    fields, data = split_header(content)
    names = [name for name in fields if name != "__metadata__"]
    rng.shuffle(names)
    pieces, position = [], 0
    for name in names:
        start, stop = fields[name]["data_offsets"]
        fields[name]["data_offsets"] = [position, position + stop - start]
        pieces.append(data[start:stop])
        position += stop - start
    return joined(fields, b"".join(pieces))


def not_finite(rng, content):
    fields, data = split_header(content)
    start, stop = fields[any_tensor(rng, fields)]["data_offsets"]
    if stop - start < 4:
        return content
    at = start + 4 * rng.randrange((stop - start) // 4)
    bad = rng.choice([float("nan"), float("inf"), -float("inf")])
    return joined(fields, data[:at] + np.float32(bad).tobytes() + data[at + 4 :])


def metadata(rng, content):
    fields, data = split_header(content)
    config = fields.get("__metadata__", {}).get("config")
    if config is None or rng.random() < 0.1:
        fields["__metadata__"] = rng.choice(
            [{}, None, [], {"config": "{"}, {"config": "[]"}, {"config": 3}, "x"]
        )
    else:
        fields["__metadata__"]["config"] = json.dumps(mutate_json(rng, json.loads(config)))
    return joined(fields, data)


def metadata_text(rng, content):
    fields, data = split_header(content)
    fields["__metadata__"] = {
        "config": rng.choice(["[" * 99_999, "9" * 5000, '{"vae": ' * 5000, "\x00", '""', "nul"])
    }
    return joined(fields, data)


def other_type(rng, content):
    return rng.choice(
        [b"", b"PK\x03\x04" + content, b"\x80\x02}q\x00.", b"version https://git-lfs", content[8:]]
    )


MUTATIONS = [
    cut,
    extended,
    flipped,
    flipped,
    data_flipped,
    overwritten,
    header_length,
    header_value,
    tensor_field,
]
MUTATIONS += [
    tensor_field,
    offsets_swapped,
    offsets_shared,
    offsets_shared,
    names_swapped,
    renamed,
    removed,
    added,
]
MUTATIONS += [twice, nested, reordered, not_finite, metadata, metadata, metadata_text, other_type]


def mutate_side_file(rng, content):
    how = rng.randrange(5)
    if how == 0:
        return cut(rng, content)
    if how == 1:
        return rng.choice([b"", b"\xff\xfe\xfd", b"[" * 99_999, b"null", b"[1]", b" " * 2**21])
    return json.dumps(mutate_json(rng, json.loads(content))).encode()


def mutant(rng, files, decoder_files):
    """The files with one of them changed, mostly one with the decoder, and what was done."""
    path = rng.choice(sorted(files if rng.random() < 0.3 else decoder_files))
    if rng.random() < 0.04:
        return {name: content for name, content in files.items() if name != path}, f"{path} removed"
    if path.suffix == ".json":
        return files | {path: mutate_side_file(rng, files[path])}, f"{path} mutated"
    mutation = rng.choice(MUTATIONS)
    return files | {path: mutation(rng, files[path])}, f"{path} {mutation.__name__}"


def expected(files, places):
    """The tensors that the library reads for each parameter, with axes in the unharmed file; or None."""
    tensors = {}
    for path in {path for parts in places.values() for path, _, _ in parts}:
        try:
            tensors |= {(path, name): tensor for name, tensor in deserialize(without_new_types(files[path]))}
        except (SafetensorError, KeyError):
            return None
    found = {
        ours: [(tensors.get((path, name)), axes) for path, name, axes in parts]
        for ours, parts in places.items()
    }
    known = (t is not None and t["dtype"] in TYPES for parts in found.values() for t, _ in parts)
    return found if all(known) else None


def without_new_types(content):
    """Types that the library does not know become bytes: they may be those of tensors that nobody reads."""
    fields, data = split_header(content)
    for name, field in fields.items():
        if (
            name != "__metadata__"
            and isinstance(field["dtype"], str)
            and field["dtype"].lower() == field["dtype"]
        ):
            start, stop = field["data_offsets"]
            fields[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
    return joined(fields, data)


def is_right(value, parts, shapes):
    """Whether a parameter is the stored tensors, in the axes of the unharmed file unless a shape changed."""
    pieces = [value] if len(parts) == 1 else mx.split(value, len(parts))
    return all(
        is_tensor(piece, tensor, axes, shape)
        for piece, (tensor, axes), shape in zip(pieces, parts, shapes, strict=True)
    )


def is_tensor(value, tensor, axes, shape):
    array = array_of(tensor)
    possible = [axes] if tensor["shape"] == list(shape) else axes_of(array)
    dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[tensor["dtype"]]
    for axes in possible:
        if len(axes) == array.ndim and array.size == value.size:
            theirs = mx.array(array.transpose(axes).reshape(value.shape)).view(dtype).astype(value.dtype)
            if mx.array_equal(theirs, value):
                return True
    return False


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("make", "version"), CASES, ids=[f"{make.__name__}-{version}" for make, version in CASES]
)
def test_mutants_load_right_or_say_what_is_wrong(make, version, tmp_path):
    files, source, places = unharmed(make, version, tmp_path / "unharmed")
    shapes = shapes_of(files, places)
    decoder_files = {path for parts in places.values() for path, _, _ in parts}
    outcomes = []
    for number in range(MUTANTS_PER_CASE + 1):
        rng = random.Random(f"{make.__name__} {version} {number}")
        changed, what = mutant(rng, files, decoder_files) if number else (files, "-")
        folder = tmp_path / str(number)
        for path, content in changed.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        outcome, seconds, peak_bytes = loaded(folder / source)
        where = f"{make.__name__} {version} {number}: {what}: {outcome!r:.300}"
        assert seconds < 5 and peak_bytes < 500e6, (where, seconds, peak_bytes)
        if isinstance(outcome, Exception) and number:
            text = str(outcome)
            assert isinstance(outcome, ValueError | OSError), where
            assert 10 < len(text) < 1500 and "\n" not in text, where
        else:
            right = expected(changed, places)
            assert right is not None, where
            assert outcome.keys() == places.keys(), where
            for ours, value in outcome.items():
                assert is_right(value, right[ours], shapes[ours]), f"{where}: {ours}"
        outcomes.append(isinstance(outcome, Exception))
    assert sum(outcomes) > 0.3 * MUTANTS_PER_CASE


def shapes_of(files, places):
    tensors = {
        (path, name): tensor["shape"]
        for path in files
        if path.suffix != ".json"
        for name, tensor in deserialize(files[path])
    }
    return {ours: [tensors[path, name] for path, name, _ in parts] for ours, parts in places.items()}


def loaded(source):
    """The parameters or the error, the seconds, and the peak of what Python, NumPy and MLX allocated."""
    mx.clear_cache()
    mx.reset_peak_memory()
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = parameters(load_decoder(source))
    except Exception as error:
        outcome = error
    seconds = time.perf_counter() - begin
    peak_bytes = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory()
    tracemalloc.stop()
    return outcome, seconds, peak_bytes


def test_there_are_five_hundred_mutants_of_every_layout():
    assert MUTANTS_PER_CASE * len(CASES) >= 500
    assert {make for make, _ in CASES} >= {make for make, _, _ in LAYOUTS}
