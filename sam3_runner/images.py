"""Image files to pixels, and pixels to the model's input.

What a file is, is told by its first bytes, never by its name; its size is read from its header and held
against the limits before a pixel is decoded. Pillow's plugins are called directly rather than through
`PIL.Image.open`: that tries whatever happens to be registered in the process, and warns or raises by a global
pixel limit. So nothing here changes global state, and any number of threads may decode at once.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageCms, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    STRIPOFFSETS,
    TILELENGTH,
    TILEOFFSETS,
    TILEWIDTH,
    TiffImageFile,
)
from PIL.WebPImagePlugin import WebPImageFile
from pillow_heif import HeifImageFile

from sam3_runner.errors import (
    ImageTooLarge,
    InvalidInput,
    InvalidRegion,
    UndecodableImage,
    UnsupportedImage,
)
from sam3_runner.jpeg_stream import read_layout

READABLE_FORMATS: Final = ("JPEG", "PNG", "WebP", "HEIC/HEIF", "AVIF", "BMP", "TIFF", "GIF")

_READABLE: Final = f"{', '.join(READABLE_FORMATS[:-1])} or {READABLE_FORMATS[-1]}"

# A progressive JPEG of 50 MP takes a pass over all its coefficients per scan, and 25 MB can hold a million
# empty scans. Encoders write 3 to 15.
MAX_JPEG_SCANS: Final = 100

# Pillow reads JPEG segments, PNG chunks and TIFF strips one by one in Python: 25 MB of empty ones would keep it
# busy for half a minute. Encoders write some thousand at most.
MAX_PARTS: Final = 50_000

# libjpeg scales by n/8 while it decodes. Only these have vector code: 3/8 takes longer than 4/8, 6/8 than 8/8.
_JPEG_EIGHTHS: Final = (1, 2, 4)

# Pixels that leave Pillow's memory at once: up to this many stay in the processor's cache.
_STRIP_PX: Final = 1 << 16

# `_profile_shift` of profiles with these primaries: sRGB 0.8, Adobe RGB 8.8, Display P3 (on every iPhone
# photo) 9.0, ProPhoto 20.5. SAM3's own image processor looks at no profile, so small shifts are left as the
# model learned to see them: converting 12 MP costs 120 ms of CPU, more than twice the decoding of the JPEG.
_PROFILE_SHIFT_THAT_MATTERS: Final = 14.0


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest image that is read.

    Attributes:
        max_bytes: Of the file.
        max_pixels: Width times height, as its header states them. GIF and WebP of more than 178 MP are
            refused whatever this says: Pillow refuses them.
    """

    max_bytes: int = 25_000_000
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ValueError(f"Image limits must be at least 1, got {self}.")


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an image file says.

    Attributes:
        format: One of `READABLE_FORMATS`.
        size_hw: Height and width as stored. An EXIF orientation of 5 to 8 swaps the two in the upright image.
    """

    format: str
    size_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Region:
    """The part of an image that is looked at, in the frame of the whole upright image.

    Attributes:
        xyxy: Left, top, right and bottom edge. What lies outside the image is cut off.
        is_relative: They are shares of width and height, 0 to 1, and not pixels.
    """

    xyxy: tuple[float, float, float, float]
    is_relative: bool = False

    def to_px(self, size_hw: tuple[int, int]) -> Rectangle:
        """The pixels of an image of this size that it touches: x0, y0, x1, y1, the last two exclusive.

        Raises:
            InvalidRegion: it has no area, or none inside the image.
        """
        height, width = size_hw
        sides = (width, height, width, height)
        if not all(map(math.isfinite, self.xyxy)):
            raise InvalidRegion(f"Expected four finite numbers for the region, got {self._told()}.")
        edges = [at * side if self.is_relative else at for at, side in zip(self.xyxy, sides, strict=True)]
        # 0.7 · 10 is 7.000000000000001: no reason to take the eighth pixel too.
        edges = [min(max(0.0, round(at, 6)), side) for at, side in zip(edges, sides, strict=True)]
        left, top, right, bottom = edges
        if left >= right or top >= bottom:
            raise InvalidRegion(
                f"The region {self._told()} has no area inside the image of {width}×{height} pixels. "
                "Expected left < right and top < bottom, and a part of the image between them."
            )
        return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)

    def _told(self) -> str:
        return f"[{', '.join(f'{at:g}' for at in self.xyxy)}] ({'relative' if self.is_relative else 'px'})"


Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class ModelImage:
    """An image as the model takes it.

    Attributes:
        pixels: (S, S, 3) uint8 RGB, upright: the whole image, or its region.
        size_hw: Height and width of the upright original, all of it.
        content_hash: Of the file and of the region. Equal ones mean equal pixels, at one input size.
        crop_xyxy_px: What `pixels` shows of the original, in its pixels; the last two are exclusive.
    """

    pixels: npt.NDArray[np.uint8]
    size_hw: tuple[int, int]
    content_hash: bytes
    crop_xyxy_px: Rectangle


def probe_image(data: bytes, limits: ImageLimits | None = None) -> ImageHeader:
    """Read what kind of image this is and how large, without decoding it.

    Args:
        data: The whole file.
        limits: Defaults to `ImageLimits()`.
    Raises:
        UnsupportedImage: not one of `READABLE_FORMATS`.
        UndecodableImage: the header is broken, or there is nothing at all.
        ImageTooLarge: over a limit.
    """
    return _open(data, limits or ImageLimits())[1]


def check_bytes(data: bytes, limits: ImageLimits) -> None:
    """Hold a file against the limits without looking into it.

    Raises:
        UndecodableImage: there is nothing at all.
        ImageTooLarge: too many bytes.
    """
    if not data:
        raise UndecodableImage(f"Expected an image file ({_READABLE}), got 0 bytes. Send the whole file.")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"The image file has {len(data):,} bytes; at most {limits.max_bytes:,} are read. "
            "Send it smaller or more strongly compressed."
        )


def open_image(data: bytes, limits: ImageLimits | None = None) -> npt.NDArray[np.uint8]:
    """Decode an image file as a phone shows it.

    The first frame or page only; EXIF orientation applied; transparent parts laid over white; 16 bits cut to
    the upper 8; CMYK and wide RGB profiles converted to sRGB.

    Args:
        data: The whole file.
        limits: Defaults to `ImageLimits()`.
    Returns:
        (H, W, 3) RGB, upright, C-contiguous and writable.
    Raises:
        UnsupportedImage: not one of `READABLE_FORMATS`, or pixels without an agreed look (float TIFF).
        UndecodableImage: truncated, corrupt, or with a header that its pixels do not bear out.
        ImageTooLarge: over a limit; nothing was decoded.
    """
    file, header = _open_to_decode(data, limits)
    with _codec_errors(header):
        image = _load(file, data, header)
        # Only now: PNG may keep its EXIF behind the pixels, and TIFF turns itself while it loads.
        if (turn := _TURNS.get(_orientation(file))) is not None:
            image = image.transpose(turn)
        return _to_array(image)


def decode_whole(data: bytes, limits: ImageLimits | None = None) -> npt.NDArray[np.uint8]:
    """`open_image`, for the same files to the bit, but in a third of the time for a JPEG."""
    pixels, orientation, _ = _decode(data, limits)
    return _turned(pixels, orientation)


def open_for_model(
    data: bytes, input_size_px: int, limits: ImageLimits | None = None, region: Region | None = None
) -> ModelImage:
    """Decode an image file as `open_image` does, straight to the model's input.

    A JPEG of 12 MP needs no 12 MP of memory for it: it is decoded at the smallest scale of a half, a quarter or
    an eighth whose both sides still cover the input; the original's size is known from the header. Of any
    other file, and of a smaller JPEG, the result is `resize_for_model(open_image(data))`, but that the image is
    turned upright after it was resized: orientations that swap the sides may differ by a level in places.

    A region is cut out at full resolution before anything is resized.

    Args:
        data: The whole file.
        input_size_px: Side S of the model's square input.
        limits: Defaults to `ImageLimits()`.
        region: The part to look at. Defaults to all of the image.
    Raises:
        ImageError: as `open_image`, for the same files.
        InvalidRegion: nothing of the image lies in the region.
    """
    pixels, size_hw = decode_for_model(data, input_size_px, limits, region)
    return ModelImage(pixels, size_hw, content_hash(data, region), crop_of(size_hw, region))


def decode_for_model(
    data: bytes, input_size_px: int, limits: ImageLimits | None = None, region: Region | None = None
) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """`open_for_model` without the hash.

    Returns:
        (S, S, 3) uint8 RGB, upright, and height and width of the upright original.
    """
    stored, orientation, size_hw = _decode(data, limits, input_size_px, region)
    return _turned(resize_for_model(stored, input_size_px), orientation), size_hw


def content_hash(data: bytes, region: Region | None = None) -> bytes:
    """What `ModelImage.content_hash` is of a file: its SHA-256, and the region behind it.

    The region as it was asked for: the pixels that it comes to are only known to whoever has decoded the file.
    """
    digest = hashlib.sha256(data).digest()
    return digest if region is None else digest + struct.pack("<?4d", region.is_relative, *region.xyxy)


def crop_of(size_hw: tuple[int, int], region: Region | None) -> Rectangle:
    """The pixels of an image that are looked at: x0, y0, x1, y1, the last two exclusive.

    Raises:
        InvalidRegion: as `Region.to_px`.
    """
    return (0, 0, size_hw[1], size_hw[0]) if region is None else region.to_px(size_hw)


def resize_for_model(image_rgb: npt.NDArray[np.uint8], input_size_px: int) -> npt.NDArray[np.uint8]:
    """Resize to the model's square input, exactly as the image processor of SAM3 in transformers does.

    Bilinear with antialiasing, no letterbox: the aspect ratio is not kept. Through torchvision, whose uint8
    kernel reads the (H, W, 3) memory as it lies: 4000×3000 to 1008² in 6 ms of CPU (one thread, AVX-512,
    torch 2.14). Pillow 13 takes 36 ms, and differs by one or two levels in up to 4 % of the values.

    Args:
        image_rgb: (H, W, 3).
        input_size_px: Side S of the square.
    Returns:
        (S, S, 3), C-contiguous. Memory of its own.
    """
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8 or 0 in image_rgb.shape:
        raise ValueError(f"Expected (H, W, 3) uint8, got {image_rgb.shape} {image_rgb.dtype}.")
    if image_rgb.shape[:2] == (input_size_px, input_size_px):
        return image_rgb.copy(order="C")
    import torch  # 200 MB that a process which only reads headers need not have
    from torchvision.transforms.v2 import functional as tv

    # torch warns about memory that it may not write to, and cannot take negative strides.
    source = np.require(image_rgb, requirements=["C", "W"])
    chw = torch.from_numpy(source).permute(
        2, 0, 1
    )  # (H, W, 3) -> (3, H, W), a view: channels stay last in memory
    resized = tv.resize(
        chw, [input_size_px, input_size_px], interpolation=tv.InterpolationMode.BILINEAR, antialias=True
    )
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())  # (3, S, S) -> (S, S, 3)


# --- which file is it ---------------------------------------------------------------------------------------


class _Tiff(TiffImageFile):
    """Pillow's, but the limits that its strips and tiles are held against are ours."""

    def _setup(self) -> None:
        for tag in (STRIPOFFSETS, TILEOFFSETS):
            if len(self.tag_v2.get(tag, ())) > MAX_PARTS:
                raise UndecodableImage(_too_many_parts("TIFF"))
        super()._setup()

    def load_prepare(self) -> None:
        # Without Pillow's global limit: `_open` has held the tiles against ours.
        if self._im is None:
            self.im = Image.core.new(self.mode, self._tile_size)  # type: ignore[attr-defined]  # not in its __all__
        super().load_prepare()


