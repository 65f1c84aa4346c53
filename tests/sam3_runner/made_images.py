"""Image files made at test time: one of each kind that is read, and one of each way to be broken.

All show the same scene, four flat quarters, so that a wrong turn, colour or crop is seen whatever the
compression.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image

from tests.sam3_runner.color_profiles import cmyk_profile

HEIGHT, WIDTH = 64, 96

# top left, top right, bottom left, bottom right
QUARTERS = ((200, 40, 40), (40, 160, 60), (40, 60, 200), (230, 220, 60))
GREY_QUARTERS = ((20,) * 3, (90,) * 3, (160,) * 3, (230,) * 3)

Pixels = npt.NDArray[np.uint8]


def scene(quarters: tuple[tuple[int, ...], ...] = QUARTERS) -> Pixels:
    """The scene itself, (H, W, 3)."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for index, color in enumerate(quarters):
        row, column = divmod(index, 2)
        pixels[row * HEIGHT // 2 :, column * WIDTH // 2 :][: HEIGHT // 2, : WIDTH // 2] = color
    return pixels


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(scene()).convert(mode)


def grey_picture() -> Image.Image:
    return Image.fromarray(scene(GREY_QUARTERS)[:, :, 0])


def save(image: Image.Image, file_format: str, **options: Any) -> bytes:
    if file_format == "HEIF":
        pillow_heif.register_heif_opener()  # for writing; reading must do without, which a test holds
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


# --- each kind ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A way to make a file, and what must come out of it."""

    make: Callable[[], bytes]
    format: str
    tolerance: int = 0
    shows: Callable[[], Pixels] = scene


def _grey() -> Pixels:
    return scene(GREY_QUARTERS)


def _over_white() -> Pixels:
    """The scene, fully transparent in its last quarter and half transparent in its first."""
    pixels = scene().astype(np.float64)
    alpha = np.asarray(transparency(), np.float64)[:, :, None] / 255
    return np.round(pixels * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _last_quarter_white() -> Pixels:
    pixels = scene()
    pixels[HEIGHT // 2 :, WIDTH // 2 :] = 255
    return pixels


def _black_and_white() -> Pixels:
    return scene(((0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3))


def away_from_edges(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Where lossy codecs must get the scene right: 12 pixels or more from where two quarters meet."""
    away = np.ones(shape[:2], dtype=bool)
    if shape[:2] == (HEIGHT, WIDTH):
        away[HEIGHT // 2 - 12 : HEIGHT // 2 + 12] = False
        away[:, WIDTH // 2 - 12 : WIDTH // 2 + 12] = False
    return away


def transparency() -> Image.Image:
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[HEIGHT // 2 :, WIDTH // 2 :] = 0
    alpha[: HEIGHT // 2, : WIDTH // 2] = 128
    return Image.fromarray(alpha)


def _with_alpha() -> Image.Image:
    image = picture("RGBA")
    image.putalpha(transparency())
    return image


def _palette_with_hole() -> bytes:
    image = picture().quantize(8)
    hole = image.getpixel((WIDTH - 1, HEIGHT - 1))
    return save(image, "PNG", transparency=hole)


def _animation(file_format: str, **options: Any) -> bytes:
    second = Image.new("RGB", (WIDTH, HEIGHT), "black")
    return save(picture(), file_format, save_all=True, append_images=[second], duration=100, **options)


def png(samples: npt.NDArray[Any], *, interlaced: bool = False) -> bytes:
    """A PNG of 8- or 16-bit samples, (H, W) or (H, W, 3); Pillow writes neither 16-bit RGB nor Adam7."""
    height, width = samples.shape[:2]
    depth = samples.dtype.itemsize * 8
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    passes = [samples[y::dy, x::dx] for x, y, dx, dy in steps] if interlaced else [samples]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for part in passes for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if samples.ndim == 3 else 0, 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _sixteen_bits(pixels: Pixels) -> npt.NDArray[np.uint16]:
    return pixels.astype(np.uint16) * 257


def _inks_to_lab(cyan: float, magenta: float, yellow: float, black: float) -> tuple[float, float, float]:
    return 100 * (1 - black) * (1 - (cyan + magenta + yellow) / 6), 0, 0


def _all_cyan_with_profile() -> bytes:
    return save(
        Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)), "TIFF", icc_profile=cmyk_profile(_inks_to_lab)
    )


def _grey_of_cyan_profile() -> Pixels:
    return np.full((HEIGHT, WIDTH, 3), 206, np.uint8)  # sRGB of L* = 100 · 5/6


def _white_is_zero_tiff() -> bytes:
    return save(grey_picture(), "TIFF", tiffinfo={262: 0})


KINDS: dict[str, Made] = {
    "jpeg": Made(lambda: save(picture(), "JPEG", quality=95), "JPEG", 4),
    "jpeg_progressive": Made(lambda: save(picture(), "JPEG", quality=95, progressive=True), "JPEG", 4),
    "jpeg_grey": Made(lambda: save(grey_picture(), "JPEG", quality=95), "JPEG", 4, _grey),
    "jpeg_cmyk": Made(lambda: save(picture("CMYK"), "JPEG", quality=95), "JPEG", 4),
    "jpeg_multi_picture": Made(lambda: _animation("MPO", quality=95), "JPEG", 4),
    "jpeg_with_a_video_behind_it": Made(
        lambda: save(picture(), "JPEG", quality=95) + b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 8, "JPEG", 4
    ),
    "png": Made(lambda: save(picture(), "PNG"), "PNG"),
    "png_grey": Made(lambda: save(grey_picture(), "PNG"), "PNG", 0, _grey),
    "png_one_bit": Made(
        lambda: save(Image.fromarray(_black_and_white()).convert("1"), "PNG"), "PNG", 0, _black_and_white
    ),
    "png_palette": Made(lambda: save(picture().quantize(8), "PNG"), "PNG", 2),
    "png_palette_with_transparency": Made(_palette_with_hole, "PNG", 2, _last_quarter_white),
    "png_alpha": Made(lambda: save(_with_alpha(), "PNG"), "PNG", 1, _over_white),
    "png_grey_alpha": Made(
        lambda: save(Image.merge("LA", (grey_picture(), Image.new("L", (WIDTH, HEIGHT), 255))), "PNG"),
        "PNG",
        0,
        _grey,
    ),
    "png_transparent_color": Made(
        lambda: save(picture(), "PNG", transparency=QUARTERS[3]), "PNG", 0, _last_quarter_white
    ),
    "png_16_bit": Made(lambda: png(_sixteen_bits(scene())), "PNG"),
    "png_16_bit_grey": Made(lambda: png(_sixteen_bits(_grey()[:, :, 0])), "PNG", 0, _grey),
    "png_interlaced": Made(lambda: png(scene(), interlaced=True), "PNG"),
    "png_animated": Made(lambda: _animation("PNG"), "PNG"),
    "webp": Made(lambda: save(picture(), "WEBP", quality=95), "WebP", 8),
    "webp_lossless": Made(lambda: save(picture(), "WEBP", lossless=True), "WebP"),
    "webp_alpha": Made(lambda: save(_with_alpha(), "WEBP", quality=95), "WebP", 8, _over_white),
    "webp_animated": Made(lambda: _animation("WEBP", lossless=True), "WebP"),
    "heic": Made(lambda: save(picture(), "HEIF", quality=95), "HEIC/HEIF", 8),
    "heic_alpha": Made(lambda: save(_with_alpha(), "HEIF", quality=95), "HEIC/HEIF", 8, _over_white),
    "heic_grid": Made(lambda: save(picture(), "HEIF", quality=95, tile_size=64), "HEIC/HEIF", 8),
    "avif": Made(lambda: save(picture(), "AVIF", quality=95), "AVIF", 8),
    "avif_alpha": Made(lambda: save(_with_alpha(), "AVIF", quality=95), "AVIF", 8, _over_white),
    "bmp": Made(lambda: save(picture(), "BMP"), "BMP"),
    "bmp_palette": Made(lambda: save(picture().quantize(8), "BMP"), "BMP", 2),
    "tiff": Made(lambda: save(picture(), "TIFF"), "TIFF"),
    "tiff_lzw": Made(lambda: save(picture(), "TIFF", compression="tiff_lzw"), "TIFF"),
    "tiff_deflate": Made(lambda: save(picture(), "TIFF", compression="tiff_adobe_deflate"), "TIFF"),
    "tiff_jpeg": Made(lambda: save(picture(), "TIFF", compression="jpeg", quality=95), "TIFF", 4),
    "tiff_big": Made(lambda: save(picture(), "TIFF", big_tiff=True), "TIFF"),
    "tiff_cmyk": Made(lambda: save(picture("CMYK"), "TIFF"), "TIFF", 1),
    "tiff_cmyk_with_profile": Made(_all_cyan_with_profile, "TIFF", 3, _grey_of_cyan_profile),
    "tiff_ycbcr": Made(lambda: save(picture("YCbCr"), "TIFF"), "TIFF", 3),
    "tiff_16_bit_grey": Made(
        lambda: save(Image.fromarray(_sixteen_bits(_grey()[:, :, 0])), "TIFF"), "TIFF", 0, _grey
    ),
    "tiff_16_bit_grey_big_endian": Made(
        lambda: save(Image.fromarray(_sixteen_bits(_grey()[:, :, 0]).astype(">u2")), "TIFF"), "TIFF", 0, _grey
    ),
    "tiff_pages": Made(
        lambda: save(picture(), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]), "TIFF"
    ),
    "gif": Made(lambda: save(picture().quantize(8), "GIF"), "GIF", 2),
    "gif_animated": Made(lambda: _animation("GIF"), "GIF", 2),
    "gif_transparent": Made(
        lambda: save(
            picture().quantize(8), "GIF", transparency=picture().quantize(8).getpixel((WIDTH - 1, HEIGHT - 1))
        ),
        "GIF",
        2,
        _last_quarter_white,
    ),
    "one_pixel": Made(
        lambda: save(Image.new("RGB", (1, 1), QUARTERS[0]), "PNG"),
        "PNG",
        0,
        lambda: np.array([[QUARTERS[0]]], np.uint8),
    ),
    "one_column": Made(
        lambda: save(Image.new("RGB", (1, 20_000), QUARTERS[0]), "JPEG"),
        "JPEG",
        4,
        lambda: np.full((20_000, 1, 3), QUARTERS[0], np.uint8),
    ),
    "one_row": Made(
        lambda: save(Image.new("RGB", (20_000, 1), QUARTERS[0]), "PNG"),
        "PNG",
        0,
        lambda: np.full((1, 20_000, 3), QUARTERS[0], np.uint8),
    ),
}


JPEG_OPTIONS: tuple[dict[str, Any], ...] = (
    *({"subsampling": sampling} for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")),
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"keep_rgb": True},
    {"quality": 30},
)


def with_orientation(file_format: str, orientation: int) -> bytes:
    """The scene as stored by a phone held in one of eight ways."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {} if file_format == "PNG" else {"quality": 95}
    if file_format == "TIFF":
        return save(picture(), "TIFF", tiffinfo={0x0112: orientation})
    return save(picture(), file_format, exif=exif.tobytes(), **options)


# --- each way to be broken ----------------------------------------------------------------------------------


def _patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def with_stated_size(kind: str, width: int, height: int) -> bytes:
    """A file whose header states another size than its pixels have."""
    data = KINDS[kind].make()
    match kind:
        case "jpeg" | "jpeg_grey" | "jpeg_progressive":
            frame = data.index(b"\xff\xc2" if kind == "jpeg_progressive" else b"\xff\xc0")
            return _patched(data, frame + 5, struct.pack(">HH", height, width))
        case "png" | "png_interlaced":
            header = struct.pack(">II", width, height) + data[24:29]
            return data[:8] + png_chunk(b"IHDR", header) + data[33:]
        case "gif":
            data = _patched(data, 6, struct.pack("<HH", width, height))
            frame = data.index(b",\0\0\0\0" + struct.pack("<HH", WIDTH, HEIGHT))
            return _patched(data, frame + 5, struct.pack("<HH", width, height))
        case "bmp":
            return _patched(data, 18, struct.pack("<ii", width, height))
        case "tiff" | "tiff_lzw":
            directory = struct.unpack_from("<I", data, 4)[0]
            for at in range(
                directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12
            ):
                tag = struct.unpack_from("<H", data, at)[0]
                if tag in (256, 257):
                    data = _patched(
                        data, at, struct.pack("<HHII", tag, 4, 1, width if tag == 256 else height)
                    )
            return data
        case "webp":
            return _patched(data, data.index(b"\x9d\x01\x2a") + 3, struct.pack("<HH", width, height))
        case "webp_alpha":  # VP8X: 24 bits each, minus one
            sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
            return _patched(data, data.index(b"VP8X") + 12, sizes)
        case "heic" | "avif":
            return _patched(data, data.index(b"ispe") + 8, struct.pack(">II", width, height))
    raise KeyError(kind)


def huge_tile_tiff() -> bytes:
    """A TIFF of 8×8 pixels in one tile of 30,000×30,000."""
    entries = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 30_000),
        (323, 30_000),
        (324, 200),
    ]
    entries.append((325, 20))
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries
    )
    return (b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)).ljust(200, b"\0") + zlib.compress(
        bytes(64)
    )


def tiff_of_strips(count: int) -> bytes:
    """A grey TIFF that lists so many strips of one row; all of them lie in the same place."""
    offsets_at = 8 + WIDTH
    entries = [(256, WIDTH), (257, HEIGHT), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1)]
    directory = struct.pack("<H", len(entries) + 2)
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    directory += struct.pack("<HHII", 273, 4, count, offsets_at)
    directory += struct.pack("<HHII", 279, 4, count, offsets_at + 4 * count)
    lists = struct.pack("<I", 8) * count + struct.pack("<I", WIDTH) * count
    return b"II*\0" + struct.pack("<I", offsets_at + len(lists)) + bytes(WIDTH) + lists + directory + bytes(4)


def jpeg_of_many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = KINDS["jpeg_progressive"].make()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def jpeg_closed_early() -> bytes:
    """Half of a JPEG, with an end marker put behind it, as some repair tools do."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = save(Image.fromarray(noise), "JPEG")
    return data[: len(data) // 2].rstrip(b"\xff") + b"\xff\xd9"


STRANGERS: dict[str, bytes] = {
    "text": b"hello, this is no image at all",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "zip": b"PK\x03\x04" + bytes(26),
    "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(32),
    "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(32),
    "bitmap_by_two_letters": b"BM is how this text begins, and no more",
    "zeros": bytes(4096),
    "two_bytes": b"\xff\xd8",
    "ppm": b"P6 2 2 255 " + bytes(12),
    "ico": b"\0\0\1\0\1\0" + bytes(64),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}
