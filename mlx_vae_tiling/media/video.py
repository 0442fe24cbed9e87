"""Frames to files: .mp4 (H.264, HEVC), .mov (ProRes), a sequence of PNG images, or one .npy array.

Each format is a module that says how many frames an interrupted output still holds and saves those that
follow; a thread writes beside whatever makes the frames.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from fractions import Fraction
from numbers import Real

from mlx_vae_tiling.arguments import require, told

from .audio import open_sound
from .movie import Movie, frames_in_movie, open_movie
from .npy import frames_in_npy, open_npy
from .places import partial_path, same_file
from .png import first_png, frames_in_png, numbered, numbers, open_png
from .writer import VideoWriter

_CODECS = {".mp4": ("h264", "hevc"), ".mov": ("prores", "h264", "hevc")}
# FFmpeg 8.1, PyAV 17.1. The muxer of earlier ones leaves a video made in fragments empty when it is closed.
_LIBAVFORMAT = (62, 12)
_NTSC_RATES = tuple(Fraction(1000 * rate, 1001) for rate in (24, 30, 48, 60, 120))


def open_video(
    path: str | os.PathLike[str],
    *,
    fps: float | str | Fraction = 24,
    codec: str | None = None,
    quality: float | None = None,
    overwrite: bool = False,
    resume: bool = False,
    audio: str | os.PathLike[str] | None = None,
    audio_start_seconds: float = 0.0,
    clip_seconds: float | None = None,
) -> VideoWriter:
    """Open a file that takes frames while they are being made.

    `.mp4` and `.mov` are converted to and tagged as BT.709 in limited range. A Mac's hardware encoder is used
    where it opens. 4:2:0 video has no odd sizes, so the last row or column is repeated to make height and
    width even (ProRes: only the width); PNG and `.npy` are exact.

    Until it is complete, an output lies beside its name: `clip.partial.mp4`, `frame_00000.partial.png`. A
    video can be played there while it grows. However the process ends, `resume=True` continues it: frames
    that are kept are neither wanted nor encoded again. Of a killed H.264 or HEVC video those are missing
    that the encoder was still looking at, about 50, and up to 2 s of an unfinished group of pictures.

    Args:
        path: `.mp4`, `.mov`, `.npy`, `frame_%05d.png`, or a directory for PNG (an existing one, or with "/").
        fps: Frames per second; 23.976 means 24000/1001, and so on. PNG and `.npy` have none.
        codec: "h264" (default in `.mp4`), "hevc", or in `.mov` "prores" (default there).
        quality: Constant rate factor of H.264 and HEVC, from 1, best, to 51; 18, the default, looks lossless.
        overwrite: Whether an output of this name is replaced, once the new one is complete, and one that was
            left unfinished is begun again.
        resume: Whether an unfinished output is continued, if there is one: write the frames from
            `VideoWriter.frames_kept` on. It wins over `overwrite`.
        audio: A file whose sound goes into `.mp4` and `.mov`: copied where they take it, AAC otherwise.
        audio_start_seconds: Where in it the first frame lies. It ends with the last frame.
        clip_seconds: Length of the clip that the whole of the sound belongs to, which is checked at once;
            by default it is checked at the end, against the frames.

    Returns:
        A context manager with `write(frames)`.

    Raises:
        FileExistsError: There is an output of this name, finished or not.
        ImportError: PyAV is needed and not installed, or, for .mp4 and .mov, too old.
        OSError: The place to write to is missing or not writable, or there is no such file with sound.
        ValueError: The suffix, codec, rate, quality or sound cannot be used, or do not fit what is continued.

    Warns:
        AudioWarning: The sound is longer or shorter than the clip.

    Example:
        >>> with open_video("clip.mp4", fps="24000/1001") as video:
        ...     for frames in decode_frames(decoder, latents):
        ...         video.write(frames)
    """
    path, kind = os.fspath(path), _kind(os.fspath(path))
    rate = frame_rate(fps)
    if kind in _CODECS:
        movie = _movie(path, kind, codec, rate, quality)
        _check_writable(path)
        if audio is not None:
            if same_file(audio, path):
                raise ValueError(f"audio must be another file than the output, got {path} for both")
            sound = open_sound(audio, audio_start_seconds, kind)
            movie = replace(movie, sound=sound, clip_seconds=clip_seconds)
        output = open_movie(os.path.realpath(path), movie, resume=resume, overwrite=overwrite)
    else:
        _check_unused(path, codec, quality, audio)
        _check_writable(path)
        if kind == ".npy":
            output = open_npy(os.path.realpath(path), resume=resume, overwrite=overwrite)
        else:
            _check_av(path)
            output = open_png(_pattern(path, create=True), resume=resume, overwrite=overwrite)
    return VideoWriter(output.path if kind == ".png" else path, output.save, output)


def unfinished_frames(path: str | os.PathLike[str]) -> tuple[str, int] | None:
    """Where an unfinished output of this name is kept, and how many of its frames; None if there is none.

    What a kill has cut off at its end is removed, so it must not be asked while the output is written.
    """
    path, kind = _named(path)
    count = {".npy": frames_in_npy, ".png": frames_in_png}.get(kind, frames_in_movie)(path)
    return (partial_path(path), count) if count else None


def discard_unfinished(path: str | os.PathLike[str]) -> None:
    """Removes what lies beside an output of this name, for the process that has written it."""
    path, kind = _named(path)
    beside = partial_path(path)
    for cut in [numbered(beside, number) for number in numbers(beside)] if kind == ".png" else [beside]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(cut)


def _named(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The path of an output as its writer has it, and its kind."""
    path, kind = os.fspath(path), _kind(os.fspath(path))
    return _pattern(path, create=False) if kind == ".png" else os.path.realpath(path), kind


