"""From a stored picture of any kind to what a viewer shows: red, green and blue of eight bits, upright, opaque.

What decoding takes in memory is worked out from the picture's header before anything is decoded.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

MOST_BYTES = 500 * 10**6
"""Memory that any one picture may take while it becomes a crop."""
WHITE = (255, 255, 255)

# its own limit of pixels warns of pictures that fit, and `MOST_BYTES` refuses earlier what does not
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF data, and of palettes with transparent colours

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Of a pixel as Pillow keeps it; of all other modes 4."""
_FORMAT_BYTES = {"PNG": 0, "BMP": 0, "PPM": 0, "JPEG": 0, "MPO": 0, "TIFF": 4, "GIF": 8}
"""That a format's decoder takes for a pixel besides, where the header says no more; of all other formats 16."""


def opened(stored: Path | BinaryIO) -> Image.Image:
    """A picture whose header is read, of any format that Pillow knows but PostScript, which another program would run.

    Raises:
        OSError: It is none, or can't be opened. Pillow raises other errors, too, for some damage.
    """
    return Image.open(stored, formats=_formats())


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def as_shown(
    picture: Image.Image,
    side: int = 0,
    background: Sequence[int] = WHITE,
    levels: tuple[float, float] | None = None,
) -> Image.Image:
    """A stored picture as a viewer shows it: its first frame, turned as its EXIF data say, as RGB.

    Args:
        picture: As Pillow opened it.
        side: A JPEG that would not fit into memory is decoded at a fraction of its size, but to no fewer than twice
            this many pixels along its shorter side.
        background: Colour behind transparent parts.
        levels: Of pictures with more than 8 bits a channel, the values that become black and white.

    Raises:
        ValueError: The picture would take more than `MOST_BYTES`, or has more than 8 bits and no levels are given.
        OSError: It is damaged. Pillow raises other errors, too, for some damage.
    """
    check_memory(picture, side)
    picture.load()
    if is_deep(picture):
        shown = _of_levels(picture, levels)
    elif picture.has_transparency_data:
        transparent = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        shown = Image.new("RGB", picture.size, tuple(background))
        shown.paste(transparent, (0, 0), transparent)
    else:
        shown = picture if picture.mode == "RGB" else picture.convert("RGB")
    turn = _TURNS.get(orientation(picture))
    if turn is None:
        return shown
    _check_bytes(8 * shown.width * shown.height)
    return shown.transpose(turn)


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture has more than 8 bits a channel, of which Pillow's conversion would keep the lowest."""
    return picture.mode[0] in "IF"


def is_animated(picture: Image.Image) -> bool:
    """Whether a picture has several frames or pages; phones' photographs (MPO) hold a second one of another kind."""
    return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))


def orientation(picture: Image.Image) -> int:
    """How the picture is turned, as EXIF numbers it: 1 … 8; 1 where that is not said or can't be read."""
    described = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}
    if picture._exif is None and described.isdisjoint(picture.info):
        return 1
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a viewer shows a picture whose EXIF data are broken; Pillow's errors for them are of any kind
        return 1
    return value if isinstance(value, int) else 1


def check_memory(picture: Image.Image, side: int) -> None:
    """Refuse what takes too much memory, by its header; let a JPEG be decoded smaller first: see `as_shown`."""
    mode, stored_as, whole = picture.mode, picture.format, picture.width * picture.height
    if stored_as is None:  # decoded already, or made here
        return
    beside = _FORMAT_BYTES.get(stored_as, 16)
    if picture.info.get("progressive"):
        beside = 2 * len(picture.getbands())  # a JPEG's coefficients, which are kept at full size
    own = _MODE_BYTES.get(mode, 4)
    if is_deep(picture):
        own += 16
    elif picture.has_transparency_data:
        own += 4 if mode == "RGBA" else 8
    elif mode != "RGB":
        own += 4
    if stored_as in ("JPEG", "MPO"):
        own += 4 * (orientation(picture) > 1)
        if side and whole * (own + beside) > MOST_BYTES:
            shorter = min(picture.size)
            picture.draft(None, tuple(2 * side * length // shorter for length in picture.size))  # type: ignore[arg-type]
    _check_bytes(whole * beside + picture.width * picture.height * own)


def _check_bytes(needed: int) -> None:
    if needed > MOST_BYTES:
        raise ValueError(f"too large: decoding takes more than {MOST_BYTES // 10**6} MB of memory; make it smaller")


def _of_levels(picture: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    if levels is None:
        raise ValueError(f"mode {picture.mode}: more than 8 bits a channel")
    values_hw = np.asarray(picture, dtype=np.float32)
    low, high = levels
    shares_hw = np.nan_to_num((values_hw - np.float32(low)) / np.float32(high - low))
    return Image.fromarray((shares_hw.clip(0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)).convert("RGB")
