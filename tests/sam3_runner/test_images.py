"""Every kind of image file comes out right, and every broken one as an error that says what to do."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageFile

from sam3_runner import images
from sam3_runner.errors import (
    ImageError,
    ImageTooLarge,
    InvalidRegion,
    UndecodableImage,
    UnsupportedImage,
)
from sam3_runner.images import (
    MAX_JPEG_SCANS,
    READABLE_FORMATS,
    ImageLimits,
    Region,
    content_hash,
    decode_whole,
    open_for_model,
    open_image,
    probe_image,
    resize_for_model,
)
from sam3_runner.jpeg_stream import read_layout
from tests.sam3_runner import color_profiles, made_images
from tests.sam3_runner.made_images import HEIGHT, KINDS, STRANGERS, WIDTH

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: np.rot90(stored),
}

SIZES_THAT_TURN_OUT_WRONG = [
    pytest.param(kind, size, id=f"{kind}-{size[0]}x{size[1]}")
    for kind, sizes in {
        "jpeg": [(WIDTH, 2 * HEIGHT), (WIDTH, HEIGHT + 16), (2 * WIDTH, HEIGHT), (WIDTH, 0)],
        "jpeg_grey": [(WIDTH, 2 * HEIGHT), (WIDTH, HEIGHT + 8)],
        "jpeg_progressive": [(WIDTH, 0)],
        "png": [(WIDTH, 2 * HEIGHT), (WIDTH, HEIGHT + 1), (2 * WIDTH, HEIGHT), (0, HEIGHT)],
        "png_interlaced": [(WIDTH, 2 * HEIGHT), (2 * WIDTH, HEIGHT)],
        "gif": [(WIDTH, 2 * HEIGHT), (0, HEIGHT)],
        "bmp": [(WIDTH, 2 * HEIGHT), (2 * WIDTH, HEIGHT), (0, HEIGHT)],
        "tiff": [(WIDTH, 2 * HEIGHT), (WIDTH, 0)],
        "tiff_lzw": [(WIDTH, 2 * HEIGHT), (2 * WIDTH, HEIGHT)],
        "webp": [(WIDTH, 2 * HEIGHT), (0, HEIGHT)],
        "webp_alpha": [(WIDTH, 2 * HEIGHT)],
        "heic": [(WIDTH, 2 * HEIGHT), (WIDTH // 2, HEIGHT), (WIDTH, 0)],
        "avif": [(0, HEIGHT)],
    }.items()
    for size in sizes
]

BOMBS = [
    pytest.param(kind, side, id=kind)
    for kind, side in {
        "jpeg": 60_000,
        "jpeg_progressive": 60_000,
        "png": 60_000,
        "gif": 60_000,
        "bmp": 60_000,
        "tiff": 60_000,
        "tiff_lzw": 60_000,
        "webp": 16_000,
        "webp_alpha": 16_000,
        "heic": 30_000,
        "avif": 16_000,
    }.items()
]


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_shows_what_was_put_into_it(self, kind: str) -> None:
        made = KINDS[kind]
        pixels, expected = open_image(made.make()), made.shows()
        assert pixels.shape == expected.shape
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable
        where = made_images.away_from_edges(pixels.shape) if made.tolerance > 2 else np.s_[:]
        difference = np.abs(pixels.astype(int) - expected)[where]
        assert difference.max() <= made.tolerance

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_header_tells_format_and_size(self, kind: str) -> None:
        header = probe_image(KINDS[kind].make())
        assert header.format == KINDS[kind].format
        assert header.format in READABLE_FORMATS
        assert header.size_hw == KINDS[kind].shows().shape[:2]

    def test_there_is_a_made_image_of_every_readable_format(self) -> None:
        assert {made.format for made in KINDS.values()} == set(READABLE_FORMATS)

    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
    def test_the_picture_stands_upright_in_all_eight_orientations(
        self, file_format: str, orientation: int
    ) -> None:
        stored = made_images.scene()
        expected, away = (
            UPRIGHT[orientation](part)
            for part in (stored, made_images.away_from_edges(stored.shape)[:, :, None])
        )
        pixels = open_image(made_images.with_orientation(file_format, orientation))
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected)[away[:, :, 0]].max() <= 8

    # A warning of Pillow's, on which a service goes on; only here would it be an error.
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
    def test_broken_exif_leaves_the_picture_as_it_is_stored(self) -> None:
        data = made_images.save(
            made_images.picture(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
        )
        assert open_image(data).shape == (HEIGHT, WIDTH, 3)

    def test_an_orientation_out_of_range_counts_as_upright(self) -> None:
        pixels = open_image(made_images.with_orientation("JPEG", 9))
        assert pixels.shape == (HEIGHT, WIDTH, 3)

    def test_float_pixels_are_refused_because_nobody_agrees_on_white(self) -> None:
        data = made_images.save(Image.new("F", (4, 4), 0.5), "TIFF")
        with pytest.raises(UnsupportedImage, match="8 or 16 bits per channel, got floats"):
            open_image(data)

    def test_32_bit_integers_are_refused_likewise(self) -> None:
        with pytest.raises(UnsupportedImage, match="got 32-bit integers"):
            open_image(made_images.save(Image.new("I", (4, 4), 70_000), "TIFF"))

    def test_lab_pixels_are_shown_in_srgb(self) -> None:
        data = made_images.save(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF")
        assert open_image(data).min() >= 253


class TestColorProfiles:
    @pytest.mark.parametrize(
        ("name", "is_applied"),
        [("srgb", False), ("display_p3", False), ("adobe_rgb", False), ("wide", True), ("swapped", True)],
    )
    def test_only_a_profile_that_shifts_colors_far_is_applied(self, name: str, is_applied: bool) -> None:
        data = made_images.save(made_images.picture(), "PNG", icc_profile=color_profiles.rgb_profile(name))
        assert np.array_equal(open_image(data), made_images.scene()) is not is_applied

    def test_a_profile_with_red_and_blue_swapped_shows_blue_for_red(self) -> None:
        red = Image.new("RGB", (4, 4), (255, 0, 0))
        data = made_images.save(red, "JPEG", quality=95, icc_profile=color_profiles.rgb_profile("swapped"))
        assert open_image(data)[0, 0].argmax() == 2

    def test_the_profile_of_an_image_with_alpha_is_applied_too(self) -> None:
        red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
        data = made_images.save(red, "PNG", icc_profile=color_profiles.rgb_profile("swapped"))
        assert open_image(data)[0, 0].argmax() == 2

    @pytest.mark.parametrize(
        "profile",
        [
            pytest.param(b"no profile at all", id="garbage"),
            pytest.param(color_profiles.rgb_profile("wide")[:200], id="cut-off"),
            pytest.param(color_profiles.cmyk_profile(lambda *inks: (50, 0, 0)), id="of-another-color-space"),
        ],
    )
    def test_a_profile_that_cannot_be_used_is_ignored(self, profile: bytes) -> None:
        data = made_images.save(made_images.picture(), "PNG", icc_profile=profile)
        assert np.array_equal(open_image(data), made_images.scene())


class TestBroken:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("one_")])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_a_truncated_file_is_an_error_and_never_half_a_picture(self, kind: str, share: float) -> None:
        whole = KINDS[kind].make()
        if kind == "jpeg_with_a_video_behind_it":
            whole = whole[: whole.index(b"ftyp") - 4]
        if kind == "jpeg_multi_picture":  # its second picture is nothing to us
            layout = read_layout(whole, max_parts=1000)
            assert layout.end is not None
            whole = whole[: layout.end + 2]
        data = whole[: int(len(whole) * share)]
        if kind.endswith(("_animated", "_pages")) or share > 0.8:
            # What was cut off may have held no pixels of the first picture.
            with suppress(UndecodableImage):
                assert np.array_equal(open_image(data), open_image(whole))
            return
        with pytest.raises(UndecodableImage, match=r"Expected a whole .* send it again"):
            open_image(data)

    @pytest.mark.parametrize(
        "kind",
        [
            "jpeg",
            "jpeg_progressive",
            "png",
            "webp",
            "heic",
            "heic_grid",
            "avif",
            "bmp",
            "tiff",
            "tiff_lzw",
            "gif",
        ],
    )
    def test_cut_anywhere_it_is_an_error_or_the_whole_picture(self, kind: str) -> None:
        whole = KINDS[kind].make()
        expected = open_image(whole)
        for length in range(1, len(whole), max(1, len(whole) // 100)):
            try:
                pixels = open_image(whole[:length])
            except (UndecodableImage, UnsupportedImage):
                continue
            assert np.array_equal(pixels, expected), f"cut to {length} of {len(whole)} bytes"

    def test_a_jpeg_cut_in_half_and_closed_properly_is_an_error(self) -> None:
        data = made_images.jpeg_closed_early()
        with pytest.raises(UndecodableImage, match="ends before the picture does"):
            open_image(data)

    @pytest.mark.parametrize(("kind", "size_wh"), SIZES_THAT_TURN_OUT_WRONG)
    def test_a_header_that_lies_about_the_size_is_found_out(
        self, kind: str, size_wh: tuple[int, int]
    ) -> None:
        with pytest.raises(UndecodableImage):
            open_image(made_images.with_stated_size(kind, *size_wh))

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"optimize": True},
            {"progressive": True},
            {"restart_marker_blocks": 3},
            {"quality": 100},
        ],
        ids=str,
    )
    def test_a_jpeg_that_truly_is_mid_grey_is_not_taken_for_a_broken_one(
        self, mode: str, options: dict
    ) -> None:
        color = 128 if mode == "L" else (128,) * len(mode)
        data = made_images.save(Image.new(mode, (161, 123), color), "JPEG", **options)
        assert open_image(data).shape == (123, 161, 3)

    @pytest.mark.parametrize("mode", ["RGBA", "RGB", "L", "1", "P"])
    def test_a_png_that_truly_is_black_or_empty_is_not_taken_for_a_broken_one(self, mode: str) -> None:
        assert open_image(made_images.save(Image.new(mode, (161, 123)), "PNG")).shape == (123, 161, 3)

    @pytest.mark.parametrize(
        "kind", ["jpeg", "png", "webp", "heic", "avif", "bmp", "tiff", "tiff_jpeg", "gif"]
    )
    def test_random_damage_gives_a_picture_or_one_of_our_errors(self, kind: str) -> None:
        whole = KINDS[kind].make()
        random = np.random.default_rng(zlib.crc32(kind.encode()))
        for _ in range(100):
            data = bytearray(whole)
            for at in random.integers(0, len(data), size=3):
                data[at] = random.integers(256)
            try:
                pixels = open_image(bytes(data))
            except ImageError:
                continue
            assert pixels.ndim == 3

    def test_an_empty_file_is_called_empty(self) -> None:
        for read in (probe_image, open_image):
            with pytest.raises(UndecodableImage, match="got 0 bytes"):
                read(b"")

    @pytest.mark.parametrize("stranger", STRANGERS)
    def test_a_file_of_another_kind_is_unsupported_whatever_its_name(self, stranger: str) -> None:
        for read in (probe_image, open_image):
            with pytest.raises(
                UnsupportedImage, match="Expected JPEG, PNG, WebP, HEIC/HEIF, AVIF, BMP, TIFF or GIF"
            ):
                read(STRANGERS[stranger])

    @pytest.mark.parametrize(
        ("stranger", "name"),
        [("html", "an HTML page"), ("pdf", "a PDF"), ("mp4", "video"), ("pickle", "a Python pickle")],
    )
    def test_the_message_names_what_came(self, stranger: str, name: str) -> None:
        with pytest.raises(UnsupportedImage, match=name):
            probe_image(STRANGERS[stranger])

    @pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "heic", "avif"])
    def test_a_file_with_another_signature_is_not_opened_by_guessing(self, kind: str) -> None:
        data = KINDS[kind].make()
        with pytest.raises(UnsupportedImage):
            open_image(b"NOPE" + bytes(8) + data[12:])

    @pytest.mark.parametrize(
        "data",
        [
            *(pytest.param(data, id=name) for name, data in STRANGERS.items()),
            *(pytest.param(made.make()[:45], id=f"{kind}-cut-off") for kind, made in KINDS.items()),
            pytest.param(b"", id="nothing"),
        ],
    )
    def test_messages_hold_nothing_of_the_host(self, data: bytes) -> None:
        with pytest.raises(ImageError) as caught:
            open_image(data)
        assert not any(
            sign in str(caught.value) for sign in (" at 0x", "/home", "packages", ".py", "BytesIO")
        )


class TestLimits:
    def test_the_defaults_are_25_megabytes_and_50_megapixels(self) -> None:
        assert ImageLimits() == ImageLimits(max_bytes=25_000_000, max_pixels=50_000_000)

    @pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": 0}], ids=str)
    def test_limits_below_one_are_refused(self, limits: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            ImageLimits(**limits)

    def test_a_file_over_the_byte_limit_is_not_looked_into(self) -> None:
        data = KINDS["png"].make()
        with pytest.raises(ImageTooLarge, match=rf"{len(data):,} bytes; at most {len(data) - 1:,} are read"):
            open_image(data, ImageLimits(max_bytes=len(data) - 1))
        assert open_image(data, ImageLimits(max_bytes=len(data))).shape == (HEIGHT, WIDTH, 3)

    def test_the_pixel_limit_is_exact(self) -> None:
        data = KINDS["png"].make()
        assert open_image(data, ImageLimits(max_pixels=HEIGHT * WIDTH)).shape == (HEIGHT, WIDTH, 3)
        with pytest.raises(ImageTooLarge, match="96×64 = 6,144 pixels; at most 6,143 are read"):
            open_image(data, ImageLimits(max_pixels=HEIGHT * WIDTH - 1))

    @pytest.mark.parametrize(("kind", "side"), BOMBS)
    def test_a_bomb_is_refused_by_its_header_before_anything_is_decoded(
        self, kind: str, side: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def decoding(self: ImageFile.ImageFile) -> None:
            raise AssertionError("the pixels were decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", decoding)
        data = made_images.with_stated_size(kind, side, side)
        for read in (probe_image, open_image):
            with pytest.raises(ImageTooLarge, match="Scale it down"):
                read(data)

    @pytest.mark.parametrize("side", [10_000, 14_000])
    def test_limits_above_pillows_own_give_neither_its_warning_nor_its_error(self, side: int) -> None:
        assert Image.MAX_IMAGE_PIXELS is not None
        assert side**2 > Image.MAX_IMAGE_PIXELS
        for kind in ("png", "jpeg", "bmp", "tiff"):
            header = probe_image(
                made_images.with_stated_size(kind, side, side), ImageLimits(max_pixels=10**9)
            )
            assert header.size_hw == (side, side)

    def test_a_large_tiff_is_decoded_under_our_limit_whatever_pillows_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        for kind in ("tiff", "tiff_lzw"):
            assert open_image(KINDS[kind].make()).shape == (HEIGHT, WIDTH, 3)

    def test_a_tiny_tiff_in_one_huge_tile_is_refused(self) -> None:
        with pytest.raises(ImageTooLarge, match="tiles of the TIFF"):
            open_image(made_images.huge_tile_tiff())

    def test_a_jpeg_of_a_thousand_scans_is_refused_at_once(self) -> None:
        assert open_image(made_images.jpeg_of_many_scans(20)).shape == (HEIGHT, WIDTH, 3)
        data = made_images.jpeg_of_many_scans(1000)
        with pytest.raises(UndecodableImage, match=f"at most {MAX_JPEG_SCANS} are read"):
            open_image(data)

    @pytest.mark.parametrize(
        ("kind", "at", "part"),
        [
            pytest.param("jpeg", 2, b"\xff\xe1\0\2", id="jpeg"),
            pytest.param("jpeg", 2, b"\xff", id="jpeg, padded"),
            pytest.param("jpeg", 2, b"\xff\0", id="jpeg, with junk"),
            pytest.param("png", 33, made_images.png_chunk(b"juNk", b""), id="png"),
        ],
    )
    def test_a_file_in_millions_of_pieces_is_refused_before_pillow_reads_them_one_by_one(
        self, kind: str, at: int, part: bytes
    ) -> None:
        whole = KINDS[kind].make()
        many, too_many = (whole[:at] + part * n + whole[at:] for n in (1000, 25_000_000 // len(part) - 1000))
        assert open_image(many).shape == (HEIGHT, WIDTH, 3)
        for read in (probe_image, open_image):
            with pytest.raises(UndecodableImage, match="in more than 50,000 pieces"):
                read(too_many)

    def test_a_tiff_in_millions_of_strips_is_refused_before_pillow_reads_them_one_by_one(self) -> None:
        assert open_image(made_images.tiff_of_strips(HEIGHT)).shape == (HEIGHT, WIDTH, 3)
        data = made_images.tiff_of_strips(3_000_000)
        for read in (probe_image, open_image):
            with pytest.raises(UndecodableImage, match="in more than 50,000 pieces"):
                read(data)


class TestState:
    def test_reading_changes_nothing_in_pillow_and_needs_nothing_registered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = KINDS["heic"].make()
        monkeypatch.setattr(Image, "OPEN", {})
        before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
        assert open_image(data).shape == (HEIGHT, WIDTH, 3)
        assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
        assert Image.OPEN == {}

    def test_pillows_pixel_limit_plays_no_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert open_image(KINDS["png"].make()).shape == (HEIGHT, WIDTH, 3)
        assert open_image(KINDS["jpeg"].make()).shape == (HEIGHT, WIDTH, 3)

    def test_pillow_told_to_load_truncated_files_is_a_programming_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
            open_image(KINDS["png"].make())

    def test_many_threads_read_all_kinds_at_once(self) -> None:
        files = [made.make() for made in KINDS.values()] * 4
        expected = [open_image(data) for data in files]
        with ThreadPoolExecutor(8) as pool:
            for pixels, wanted in zip(pool.map(open_image, files), expected, strict=True):
                assert np.array_equal(pixels, wanted)


class TestResizeForModel:
    @pytest.mark.parametrize(
        ("size_hw", "input_size_px"),
        [
            pytest.param((480, 640), 1008, id="up"),
            pytest.param((1500, 2000), 1008, id="down"),
            pytest.param((700, 1300), 1008, id="up-and-down"),
            pytest.param((1008, 1008), 1008, id="same"),
            pytest.param((101, 53), 336, id="odd"),
            pytest.param((2000, 3), 168, id="column"),
            pytest.param((1, 2000), 168, id="row"),
            pytest.param((1, 1), 168, id="one-pixel"),
            pytest.param((900, 1200), 224, id="far-down"),
        ],
    )
    def test_it_equals_the_reference_image_processor(
        self, size_hw: tuple[int, int], input_size_px: int
    ) -> None:
        from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

        random = np.random.default_rng(0)
        image = random.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        processor = Sam3ImageProcessor(
            size={"height": input_size_px, "width": input_size_px}, do_rescale=False, do_normalize=False
        )
        for given, order in ((image, "channels_last"), (Image.fromarray(image), None)):
            reference = processor(given, input_data_format=order, return_tensors="np")["pixel_values"][0]
            assert reference.dtype == np.uint8
            ours = resize_for_model(image, input_size_px)
            assert np.array_equal(ours, reference.transpose(1, 2, 0))

    def test_the_result_is_contiguous_and_shares_no_memory(self) -> None:
        image = np.zeros((64, 64, 3), np.uint8)
        for side in (64, 32):
            resized = resize_for_model(image, side)
            assert resized.shape == (side, side, 3)
            assert resized.flags.c_contiguous
            assert not np.shares_memory(resized, image)

    def test_views_that_are_turned_or_read_only_give_the_same(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        expected = resize_for_model(np.ascontiguousarray(image[::-1]), 40)
        image.flags.writeable = False
        assert np.array_equal(resize_for_model(image[::-1], 40), expected)

    @pytest.mark.parametrize(
        "image",
        [
            pytest.param(np.zeros((4, 4), np.uint8), id="grey"),
            pytest.param(np.zeros((4, 4, 4), np.uint8), id="four-channels"),
            pytest.param(np.zeros((4, 4, 3), np.float32), id="floats"),
            pytest.param(np.zeros((0, 4, 3), np.uint8), id="empty"),
        ],
    )
    def test_anything_but_rgb_bytes_is_refused(self, image: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"Expected \(H, W, 3\) uint8"):
            resize_for_model(image, 8)


class TestOpenForModel:
    side = 56  # at which none of the made images is scaled while it is decoded

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_opening_and_resizing(self, kind: str) -> None:
        data = KINDS[kind].make()
        whole = open_image(data)
        image = open_for_model(data, self.side)
        assert image.size_hw == whole.shape[:2]
        assert np.array_equal(image.pixels, resize_for_model(whole, self.side))

    @pytest.mark.parametrize("options", made_images.JPEG_OPTIONS, ids=str)
    def test_a_jpeg_is_to_the_bit_what_pillow_reads(self, options: dict) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        data = made_images.save(Image.fromarray(noise).resize((323, 237)), "JPEG", **options)
        image = open_for_model(data, 230)
        assert np.array_equal(image.pixels, resize_for_model(open_image(data), 230))

    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
    def test_the_picture_stands_upright_in_all_eight_orientations(
        self, file_format: str, orientation: int
    ) -> None:
        data = made_images.with_orientation(file_format, orientation)
        whole = open_image(data)
        image = open_for_model(data, self.side)
        assert image.size_hw == whole.shape[:2]
        difference = np.abs(image.pixels.astype(int) - resize_for_model(whole, self.side))
        assert difference.max() <= (1 if orientation > 4 else 0)

    @pytest.mark.parametrize(
        ("size_wh", "side", "decoded_hw"),
        [
            pytest.param((800, 600), 100, (150, 200), id="quarter"),
            pytest.param((800, 600), 300, (300, 400), id="half, just covered"),
            pytest.param((800, 600), 301, (600, 800), id="whole"),
            pytest.param((801, 600), 300, (600, 801), id="an odd side"),
            pytest.param((1600, 200), 150, (200, 1600), id="the shorter side counts"),
        ],
    )
    @pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
    def test_a_large_jpeg_is_decoded_no_larger_than_covers_the_input(
        self,
        size_wh: tuple[int, int],
        side: int,
        decoded_hw: tuple[int, int],
        options: dict,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(size_wh, Image.Resampling.BICUBIC)
        data = made_images.save(picture, "JPEG", quality=95, **options)
        resized: list[tuple[int, ...]] = []

        def resize(pixels: np.ndarray, side: int) -> np.ndarray:
            resized.append(pixels.shape)
            return resize_for_model(pixels, side)

        monkeypatch.setattr(images, "resize_for_model", resize)
        image = open_for_model(data, side)
        assert resized == [(*decoded_hw, 3)]
        assert image.size_hw == size_wh[::-1]
        difference = np.abs(image.pixels.astype(int) - resize_for_model(open_image(data), side))
        assert difference.mean() < 1 and difference.max() <= 8

    def test_a_scaled_jpeg_is_turned_and_its_profile_applied(self) -> None:
        picture = made_images.picture().resize((960, 640), Image.Resampling.NEAREST)
        exif = Image.Exif()
        exif[0x0112] = 6
        icc = color_profiles.rgb_profile("swapped")
        data = made_images.save(picture, "JPEG", quality=95, exif=exif.tobytes(), icc_profile=icc)
        image = open_for_model(data, 100)
        assert image.size_hw == (960, 640)
        expected = resize_for_model(open_image(data), 100).astype(int)
        assert np.abs(image.pixels - expected).mean() < 1

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("jpeg")])
    def test_a_damaged_jpeg_is_refused_as_when_it_is_opened_whole(self, kind: str) -> None:
        whole = KINDS[kind].make()
        random = np.random.default_rng(zlib.crc32(kind.encode()))
        cut = [whole[:length] for length in range(1, len(whole), max(1, len(whole) // 60))]
        for data in [*cut, *(damaged(whole, random) for _ in range(100))]:
            assert outcome(lambda d: open_for_model(d, 8).size_hw, data) == outcome(
                lambda d: open_image(d).shape[:2], data
            )

    @pytest.mark.parametrize(("kind", "size_wh"), SIZES_THAT_TURN_OUT_WRONG)
    def test_a_header_that_lies_about_the_size_is_found_out(
        self, kind: str, size_wh: tuple[int, int]
    ) -> None:
        with pytest.raises(UndecodableImage):
            open_for_model(made_images.with_stated_size(kind, *size_wh), 8)

    def test_limits_hold(self) -> None:
        data = KINDS["jpeg"].make()
        with pytest.raises(ImageTooLarge):
            open_for_model(data, self.side, ImageLimits(max_pixels=HEIGHT * WIDTH - 1))
        with pytest.raises(UndecodableImage, match="ends before the picture does"):
            open_for_model(made_images.jpeg_closed_early(), 8)


class TestWhole:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_what_opening_gives(self, kind: str) -> None:
        data = KINDS[kind].make()
        assert np.array_equal(decode_whole(data), open_image(data))

    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
    def test_so_it_is_in_all_eight_orientations(self, file_format: str, orientation: int) -> None:
        data = made_images.with_orientation(file_format, orientation)
        assert np.array_equal(decode_whole(data), open_image(data))

    def test_a_damaged_jpeg_is_refused_likewise(self) -> None:
        whole = KINDS["jpeg"].make()
        random = np.random.default_rng(0)
        for data in (damaged(whole, random) for _ in range(100)):
            assert outcome(lambda d: decode_whole(d).shape, data) == outcome(
                lambda d: open_image(d).shape, data
            )


class TestRegion:
    @pytest.mark.parametrize(
        ("region", "crop"),
        [
            pytest.param(Region((10, 20, 30, 40)), (10, 20, 30, 40), id="whole pixels"),
            pytest.param(Region((10.9, 20.1, 29.1, 39.9)), (10, 20, 30, 40), id="outwards"),
            pytest.param(Region((10.5, 20.5, 10.6, 20.6)), (10, 20, 11, 21), id="within one pixel"),
            pytest.param(Region((-5, -5, 500, 500)), (0, 0, 100, 50), id="clipped"),
            pytest.param(Region((0.1, 0.2, 0.3, 0.9), is_relative=True), (10, 10, 30, 45), id="relative"),
            pytest.param(Region((0, 0, 0.07, 0.14), is_relative=True), (0, 0, 7, 7), id="by rounding only"),
            pytest.param(Region((-1, 0.5, 2, 3), is_relative=True), (0, 25, 100, 50), id="relative, clipped"),
        ],
    )
    def test_its_pixels_are_those_that_it_touches(self, region: Region, crop: tuple[int, ...]) -> None:
        assert region.to_px((50, 100)) == crop

    @pytest.mark.parametrize(
        "region",
        [
            pytest.param(Region((10, 10, 10, 20)), id="no width"),
            pytest.param(Region((10, 20, 30, 20)), id="no height"),
            pytest.param(Region((30, 10, 10, 20)), id="right of left"),
            pytest.param(Region((100, 0, 110, 50)), id="beside"),
            pytest.param(Region((0, -10, 100, 0)), id="above"),
            pytest.param(Region((1, 1, 2, 2), is_relative=True), id="relative, beyond"),
            pytest.param(Region((0, 0, float("nan"), 10)), id="not a number"),
            pytest.param(Region((0, 0, float("inf"), 10)), id="without end"),
        ],
    )
    def test_one_that_shows_nothing_is_refused(self, region: Region) -> None:
        with pytest.raises(InvalidRegion, match="region"):
            region.to_px((50, 100))

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_cut_out_before_the_image_is_resized(self, kind: str) -> None:
        data, region = KINDS[kind].make(), Region((0.3, 0.3, 0.77, 0.9), is_relative=True)
        whole = open_image(data)
        left, top, right, bottom = region.to_px((whole.shape[0], whole.shape[1]))
        image = open_for_model(data, 40, region=region)
        assert image.size_hw == whole.shape[:2]
        assert image.crop_xyxy_px == (left, top, right, bottom)
        assert np.array_equal(image.pixels, resize_for_model(whole[top:bottom, left:right], 40))

    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
    def test_it_is_one_of_the_upright_image(self, file_format: str, orientation: int) -> None:
        data = made_images.with_orientation(file_format, orientation)
        image = open_for_model(data, 40, region=Region((21, 13, 61, 53)))
        assert np.array_equal(image.pixels, open_image(data)[13:53, 21:61])

    @pytest.mark.parametrize("orientation", [1, 6])
    @pytest.mark.parametrize(
        ("xyxy", "decoded_hw"),
        [
            pytest.param((0, 0, 800, 600), (150, 200), id="all of it"),
            pytest.param((4, 8, 404, 408), (100, 100), id="a quarter"),
            pytest.param((400, 200, 800, 600), (100, 100), id="to the corner"),
            pytest.param((4, 8, 400, 408), (200, 198), id="half, for less would not cover"),
            pytest.param((2, 8, 402, 408), (200, 200), id="half, for the edge"),
            pytest.param((3, 8, 403, 408), (400, 400), id="whole, for the edge"),
            pytest.param((0, 0, 100, 100), (100, 100), id="whole, for the side"),
        ],
    )
    def test_it_decides_how_large_a_jpeg_is_decoded(
        self,
        xyxy: tuple[int, int, int, int],
        decoded_hw: tuple[int, int],
        orientation: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((800, 600), Image.Resampling.BICUBIC)
        if orientation == 6:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = made_images.save(picture, "JPEG", quality=95, exif=exif.tobytes())
        resized: list[tuple[int, ...]] = []

        def resize(pixels: np.ndarray, side: int) -> np.ndarray:
            resized.append(pixels.shape)
            return resize_for_model(pixels, side)

        monkeypatch.setattr(images, "resize_for_model", resize)
        image = open_for_model(data, 100, region=Region(xyxy))
        assert resized == [(*(decoded_hw[::-1] if orientation == 6 else decoded_hw), 3)]
        left, top, right, bottom = xyxy
        expected = resize_for_model(open_image(data)[top:bottom, left:right], 100)
        difference = np.abs(image.pixels.astype(int) - expected)
        assert difference.mean() < 2  # half a pixel off, it is 10

    def test_a_profile_applies_to_it(self) -> None:
        icc = color_profiles.rgb_profile("swapped")
        data = made_images.save(made_images.picture(), "JPEG", quality=95, icc_profile=icc)
        image = open_for_model(data, 40, region=Region((50, 10, 90, 50)))
        assert np.array_equal(image.pixels, open_image(data)[10:50, 50:90])

    def test_the_hash_names_it(self) -> None:
        data = KINDS["png"].make()
        regions = [
            None,
            Region((0, 0, 1, 1)),
            Region((0, 0, 1, 1), is_relative=True),
            Region((0, 0, 1, 0.5), is_relative=True),
        ]
        hashes = [open_for_model(data, 8, region=region).content_hash for region in regions]
        assert len({*hashes}) == len(regions)
        assert hashes[0] == content_hash(data)
        assert hashes[1] == content_hash(data, regions[1])


def damaged(whole: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(whole)
    for at in random.integers(0, len(data), size=3):
        data[at] = random.integers(256)
    return bytes(data)


def outcome(read: Callable[[bytes], object], data: bytes) -> object:
    """What is read, or the kind of error."""
    try:
        return read(data)
    except ImageError as error:
        return type(error)