_OPENERS: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    # Not Pillow's jpeg_factory: a multi-picture JPEG (MPO) is read as the plain JPEG that it begins with.
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "HEIC/HEIF": HeifImageFile,
    "AVIF": AvifImageFile,
    "BMP": BmpImageFile,
    "TIFF": _Tiff,
    "GIF": GifImageFile,
}

_SIGNATURES: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
)

# ISO 23008-12 (HEIF) and AV1-in-HEIF: brands that name the codec, and those that leave it open.
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})
_HEIF_BRANDS: Final = frozenset(
    {
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"hevx",
        b"hevm",
        b"hevs",
        b"mif1",
        b"msf1",
        b"mif2",
        b"miaf",
    }
)

# Only to name what came; none of these is opened.
_STRANGERS: Final = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"8BPS", "a Photoshop document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\0\0\1\0", "a Windows icon"),
    (b"\x80\x04\x95", "a Python pickle"),
    (b"\x80\x05\x95", "a Python pickle"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"RIFF", "RIFF data that is not WebP"),
)


def _sniff(data: bytes) -> str | None:
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if (
        data[:2] == b"BM"
        and len(data) >= 18
        and struct.unpack_from("<I", data, 14)[0] in (12, 16, 40, 52, 56, 64, 108, 124)
    ):
        return (
            "BMP"  # two letters alone are too weak a sign: the size of its second header must be a known one
        )
    if data[4:8] == b"ftyp":
        return _sniff_brands(data)
    return None


