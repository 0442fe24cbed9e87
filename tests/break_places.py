"""The places that `break_on_purpose` breaks."""

from typing import NamedTuple


class Place(NamedTuple):
    """A place, and how it is broken.

    Args:
        file: Under the package.
        old: What is there, exactly once.
        new: What is put there.
        tests: What should notice, as a shell gives it to pytest.
        why: Where it may survive, the reason.
    """

    file: str
    old: str
    new: str
    tests: str
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"


def places(file: str, tests: str, *changes: tuple[str, ...]) -> list[Place]:
    """Places of one file, noticed by the same tests: modules, of which `-k` chooses some."""
    modules, _, chosen = tests.partition(" -k ")
    command = " ".join(f"tests/test_{name}.py" for name in modules.split())
    command += f" -k '{chosen}'" if chosen else ""
    return [Place(file, old, new, command, *why) for old, new, *why in changes]


PLACES = [
    *places(
        "tiling/masks.py",
        "tiling_masks",
        ("/ (left + 1)", "/ (left + 2)"),
        ("/ (right + 1)", "/ max(right, 1)"),
        ("np.arange(left) / max(left, 1)", "np.arange(1, left + 1) / max(left, 1)"),
        ("if length > LARGEST_LENGTH:", "if length > 2 * LARGEST_LENGTH:"),
    ),
    *places(
        "tiling/intervals.py",
        "tiling_intervals tiling_config",
        ("stride = size - overlap\n", "stride = size - overlap + 1\n"),
        ("starts = [0] + [start - 1", "starts = [0] + [start"),
        ("left_ramps = [0] + [ramp + 1", "left_ramps = [0] + [ramp"),
        (
            "if dimension_size <= size:",
            "if dimension_size < size:",
            "an axis as long as a tile is one interval either way",
        ),
    ),
    *places(
        "tiling/config.py",
        "tiling_config",
        ("tile_time = num_frames > temporal_threshold", "tile_time = num_frames >= temporal_threshold"),
        ("2 * 1024**3", "3 * 1024**3"),
        ("if overlap >= size:", "if overlap > size:"),
    ),
    *places(
        "tiling/plan.py",
        "tiling_decode tiling_memory",
        ("mask / total[output]", "mask"),
        ("held + max(decoding(*latents), 2 * tile)", "held + decoding(*latents)"),
        ("rounding = piece // 2 if itemsize < 4 else 0", "rounding = 0"),
    ),
    *places(
        "media/npy.py",
        "media_resume media_video",
        ("_write_header(file, batch, frames)\n            _flush(file)", "_flush(file)"),
        ("return min(shape[0], present // frame_bytes)", "return shape[0]"),
        ("        if kept:\n            file.truncate()\n", ""),
        ("if form is not None and", "if False and"),
    ),
    *places(
        "media/png.py",
        "media_outputs",
        ("if number > unfinished[-1]:", "if False:"),
        ("if not head.startswith(_SIGNATURE) or file.read() != _END:", "if not head.startswith(_SIGNATURE):"),
        ("if match and name % int(match[1]) == match[0]", "if match"),
        ("if number >= kept:", "if number > kept:"),
    ),
    *places(
        "media/places.py",
        "media_outputs media_video",
        ("    flush_to_disk(source)\n", ""),
        ("    if exists:\n", "    if False:\n"),
        ("    if unfinished:\n", "    if False:\n"),
        ("return stat.S_ISCHR(mode)", "return False"),
    ),
    *places(
        "media/movie.py",
        "media_resume media_outputs -k killed or left or few_frames or other_frames or end",
        ("old.frames > new.frames", "old.frames >= 0"),
        ("frame.pts, frame.time_base = index,", "frame.pts, frame.time_base = index - begun,"),
        ("_REORDERED_FRAMES = 4", "_REORDERED_FRAMES = 0"),
        ("if not kept.fits(_encoding_for(movie, frames)):", "if False:"),
    ),
    *places(
        "media/kept.py",
        "media_resume",
        ("if last == count - 1:", "if True:"),
        ("    os.truncate(path, end)\n", ""),
        ("return bool(needed) and all(", "return True or all("),
        (
            "for number, packet in islice(_numbered(self.path), self.frames):",
            "for number, packet in _numbered(self.path):",
        ),
    ),
    *places(
        "media/encoders.py",
        "media_video",
        ("pixels = pixels - pixels // 257", "pixels = pixels"),
        ('mode="edge"', 'mode="constant"'),
        ("context.color_range = _LIMITED_RANGE", "context.color_range = 2"),
    ),
    *places(
        "media/writer.py",
        "media_video media_resume",
        ("self._queue.put(frames.copy())", "self._queue.put(frames)"),
        ("            self._finish()\n", "            pass\n"),
        ("if form != self._form:", "if False:"),
    ),
    *places(
        "media/stored.py",
        "media_latents media_latents_memory",
        ("if self.fortran else self.shape\n", "if False else self.shape\n"),
        ("count -= now\n", "count -= now + 1\n"),
    ),
    *places(
        "vae/regions.py",
        "vae_schedule vae_windows cli_messages",
        ("max(span.start - before, 0)", "max(span.start - before + 1, 0)"),
        ("return self.factors[0] - 1 if", "return 0 if"),
        ("0), size - kernel)", "0), size)"),
        ("(after, before.start * factor - self._dropped(axis))", "(after, before.start * factor)"),
        ("or not 0 <= start < stop <= size:", "or not 0 <= start <= stop <= size:"),
    ),
    *places(
        "vae/needs.py",
        "vae_schedule vae_tiny vae_diffusion",
        ("before = 0 if axis == 0 else", "before = 0 if axis >= 0 else"),
        ("self.later.along(axis, span)", "span"),
    ),
    *places(
        "vae/schedule.py",
        "vae_schedule vae_streaming",
        ("if before > held[producer]:", "if False:"),
        ("before if other is None else other.joined(before)", "before"),
    ),
    *places(
        "vae/stream.py",
        "vae_streaming vae_schedule",
        ("cut(first, [slice(surplus, frames)])", "first[:, surplus:]"),
        ("self.start += surplus", "self.start += frames"),
    ),
    *places(
        "vae/options.py",
        "vae_options runtime_run -k noise or seed or options",
        ("frames = range(first + region.time.start,", "frames = range(region.time.start,"),
        (
            "return mx.random.normal(size, key=self._key(1,",
            "return 0.5 * mx.random.normal(size, key=self._key(1,",
        ),
        ("if not 0 <= self.noise_scale <= 1:", "if not 0 <= self.noise_scale:"),
        ("or not 0 <= seed < 2**64:", "or not 0 <= seed:"),
    ),
    *places(
        "vae/operations.py",
        "vae_parity vae_backends vae_schedule -k step1 or gpu_policies or is_held",
        ("before - (wanted.start - inner.start), after", "before, after"),
        ("transpose(0, 4, 1, 2, 6, 3, 5)", "transpose(0, 4, 1, 2, 5, 3, 6)"),
        ("x * factor + shift", "x * factor"),
        ("slice(size - 2, size - 1)", "slice(size - 1, size)"),
        ("if x.nbytes - view.nbytes > SHARED_BYTES:", "if False:", "a gather copies too, in more time"),
        ("if x.nbytes - view.nbytes > SHARED_BYTES:", "if True:"),
    ),
    *places(
        "vae/cpu.py",
        "vae_decoder vae_backends vae_parity -k pinned or upsampling or step1",
        ("        view[:, :first] = view[:, first : first + 1]\n", ""),
        ("x[0] = x[2]", "x[0] = x[1]"),
        ("return itemsize * (made + max(tiled, kept * (kept < made)))", "return itemsize * made"),
    ),
    *places(
        "vae/layers.py",
        "vae_parity vae_windows -k step1 or corners or matters",
        ("return cut(y, Upsampling(self.stride).slices(where.inputs[0], where.output))", "return y"),
        ("inputs[1] if self._repeats else None", "None"),
    ),
    *places(
        "vae/decoder.py",
        "vae_parity vae_windows -k step1 or unnormalised or mixes or corners",
        ("z = (1 - scale) * z * std", "z = z * std"),
        ("z = z if options.normalized else (z - mean) / std", "z = z"),
    ),
    *places(
        "vae/unpatching.py",
        "vae_backends vae_windows vae_tiny -k corners or a_window or last_step",
        ("self.need.before(where.output))", "self.need.before(where.output))[:2]"),
        ("self.need.before(where.output))", "where.output)"),
        ("where.dtype.size * kept * (kept < made)", "0"),
        ("where.dtype.size * made * self.arrays", "where.dtype.size * made"),
    ),
    *places(
        "checkpoints/load.py",
        "checkpoints_load checkpoints_damage -k values or layouts or shorter",
        ("if (part == exponent).any():", "if False:"),
        ("if value.dtype != stored and not _fits(value):", "if False:"),
        ("if values.size != count:", "if False:"),
        ("values.transpose(axes) if axes else values", "values"),
    ),
    *places(
        "checkpoints/locate.py",
        "checkpoints_load checkpoints_damage checkpoints_fetch",
        ('        raise TypeError(f"source:', "        return Path('.')\n        raise TypeError(f\"source:"),
    ),
    *places(
        "runtime/frames.py",
        "runtime_run -k fault or value or crop or those",
        ("finite = mx.all(mx.isfinite(x))", "finite = mx.all(x == x)"),
        ("CONSTANT_FRAME_PIXELS = 32 * 32", "CONSTANT_FRAME_PIXELS = 32 * 3200"),
        ("mx.round(frame * most)", "mx.floor(frame * most)"),
        ("large = piece.shape[3]", "large = 32 * piece.shape[3]"),
    ),
    *places(
        "runtime/job.py",
        "runtime_run -k fault or failure or measured or resume or slow or device",
        (
            "            mx.clear_cache()\n            pace.halve(self.decoder.config.temporal_scale)\n",
            "            mx.clear_cache()\n",
        ),
        ("            if failed_at == start:\n", "            if failed_at >= 0:\n"),
        ("        if slow or used > plan.memory_limit:\n", "        if slow:\n"),
        (
            "pixels = pixels.over(start, pixels.time.stop)",
            "pixels = pixels.over(pixels.time.start, pixels.time.stop)",
        ),
        ("return NO_FRAMES, Failure(error=error)", "raise"),
    ),
    *places(
        "runtime/resuming/journal.py",
        "runtime_run -k killed or meanwhile or resume or two_decodes or older or damaged",
        ("if changed or shape != (plan.frames, *plan.size, 3):", "if shape != (plan.frames, *plan.size, 3):"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        ("return found.st_ino, found.st_size, found.st_mtime_ns", "return (0, 0, 0)"),
    ),
    *places(
        "runtime/resuming/journal_file.py",
        "runtime_journal runtime_fuzz",
        ('told.pop("sum", None) != _sum(told)', 'not told.pop("sum", None)'),
        ("except RecursionError:", "except ZeroDivisionError:"),
        ("found.st_size > _MOST_BYTES", "found.st_size < 0"),
        ("not stat.S_ISREG(found.st_mode)", "False"),
        (
            "    replace_durably(os.fspath(fresh), os.fspath(folder / NAME))\n",
            "    os.link(fresh, folder / NAME)\n",
        ),
    ),
    *places(
        "runtime/resuming/output.py",
        "runtime_run cli -k room or killed or older or replaced or resume or kept or ctrl or keeps_nothing",
        ("needed += int(np.prod(shape)) * dtype.itemsize", "needed += 0"),
        (
            "if finished or not (unfinished_frames(path) if store is None else any(store.done)):",
            "if finished:",
        ),
        ("found == journal.replaces or", "False or"),
        ("except BlockingIOError:\n        return None", "except ZeroDivisionError:\n        return None"),
    ),
    *places(
        "runtime/resuming/store.py",
        "runtime_journal runtime_run -k reach or damaged or disk or a_few",
        ("        os.fsync(self._file)\n        if self._journal", "        if self._journal"),
        ("view, offset = view[written:], offset + written", "view, offset = view[written:], offset"),
        ("if size < max(self._end(part) for part in range(len(parts))):", "if False:"),
    ),
    *places(
        "runtime/planning/memory.py",
        "runtime_memory",
        ("set_limit(left[-1][1])", "set_limit(left[0][1])"),
        ("least <= number < 2**63", "0 <= number < 2**63"),
        ("- self.others\n", "\n"),
    ),
    *places(
        "runtime/planning/grids.py",
        "runtime_plan -k finds or little or halo or elements",
        ("if most <= least:", "if most < least:"),
        ("if most > enough:", "if False:"),
        ("reach = max(halo,", "reach = min(halo,"),
        ("if cost.elements < ARRAY_ELEMENTS else math.inf", "if True else math.inf"),
    ),
    *places(
        "runtime/planning/cost.py",
        "runtime_plan runtime_kinds -k cover or once or there_twice",
        (
            "join():\n                    copying.add(frames_with(copied))",
            "join():\n                    pass",
        ),
        ("filled = 2 * self._lag + 4 * step", "filled = self._lag // 4"),
        ("ahead = self.backend.pieces_ahead", "ahead = 2 * self.backend.pieces_ahead"),
    ),
    *places(
        "runtime/planning/planner.py",
        "runtime_plan",
        ("steps = steps[-1:]", "steps = list(steps)"),
        ("recompute=operations / at_once", "recompute=1.0"),
    ),
    *places(
        "runtime/ranks/waiting.py",
        "runtime_waiting",
        ("return self.frames * self.frame_bytes * (ranges + 1)", "return self.frames * self.frame_bytes"),
        ("frame.copy() for frame in frames", "frame for frame in frames"),
        ("Room(cap or step * scale, frame_bytes)", "Room(step * scale, frame_bytes)"),
        ("<= budget // MOST_SHARE:", "<= budget:"),
        ("if room.nbytes(1) > budget:", "if False:"),
    ),
    *places(
        "runtime/ranks/group.py",
        "runtime_waiting runtime_group",
        ("<= store.complete + self.room.frames", "<= store.complete + 3 * self.room.frames"),
        ("return self.room.frames + (store.complete", "return 2 * self.room.frames + (store.complete"),
        ("memory_limit=budgets[0] - waiting)", "memory_limit=budgets[0])"),
        ("peak_bytes=plan.peak_bytes + waiting,", "peak_bytes=plan.peak_bytes,"),
        ("frames[until[number] - done :]", "frames[len(frames) :]"),
        ("        if names:\n", "        if False:\n"),
        ("budgets[message.rank] = message.fields", "budgets[message.rank] = budgets[0] or message.fields"),
        ("        if parts != division.parts:\n", "        if False:\n"),
        (
            "self.own.decode(self.division.parts[number], store.done[number])",
            "self.own.decode(self.division.parts[number])",
        ),
        ('"done": [store.done[number] for', '"done": [0 for'),
    ),
    *places(
        "runtime/ranks/crew.py",
        "runtime_crew",
        ('elif message.kind != "beat":', "else:"),
        ('if message.kind in ("bye", "error"):', "if False:"),
        ("        if self.rank == 0:\n", "        if False:\n"),
        ('{"rank": rank, "text": text}', '{"rank": 0, "text": text}'),
        ("return None if self._over.is_set() else self._fail(wire.rank, None)", "return None"),
        ('                wire.send("beat", wait=False)\n', "                pass\n"),
        ("BEAT_SECONDS = 3.0", "BEAT_SECONDS = 30.0"),
    ),
    *places(
        "runtime/ranks/wire.py",
        "runtime_crew",
        ("if head_bytes > MOST_FIELD_BYTES or data_bytes > most_data_bytes:", "if False:"),
        ("body[start : start + SLICE_BYTES]", "body[start:]"),
    ),
    *places(
        "runtime/ranks/meeting.py",
        "runtime_crew",
        ('hmac.compare_digest(str(card["token"]), token) and', "True and"),
        ('and card["rank"] in missing', "and True"),
        ("SILENCE_SECONDS = 12.0", "SILENCE_SECONDS = 1200.0"),
    ),
    *places(
        "runtime/ranks/shares.py",
        "runtime_shares runtime_waiting",
        ("KEPT = 1.05", "KEPT = 9.0"),
        ("min(able, key=lambda rank: busy[rank])", "able[0]"),
        (
            "part = part_around(self.model, Region(*spans), self.halo)",
            "part = part_around(self.model, Region(*spans), None)",
        ),
        ("weights[rank] = once / found.operations[rank]", "weights[rank] = 1.0"),
        ("weights[rank], share = 0.0, ()", "weights[rank], share = 1.0, ()"),
        ("left = [budgets[0] - waiting,", "left = [budgets[0],"),
        (
            "for rank, budget in enumerate(budgets) if fits(",
            "for rank, budget in enumerate(budgets) if budget or fits(",
        ),
        ("CUTS_PER_LATENT = 4", "CUTS_PER_LATENT = 1"),
    ),
    *places(
        "runtime/ranks/division.py",
        "runtime_shares cli_ranks",
        ("return len(times) == 1 and", "return"),
        ("max(busy) * len(busy) / sum(busy)", "max(busy) * len(self.operations) / sum(busy)"),
    ),
    *places(
        "runtime/ranks/simulation.py",
        "cli_ranks",
        ("if owner\n", "if True\n"),
        ("parts, plan.memory_limit - nbytes)", "parts, plan.memory_limit)"),
        ("once / division.most,", "len(division.operations),"),
    ),
    *places(
        "stage/decoding.py",
        "stage_decoding",
        ('modules.pop("vae", None)', "pass"),
        ('loaded["vae"] = True', "pass"),
        ("kind = ValueError if isinstance(error, ValueError) else RuntimeError", "kind = RuntimeError"),
    ),
    *places(
        "cli/plan.py",
        "cli",
        ("        print_error(str(error))\n        return 1\n", "        return 0\n"),
        ("if (args.latents is None) == (size is None):", "if False:"),
    ),
    *places(
        "cli/options.py",
        "cli",
        ('    return None if text == "none" else getattr(TilingConfig, text)()', "    return None"),
        ("    if text is None or text in NAMES:\n", "    if text is None:\n"),
    ),
]
