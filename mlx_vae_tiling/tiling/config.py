"""Tile sizes and overlaps, in pixels and frames of the output."""

from dataclasses import dataclass

from mlx_vae_tiling.arguments import require, whole


def _check_tile(config: object, unit: str, minimum: int, multiple: int) -> None:
    size_name, overlap_name = f"tile_size_in_{unit}", f"tile_overlap_in_{unit}"
    size, overlap = (whole(name, getattr(config, name)) for name in (size_name, overlap_name))
    for name, value in ((size_name, size), (overlap_name, overlap)):
        object.__setattr__(config, name, value)  # NumPy's is written in another way
    if size < minimum:
        raise ValueError(f"{size_name} must be at least {minimum}, got {size}")
    if overlap < 0:
        raise ValueError(f"{overlap_name} must be at least 0, got {overlap}")
    for name, value in ((size_name, size), (overlap_name, overlap)):
        if value % multiple:
            lower = value - value % multiple
            raise ValueError(
                f"{name} must be divisible by {multiple}, got {value}; use {lower} or {lower + multiple}"
            )
    if overlap >= size:
        raise ValueError(f"{overlap_name} must be less than {size_name}, got {overlap} and {size}")


@dataclass(frozen=True)
class SpatialTilingConfig:
    """Tiles in height and width.

    Attributes:
        tile_size_in_pixels: At least 64, divisible by 32.
        tile_overlap_in_pixels: Pixels that neighbouring tiles share: divisible by 32, below the size.

    Raises:
        ValueError: If a rule above is broken.
    """

    tile_size_in_pixels: int
    tile_overlap_in_pixels: int = 0

    def __post_init__(self) -> None:
        _check_tile(self, "pixels", minimum=64, multiple=32)


@dataclass(frozen=True)
class TemporalTilingConfig:
    """Tiles in time.

    Attributes:
        tile_size_in_frames: At least 16, divisible by 8.
        tile_overlap_in_frames: Frames that neighbouring tiles share: divisible by 8, below the size.

    Raises:
        ValueError: If a rule above is broken.
    """

    tile_size_in_frames: int
    tile_overlap_in_frames: int = 0

    def __post_init__(self) -> None:
        _check_tile(self, "frames", minimum=16, multiple=8)


@dataclass(frozen=True)
class TilingConfig:
    """Tiles in space and time; an axis without a config is not split.

    Attributes:
        spatial_config: Tiles in height and width.
        temporal_config: Tiles in time.

    Raises:
        TypeError: If one is something else.
    """

    spatial_config: SpatialTilingConfig | None = None
    temporal_config: TemporalTilingConfig | None = None

    def __post_init__(self) -> None:
        spatial, temporal = self.spatial_config, self.temporal_config
        require("spatial_config", spatial, "a SpatialTilingConfig or None", SpatialTilingConfig, None)
        require("temporal_config", temporal, "a TemporalTilingConfig or None", TemporalTilingConfig, None)

    @classmethod
    def default(cls) -> "TilingConfig":
        """Tiles of 512 pixels overlapping by 64, and of 64 frames overlapping by 24."""
        return cls(SpatialTilingConfig(512, 64), TemporalTilingConfig(64, 24))

    @classmethod
    def spatial_only(cls, tile_size: int = 512, overlap: int = 64) -> "TilingConfig":
        """Tiles in space only, for short videos of a large size; both arguments in pixels."""
        return cls(spatial_config=SpatialTilingConfig(tile_size, overlap))

    @classmethod
    def temporal_only(cls, tile_size: int = 64, overlap: int = 24) -> "TilingConfig":
        """Tiles in time only, for long videos of a small size; both arguments in frames."""
        return cls(temporal_config=TemporalTilingConfig(tile_size, overlap))

    @classmethod
    def aggressive(cls) -> "TilingConfig":
        """Least memory: tiles of 256 pixels overlapping by 64, and of 32 frames overlapping by 8."""
        return cls(SpatialTilingConfig(256, 64), TemporalTilingConfig(32, 8))

    @classmethod
    def conservative(cls) -> "TilingConfig":
        """Least recomputation: tiles of 768 pixels overlapping by 64, and of 96 frames overlapping by 24."""
        return cls(SpatialTilingConfig(768, 64), TemporalTilingConfig(96, 24))

    @classmethod
    def auto(
        cls,
        height: int,
        width: int,
        num_frames: int,
        spatial_threshold: int = 512,
        temporal_threshold: int = 65,
    ) -> "TilingConfig | None":
        """Choose tiles for a video.

        Args:
            height: Pixels of the output.
            width: Pixels of the output.
            num_frames: Frames of the output.
            spatial_threshold: Largest height and width in pixels that are not tiled.
            temporal_threshold: Largest number of frames that is not tiled.

        Returns:
            None when no threshold is exceeded; `aggressive()` when the float32 output exceeds 2 GiB, or
            768 * 1024 pixels with more than 100 frames; else tiles that shrink as the video grows.

        Example:
            >>> TilingConfig.auto(576, 1024, 97).temporal_config
            TemporalTilingConfig(tile_size_in_frames=64, tile_overlap_in_frames=24)
        """
        height, width = whole("height", height), whole("width", width)
        num_frames = whole("num_frames", num_frames)
        spatial_threshold = whole("spatial_threshold", spatial_threshold)
        temporal_threshold = whole("temporal_threshold", temporal_threshold)
        tile_space = max(height, width) > spatial_threshold
        tile_time = num_frames > temporal_threshold
        if not (tile_space or tile_time):
            return None
        output_bytes = 4 * 3 * num_frames * height * width
        if output_bytes > 2 * 1024**3 or (height * width > 768 * 1024 and num_frames > 100):
            return cls.aggressive()
        return cls(
            SpatialTilingConfig(512 if 768 < max(height, width) <= 1024 else 384, 64) if tile_space else None,
            _auto_temporal(num_frames) if tile_time else None,
        )


def _auto_temporal(num_frames: int) -> TemporalTilingConfig:
    if num_frames > 200:
        return TemporalTilingConfig(32, 8)
    if num_frames > 100:
        return TemporalTilingConfig(48, 16)
    return TemporalTilingConfig(64, 24)