def _sniff_brands(data: bytes) -> str | None:
    box_end = min(struct.unpack_from(">I", data)[0], len(data), 512)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, box_end - 3, 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC/HEIF" if brands & _HEIF_BRANDS else None


def _describe(data: bytes) -> str:
    for signature, name in _STRANGERS:
        if data.startswith(signature):
            return f"This is {name}"
    if data[4:8] == b"ftyp":
        return "This is MP4 or QuickTime video"
    text = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "This is an HTML page"
    if text.startswith((b"<svg", b"<?xml")):
        return "This is SVG or XML"
    return f"The file begins with the bytes {data[:8].hex(' ')}"


def _open(data: bytes, limits: ImageLimits) -> tuple[ImageFile.ImageFile, ImageHeader]:
    check_bytes(data, limits)
    kind = _sniff(data)
    if kind is None:
        raise UnsupportedImage(
            f"Expected {_READABLE}. {_describe(data)}. Convert it to one of these and send that."
        )
    _check_parts(data, kind)
    with _codec_errors(ImageHeader(kind, (0, 0))):
        file = _OPENERS[kind](io.BytesIO(data))
    width, height = file.size
    header = ImageHeader(kind, (height, width))
    if width < 1 or height < 1:
        raise UndecodableImage(
            f"The header of the {kind} states {width}×{height} pixels; at least 1×1 is needed."
        )
    _check_pixels(width, height, "The image has", limits)
    if isinstance(file, TiffImageFile):
        with _codec_errors(header):  # memory is taken for whole tiles, however small the image
            tile_width, tile_height = (int(file.tag_v2.get(tag, 1)) for tag in (TILEWIDTH, TILELENGTH))
        _check_pixels(tile_width, tile_height, "The tiles of the TIFF have", limits)
    return file, header