def first_file(path: str | os.PathLike[str]) -> str:
    """The file of an output, or the first one of a sequence of PNG images, under its own name.

    Raises:
        ValueError: The path cannot be used.
    """
    path, kind = _named(path)
    return first_png(path) if kind == ".png" else path


def frame_rate(fps: float | str | Fraction) -> Fraction:
    """Return a frame rate as a fraction, taking 23.976, 29.97 and their like for n * 1000/1001.

    Raises:
        ValueError: fps is not a number, or not between 0.01 and 1000.

    Example:
        >>> frame_rate(23.976)
        Fraction(24000, 1001)
    """
    try:
        rate = Fraction(str(fps))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"fps must be a number or a fraction such as 24000/1001, got {told(fps)}") from error
    if not Fraction(1, 100) <= rate <= 1000:
        raise ValueError(f"fps must be between 0.01 and 1000, got {told(fps)}")
    near = [ntsc for ntsc in _NTSC_RATES if abs(ntsc - rate) < Fraction(1, 200)]
    return near[0] if near else rate.limit_denominator(1001)


def _kind(path: str) -> str:
    """The suffix of a file, ".png" of a folder."""
    suffix = os.path.splitext(path)[1].lower()
    known = suffix in (*_CODECS, ".npy", ".png")
    if path.endswith(("/", os.sep)) or (os.path.isdir(path) and not known):
        return ".png"
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "a directory has the name of the file to write", path)
    if not known:
        raise ValueError(f"path must end in .mp4, .mov, .npy, %05d.png or / (PNG in a directory), got {path}")
    return suffix


def _pattern(path: str, create: bool) -> str:
    if not (path.endswith(("/", os.sep)) or os.path.isdir(path)):
        return path
    if create:
        os.makedirs(path, exist_ok=True)
    return os.path.join(path, "frame_%05d.png")


def _movie(path: str, suffix: str, codec: str | None, rate: Fraction, quality: float | None) -> Movie:
    codec = codec or _CODECS[suffix][0]
    if codec not in _CODECS[suffix]:
        raise ValueError(f"codec of {suffix} must be one of {', '.join(_CODECS[suffix])}, got {told(codec)}")
    if codec == "prores":
        _check_unused(path, None, quality, None)
    require("quality", quality, "a number or None", Real, None)
    if quality is not None and not 1 <= quality <= 51:
        raise ValueError(f"quality must be between 1 (best) and 51, got {quality}")
    _check_av(path)
    _check_muxer(path)
    return Movie(suffix[1:], codec, rate, quality or 18)


def _check_unused(path: str, codec: str | None, quality: float | None, audio: object) -> None:
    if codec is not None or quality is not None:
        raise ValueError(
            f"codec and quality are for H.264 and HEVC, leave them out for {path}: "
            f"{told(codec)}, {told(quality)}"
        )
    if audio is not None:
        raise ValueError(f"audio is for .mp4 and .mov, leave it out for {path}: {told(audio)}")


def _check_av(path: str) -> None:
    try:
        import av  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"writing {path} needs PyAV: pip install 'mlx_vae_tiling[video]'"
        ) from error


def _check_muxer(path: str) -> None:
    import av

    if av.library_versions["libavformat"] < _LIBAVFORMAT:
        raise ImportError(
            f"writing {path} needs PyAV 17.1 or later, with FFmpeg 8.1: pip install -U 'av>=17.1'; "
            f"this is {av.__version__}"
        )


def _check_writable(path: str) -> None:
    target = os.path.realpath(path) if os.path.islink(path) else path
    parent = os.path.dirname(target.rstrip("/" + os.sep) or target) or "."
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "no such directory to write in, create it first", parent)
    if not os.access(path if os.path.exists(path) else parent, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable, choose another place", path)
