"""Each format of video files as a function that consumes batches of frames: H.264, HEVC, ProRes, PNG, .npy.

Video goes through PyAV, with BT.709 tags and a conversion that agrees with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av import VideoCodecContext, VideoFrame

Frames = npt.NDArray[Any]

# Fragments reach the disk as they are made; closing turns the file into a plain one (FFmpeg 7.1 on).
# Negative offsets let B-frames start at time 0 without an edit list, which a growing file cannot have.
_MUXER_OPTIONS = {
    "movflags": "+hybrid_fragmented+frag_keyframe+negative_cts_offsets",
    "flush_packets": "1",
}
_SECONDS_PER_KEYFRAME = 2
_BT709, _LIMITED_RANGE = 1, 1
_TAGS = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
# Position 0: chroma lies at even columns, where H.264, HEVC and ProRes players take it to be.
_SCALE = (
    "in_range=pc:out_range=tv:out_color_matrix=bt709:out_h_chr_pos=0:"
    "flags=bicubic+accurate_rnd+full_chroma_inp"
)


@dataclass(frozen=True)
class Encoder:
    """An encoder of FFmpeg: the formats it takes, the step its sizes need, and its fixed options."""

    name: str
    format_8bit: str
    format_16bit: str
    size_step: tuple[int, int] = (2, 2)  # of height and width
    tag: str | None = None
    options: dict[str, str] = field(default_factory=dict)


# In order of preference: a Mac's hardware, then software.
ENCODERS = {
    "h264": (
        Encoder("h264_videotoolbox", "yuv420p", "yuv420p", options={"profile": "high"}),
        Encoder("libx264", "yuv420p", "yuv420p", options={"preset": "medium"}),
    ),
    "hevc": (
        Encoder("hevc_videotoolbox", "yuv420p", "p010le", tag="hvc1"),
        Encoder(
            "libx265",
            "yuv420p",
            "yuv420p10le",
            tag="hvc1",
            options={"preset": "medium", "x265-params": "log-level=none"},
        ),
    ),
    "prores": (
        Encoder(
            "prores_ks",
            "yuv422p10le",
            "yuv422p10le",
            size_step=(1, 2),
            options={"profile": "hq", "vendor": "apl0"},
        ),
    ),
}


def save_video(path: str, batches: Iterator[Frames], codec: str, rate: Fraction, quality: float) -> None:
    """Encode batches of frames (f, H, W, 3) as .mp4 or .mov until they end."""
    import av

    first = next(batches, None)
    if first is None:
        return
    encoder, pixel_format = _first_that_opens(codec, first, rate, quality)
    with av.open(path, "w", options=_MUXER_OPTIONS) as container:
        stream = container.add_stream(encoder.name, rate=rate)
        _configure(stream.codec_context, encoder, pixel_format, first, rate, quality)
        convert = _converter(first, encoder.size_step, pixel_format)
        for index, pixels in enumerate(frame for batch in chain([first], batches) for frame in batch):
            frame = convert(pixels)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_npy(path: str, batches: Iterator[Frames]) -> None:
    """Write batches of frames as one array (frames, H, W, 3), which is whole after every batch."""
    with open(path, "wb") as file:
        frames = 0
        for batch in batches:
            header = {"descr": batch.dtype.str, "fortran_order": False}
            if frames == 0:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, *batch.shape[1:])})
            file.write(batch.tobytes())
            file.flush()
            frames += len(batch)
            # The header leaves room for its first axis to grow.
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (frames, *batch.shape[1:])})
            file.seek(0, os.SEEK_END)


def save_png(pattern: str, batches: Iterator[Frames]) -> None:
    """Write frames as PNG of 8 or 16 bits, numbered from 0."""
    for index, frame in enumerate(frame for batch in batches for frame in batch):
        with open(pattern % index, "wb") as file:
            file.write(_png(frame))


def _png(pixels: Frames) -> bytes:
    import av

    height, width, _ = pixels.shape
    pixel_format = "rgb24" if pixels.dtype == np.uint8 else "rgb48be"
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = width, height, pixel_format
    context.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pixel_format)
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))


def _first_that_opens(codec: str, frames: Frames, rate: Fraction, quality: float) -> tuple[Encoder, str]:
    import av

    refusals = []
    for encoder in ENCODERS[codec]:
        if encoder.name not in av.codecs_available:
            refusals.append(f"{encoder.name} is not in this PyAV")
            continue
        pixel_format = encoder.format_8bit if frames.dtype == np.uint8 else encoder.format_16bit
        try:
            context = cast("VideoCodecContext", av.CodecContext.create(encoder.name, "w"))
            _configure(context, encoder, pixel_format, frames, rate, quality)
            context.open()
        except av.FFmpegError as error:
            refusals.append(f"{encoder.name} refuses: {error.strerror}")
        else:
            return encoder, pixel_format
    height, width, _ = frames.shape[1:]
    raise ValueError(f"no encoder of {codec} takes {width}x{height} frames: {'; '.join(refusals)}")


def _configure(
    context: VideoCodecContext,
    encoder: Encoder,
    pixel_format: str,
    frames: Frames,
    rate: Fraction,
    quality: float,
) -> None:
    height, width, _ = _pad(frames[0], encoder.size_step).shape
    context.width, context.height, context.pix_fmt = width, height, pixel_format
    context.framerate, context.time_base = rate, 1 / rate
    context.bit_rate = 0
    context.gop_size = max(1, round(_SECONDS_PER_KEYFRAME * rate))
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED_RANGE
    if encoder.tag is not None:
        context.codec_tag = encoder.tag
    context.options = {**encoder.options, **_quality_options(encoder.name, quality)}


def _quality_options(name: str, quality: float) -> dict[str, str]:
    if name.startswith("lib"):
        return {"crf": f"{quality:g}"}
    if name.endswith("_videotoolbox"):
        # Its scale runs from 1 to 100 (best), in units of FF_QP2LAMBDA = 118.
        return {"flags": "+qscale", "global_quality": str(118 * max(1, round(100 - quality / 51 * 100)))}
    return {}


def _pad(pixels: Frames, step: tuple[int, int]) -> Frames:
    height, width, _ = pixels.shape
    if height % step[0] == width % step[1] == 0:
        return pixels
    return np.pad(pixels, ((0, -height % step[0]), (0, -width % step[1]), (0, 0)), mode="edge")


def _converter(
    frames: Frames, size_step: tuple[int, int], pixel_format: str
) -> Callable[[Frames], VideoFrame]:
    """Return the conversion of frames (H, W, 3) to BT.709 in limited range, padded to the encoder's sizes."""
    import av

    height, width, _ = _pad(frames[0], size_step).shape
    to_8bit = frames.dtype == np.uint16 and pixel_format == "yuv420p"
    source_format = "rgb24" if to_8bit or frames.dtype == np.uint8 else "rgb48le"
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(
            width=width, height=height, format=av.VideoFormat(source_format), time_base=Fraction(1, 1)
        ),
        graph.add("scale", _SCALE),
        graph.add("format", pixel_format),
        graph.add("setparams", _TAGS),
        graph.add("buffersink"),
    ).configure()

    def convert(pixels: Frames) -> VideoFrame:
        pixels = _pad(pixels, size_step)
        if to_8bit:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        elif source_format == "rgb48le":
            pixels = pixels - pixels // 257  # swscale takes 255 * 256, not 65535, for white.
        graph.push(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source_format))
        return cast("VideoFrame", graph.pull())

    return convert