def _open_to_decode(data: bytes, limits: ImageLimits | None) -> tuple[ImageFile.ImageFile, ImageHeader]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: half-read pictures would pass as whole ones."
        )
    return _open(data, limits or ImageLimits())


def _check_parts(data: bytes, kind: str) -> None:
    """Turn away, before Pillow looks into it, what would cost far more time than its pixels do."""
    parts = 0
    if kind == "JPEG":
        layout = read_layout(data, MAX_PARTS)
        parts = layout.parts
        if layout.scans > MAX_JPEG_SCANS:
            raise UndecodableImage(
                f"The JPEG has {layout.scans} scans; at most {MAX_JPEG_SCANS} are read. "
                "Save it as baseline JPEG."
            )
    elif kind == "PNG":
        parts = sum(1 for _ in islice(_png_chunks(data), MAX_PARTS + 1))
    if parts > MAX_PARTS:
        raise UndecodableImage(_too_many_parts(kind))


def _too_many_parts(kind: str) -> str:
    return f"The {kind} is in more than {MAX_PARTS:,} pieces. Save it anew with an ordinary program."


def _check_pixels(width: int, height: int, what: str, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"{what} {width}×{height} = {width * height:,} pixels; at most {limits.max_pixels:,} are read. "
            "Scale it down and send it again."
        )


