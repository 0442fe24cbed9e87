"""The encoders of H.264, HEVC and ProRes: which one, how it is set up, and its pictures from RGB frames.

Video goes through PyAV, with BT.709 tags and a conversion that agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .places import Frames

if TYPE_CHECKING:
    from av import VideoCodecContext, VideoFrame

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


@dataclass(frozen=True)
class Encoding:
    """An encoder and all that it is set up with; `size` is the height and width of its pictures."""

    encoder: Encoder
    pixel_format: str
    size: tuple[int, int]
    rate: Fraction
    quality: float

    @property
    def bits(self) -> int:
        """Bits of a component."""
        import av

        return av.VideoFormat(self.pixel_format).components[0].bits

    def set_up(self, context: VideoCodecContext) -> None:
        """Set what a context needs to be opened."""
        (context.height, context.width), context.pix_fmt = self.size, self.pixel_format
        context.framerate, context.time_base = self.rate, 1 / self.rate
        context.bit_rate = 0
        context.gop_size = max(1, round(_SECONDS_PER_KEYFRAME * self.rate))
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED_RANGE
        if self.encoder.tag is not None:
            context.codec_tag = self.encoder.tag
        context.options = {**self.encoder.options, **_quality_options(self.encoder.name, self.quality)}

    def open(self) -> VideoCodecContext:
        """A context of its own, opened, with the parameter sets in its `extradata`."""
        import av
        from av.codec.context import Flags

        context = cast("VideoCodecContext", av.CodecContext.create(self.encoder.name, "w"))
        self.set_up(context)
        context.flags |= Flags.global_header
        context.open()
        return context


def choose_encoding(
    codec: str, size: tuple[int, int], itemsize: int, rate: Fraction, quality: float
) -> Encoding:
    """Choose the first encoder that opens for frames of this height and width, of 1 or 2 bytes a component.

    Raises:
        ValueError: None does; each refusal is told.
    """
    import av

    refusals = []
    for encoder in ENCODERS[codec]:
        if encoder.name not in av.codecs_available:
            refusals.append(f"{encoder.name} is not in this PyAV")
            continue
        pixel_format = encoder.format_8bit if itemsize == 1 else encoder.format_16bit
        padded = (size[0] + -size[0] % encoder.size_step[0], size[1] + -size[1] % encoder.size_step[1])
        encoding = Encoding(encoder, pixel_format, padded, rate, quality)
        try:
            encoding.open()
        except av.FFmpegError as error:
            refusals.append(f"{encoder.name} refuses: {error.strerror}")
        else:
            return encoding
    raise ValueError(f"no encoder of {codec} takes {size[1]}x{size[0]} frames: {'; '.join(refusals)}")


def _quality_options(name: str, quality: float) -> dict[str, str]:
    if name.startswith("lib"):
        return {"crf": f"{quality:g}"}
    if name.endswith("_videotoolbox"):
        # Its scale runs from 1 to 100 (best), in units of FF_QP2LAMBDA = 118.
        return {"flags": "+qscale", "global_quality": str(118 * max(1, round(100 - quality / 51 * 100)))}
    return {}


def converter(encoding: Encoding, dtype: np.dtype[Any]) -> Callable[[Frames], VideoFrame]:
    """Return the conversion of frames (H, W, 3) to BT.709 in limited range, padded to the encoder's sizes."""
    import av

    height, width = encoding.size
    to_8bit = dtype == np.uint16 and encoding.pixel_format == "yuv420p"
    source_format = "rgb24" if to_8bit or dtype == np.uint8 else "rgb48le"
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(
            width=width, height=height, format=av.VideoFormat(source_format), time_base=Fraction(1, 1)
        ),
        graph.add("scale", _SCALE),
        graph.add("format", encoding.pixel_format),
        graph.add("setparams", _TAGS),
        graph.add("buffersink"),
    ).configure()

    def convert(pixels: Frames) -> VideoFrame:
        missing = height - pixels.shape[0], width - pixels.shape[1]
        if any(missing):
            pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        if to_8bit:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        elif source_format == "rgb48le":
            pixels = pixels - pixels // 257  # swscale takes 255 * 256, not 65535, for white.
        graph.push(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source_format))
        return cast("VideoFrame", graph.pull())

    return convert