@contextmanager
def _codec_errors(header: ImageHeader) -> Iterator[None]:
    """Turn whatever a codec raises into an error about the file.

    On hostile bytes the plugins raise nearly every built-in error there is (`PIL.Image.open` itself swallows
    SyntaxError, IndexError, TypeError and struct.error), and, where warnings are errors, those too. Their
    texts can hold addresses and names of temporary files: they stay in the chain, out of the message.
    """
    try:
        yield
    except (InvalidInput, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(
            f"The {header.format} has far more pixels than are read. Scale it down."
        ) from error
    except Exception as error:
        raise UndecodableImage(_undecodable(header, error)) from error


def _undecodable(header: ImageHeader, error: Exception) -> str:
    reason = str(error).lower()
    short = isinstance(error, EOFError) or any(
        sign in reason for sign in ("truncat", "end of file", "not enough", "insufficient", "too small")
    )
    height, width = header.size_hw
    expected = f"{header.format} of {width}×{height} pixels" if width else header.format
    came = "ends before the picture does" if short else "is damaged"
    return f"Expected a whole {expected}, but the file {came}. Save it anew, or send it again in full."


# --- pixels -------------------------------------------------------------------------------------------------


def _load(file: ImageFile.ImageFile, data: bytes, header: ImageHeader) -> Image.Image:
    """The whole picture in RGB, as stored."""
    _check_extent(file, data, header)
    file.load()
    _check_decoded_size(file, header)
    _check_complete(file, data, header)
    return _to_rgb(file)


def _decode(
    data: bytes,
    limits: ImageLimits | None,
    input_size_px: int | None = None,
    region: Region | None = None,
) -> tuple[npt.NDArray[np.uint8], int, tuple[int, int]]:
    """An image, or a region of it, as stored, and no larger than the model's input needs if there is one.

    Returns:
        The pixels, (h, w, 3); their orientation; height and width of the upright whole at its full size.
    """
    file, header = _open_to_decode(data, limits)
    with _codec_errors(header):
        pixels = _decode_jpeg(file, data, header, input_size_px, region)
        if pixels is not None:
            orientation, size_hw = _orientation(file), header.size_hw
        else:
            image = _load(file, data, header)
            # Only now: PNG may keep its EXIF behind the pixels, and TIFF turns itself while it loads.
            orientation, size_hw = _orientation(file), (image.height, image.width)
            if region is not None:
                image = image.crop(_stored_crop(size_hw, orientation, region))
            pixels = _to_array(image)
    return pixels, orientation, _swapped(size_hw, orientation)


def _decode_jpeg(
    file: ImageFile.ImageFile,
    data: bytes,
    header: ImageHeader,
    input_size_px: int | None,
    region: Region | None,
) -> npt.NDArray[np.uint8] | None:
    """An ordinary JPEG, or a region of it, in RGB; as `_decode`. None for whatever is not ordinary.

    Its decoder takes whatever libjpeg would warn of as an error, broken ends included. Pillow, which says nothing,
    and the checks on what it reads decide such cases; so the same files are refused on either way.
    """
    if header.format != "JPEG" or file.mode not in ("RGB", "L"):
        return None
    crop = _stored_crop(header.size_hw, _orientation(file), region)
    eighths = _jpeg_eighths(header.size_hw, crop, input_size_px)
    height, width = (side * eighths // 8 for side in header.size_hw)
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width
        )
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    left, top, right, bottom = (at * eighths // 8 for at in crop)
    pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
    to_srgb = _to_srgb(file.info.get("icc_profile"), "RGB") if file.mode == "RGB" else None
    if to_srgb is None:
        return pixels
    image = Image.fromarray(pixels)
    ImageCms.applyTransform(image, to_srgb, inPlace=True)
    return _to_array(image)


def _jpeg_eighths(size_hw: tuple[int, int], crop: Rectangle, input_size_px: int | None) -> int:
    """The smallest n of n/8 at which the crop covers the model's input, and all sides and edges divide evenly.

    libjpeg rounds an odd side up; taken for the whole picture, all of it would then be shifted a little.
    """
    if input_size_px is None:
        return 8
    left, top, right, bottom = crop
    shortest = min(right - left, bottom - top)
    for n in _JPEG_EIGHTHS:
        if shortest * n >= 8 * input_size_px and all(at * n % 8 == 0 for at in (*size_hw, *crop)):
            return n
    return 8


# --- is it all there ----------------------------------------------------------------------------------------


def _check_extent(file: ImageFile.ImageFile, data: bytes, header: ImageHeader) -> None:
    """Find, before decoding, what codecs fill up silently: HEIF grids without their last tiles, short TIFFs.

    iPhones store photos as grids, and libheif leaves a tile that it cannot read empty.
    """
    if header.format == "HEIC/HEIF" and not _holds_its_boxes(data):
        raise UndecodableImage(_undecodable(header, EOFError()))
    if isinstance(file, TiffImageFile) and file.tile and file.tile[0].codec_name == "raw":
        width, height = file.size
        boxes = [tile.extents for tile in file.tile if tile.extents is not None]
        covered = sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)
        layers = len(file.getbands()) if file.tag_v2.get(PLANAR_CONFIGURATION) == 2 else 1
        if covered < width * height * layers:
            raise UndecodableImage(_undecodable(header, EOFError()))


def _holds_its_boxes(data: bytes) -> bool:
    """Whether the boxes that HEIF reads (ISO 14496-12, §4.2) end inside the file; cameras append others."""
    at = 0
    while at + 16 <= len(data):
        size, name, large_size = struct.unpack_from(">I4sQ", data, at)
        if name not in (b"ftyp", b"meta", b"mdat", b"free", b"skip", b"moov") or size == 0:
            return True
        at += max(8, large_size if size == 1 else size)
    return at <= len(data)


def _check_decoded_size(file: ImageFile.ImageFile, header: ImageHeader) -> None:
    """A header that lies about the size is found out here at the latest: HEIF learns its size by decoding."""
    height, width = header.size_hw
    if file.size != (width, height):
        raise UndecodableImage(
            f"The header of the {header.format} states {width}×{height} pixels, its data hold "
            f"{file.size[0]}×{file.size[1]}. Save the image anew."
        )


def _check_complete(file: ImageFile.ImageFile, data: bytes, header: ImageHeader) -> None:
    """Find what Pillow lets pass: JPEG and PNG whose pixels end early although the file is closed properly.

    libjpeg paints the missing part grey, Pillow's PNG reader leaves it black. So only a picture with such a
    lower edge is looked at twice.
    """
    if header.format == "JPEG" and _ends_in_jpeg_fill(file) and not _is_complete_jpeg(data):
        raise UndecodableImage(_undecodable(header, EOFError()))
    if isinstance(file, PngImageFile) and _may_lack_rows(file) and not _is_complete_png(data):
        raise UndecodableImage(_undecodable(header, EOFError()))


def _ends_in_jpeg_fill(file: ImageFile.ImageFile) -> bool:
    """True if the last block is flat mid-grey, as coefficients of zero give in any colour space."""
    width, height = file.size
    last_block = np.asarray(file.crop((width - 1 & ~7, height - 1 & ~7, width, height)))
    return bool(last_block.min() >= 127 and last_block.max() <= 128)


def _is_complete_jpeg(data: bytes) -> bool:
    """Decode once more with the end marker cut off: then libjpeg asks for more data instead of painting grey.

    A few bytes of padding stand for what its bit buffer reads ahead; they begin with the rarest codes, so
    that they cannot pass for more than a handful of missing blocks. A progressive file, which needs its end
    marker, cannot be told this way and passes.
    """
    layout = read_layout(data, MAX_PARTS)
    if layout.progressive or layout.scans != 1 or layout.end is None:
        return True
    try:
        JpegImageFile(io.BytesIO(data[: layout.end] + b"\xfe" * 16)).load()
    except OSError:
        return False
    return True


def _may_lack_rows(file: PngImageFile) -> bool:
    if file.info.get("interlace"):
        return True
    width, height = file.size
    return file.crop((0, height - 1, width, height)).getbbox(alpha_only=False) is None


def _is_complete_png(data: bytes) -> bool:
    """Count the bytes that the PNG's pixels unpack to (PNG specification, §9.2), without keeping them."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    missing = 0
    for x0, y0, dx, dy in passes:
        columns, rows = -(-(width - x0) // dx), -(-(height - y0) // dy)
        missing += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    inflate = zlib.decompressobj()
    for name, start, end in _png_chunks(data):
        chunk = data[start:end] if name == b"IDAT" else b""
        while chunk and missing > 0:
            missing -= len(inflate.decompress(chunk, 1 << 20))
            chunk = inflate.unconsumed_tail
    return missing <= len(inflate.flush())


_ADAM7: Final = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk's body."""
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        yield name, at + 8, at + 8 + length
        at += 12 + length


# --- upright RGB --------------------------------------------------------------------------------------------

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS: Final = (5, 6, 7, 8)
_UPSIDE_DOWN: Final = (3, 4, 7, 8)  # once it lies on the right side
_MIRRORED: Final = (2, 3, 6, 7)


def _orientation(file: ImageFile.ImageFile) -> int:
    try:
        return int(file.getexif().get(ExifTag.Orientation, 1))
    except Exception:  # EXIF is hostile input of its own; a picture whose EXIF is broken is shown as stored
        return 1


def _swapped(size_hw: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Of the upright image from what is stored, and the other way round."""
    return size_hw[::-1] if orientation in _SIDEWAYS else size_hw


def _stored_crop(stored_hw: tuple[int, int], orientation: int, region: Region | None) -> Rectangle:
    """Where the region, which is one of the upright image, lies in what is stored: `_turned`, undone."""
    height, width = _swapped(stored_hw, orientation)
    left, top, right, bottom = crop_of((height, width), region)
    if orientation in _UPSIDE_DOWN:
        top, bottom = height - bottom, height - top
    if orientation in _MIRRORED:
        left, right = width - right, width - left
    return (top, left, bottom, right) if orientation in _SIDEWAYS else (left, top, right, bottom)


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Upright, as `Image.transpose` with the orientation's turn: plane by plane is twice as fast."""
    if orientation not in _TURNS:
        return pixels
    turned = np.empty((*_swapped((pixels.shape[0], pixels.shape[1]), orientation), 3), np.uint8)
    for channel in range(3):
        plane = pixels[:, :, channel]
        if orientation in _SIDEWAYS:
            plane = plane.T
        if orientation in _UPSIDE_DOWN:
            plane = plane[::-1]
        if orientation in _MIRRORED:
            plane = plane[:, ::-1]
        turned[:, :, channel] = plane
    return turned


def _to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(H, W, 3) of an RGB image. Strip by strip takes 18 ms for 12 MP, `np.array` of the whole 75."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PX // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(strip)
    return pixels


def _to_rgb(file: ImageFile.ImageFile) -> Image.Image:
    """Any of Pillow's modes to RGB as viewers show it."""
    if file.mode.startswith("I;16") or (file.mode == "I" and isinstance(file, PngImageFile)):
        return _grey_16_bit_to_rgb(file)
    if file.mode in ("I", "F"):
        raise UnsupportedImage(
            f"Expected 8 or 16 bits per channel, got {'32-bit integers' if file.mode == 'I' else 'floats'}: "
            "what is black and what is white in them is not agreed. Save the image with 8 or 16 bits."
        )
    if file.mode == "LAB":
        to_srgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        return ImageCms.applyTransform(file, to_srgb)  # type: ignore[return-value]  # None only when in place
    if file.mode == "CMYK":
        return _through_profile(file, "CMYK") or file.convert("RGB")
    if file.has_transparency_data:
        rgb = _over_white(file)
    else:
        rgb = file if file.mode == "RGB" else file.convert("RGB")
    is_grey = file.mode in ("1", "L", "LA", "La")
    return rgb if is_grey else _through_profile(rgb, "RGB") or rgb


def _grey_16_bit_to_rgb(file: ImageFile.ImageFile) -> Image.Image:
    """Pillow's own conversion clips at 255 instead of scaling."""
    grey = (np.asarray(file).astype(np.uint16) >> 8).astype(np.uint8)
    if isinstance(file, TiffImageFile) and file.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        grey = ~grey  # white is zero; Pillow turns that round for 8 bits only
    return Image.fromarray(grey).convert("RGB")


def _over_white(file: ImageFile.ImageFile) -> Image.Image:
    rgba = (file.convert("LA") if file.mode == "La" else file).convert("RGBA")
    white = Image.new("RGB", file.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    white.info["icc_profile"] = file.info.get("icc_profile")
    return white


def _through_profile(image: Image.Image, mode: str) -> Image.Image | None:
    """To sRGB by the embedded profile; None if there is none, if it is broken, or if it changes little."""
    transform = _to_srgb(image.info.get("icc_profile"), mode)
    if transform is None:
        return None
    try:
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, ValueError):
        return None


def _to_srgb(icc: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    if not icc:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if profile.profile.xcolor_space.strip() != mode:
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and _profile_shift(transform) < _PROFILE_SHIFT_THAT_MATTERS:
            return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # viewers ignore a profile that they cannot read, too
    return transform


def _profile_shift(transform: ImageCms.ImageCmsTransform) -> float:
    """How far a profile moves colours on average, in levels, over a 5×5×5 grid of the cube."""
    levels = np.linspace(0, 255, 5).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(25, 5, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
    return float(np.abs(moved.astype(np.int16) - grid.astype(np.int16)).mean())
