"""Which files a command line names, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.files import InputError, find_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "photos/b.JPG",
        "photos/a.png",
        "photos/deep/down/c.heic",
        "photos/notes.txt",
        "photos/.hidden.png",
        "photos/.cache/d.png",
        "other/a.png",
        "results/masks/a.png.cat.png",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return tmp_path


def names(*arguments: str, masks: str = "results/masks") -> list[str]:
    return [image.name for image in find_images(arguments, Path(masks))]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        pytest.param("photos", ["a.png", "b.JPG", "deep/down/c.heic"], id="folder"),
        pytest.param("photos/", ["a.png", "b.JPG", "deep/down/c.heic"], id="folder with a slash"),
        pytest.param("photos/*", ["a.png", "b.JPG"], id="pattern"),
        pytest.param("photos/**/*.*", ["a.png", "b.JPG", "deep/down/c.heic"], id="pattern all the way down"),
        pytest.param("*/a.png", ["other/a.png", "photos/a.png"], id="pattern of folders"),
        pytest.param("photos/notes.txt", ["notes.txt"], id="a file, whatever its name"),
        pytest.param(".", ["other/a.png", "photos/a.png", "photos/b.JPG", "photos/deep/down/c.heic"], id="."),
    ],
)
def test_images_are_found_and_named_below_what_named_them(
    folder: Path, argument: str, expected: list[str]
) -> None:
    assert names(argument) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder: Path) -> None:
    (folder / "photos/[x].png").write_bytes(b"")
    assert names("photos/[x].png") == ["[x].png"]


def test_a_file_named_twice_is_taken_once(folder: Path) -> None:
    assert names("photos", "photos/a.png", "photos/../photos") == ["a.png", "b.JPG", "deep/down/c.heic"]


def test_masks_are_not_segmented_in_their_turn(folder: Path) -> None:
    assert names("photos", masks="photos/deep") == ["a.png", "b.JPG"]


def test_two_files_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"would both be a\.png"):
        names("photos", "other")


@pytest.mark.parametrize("argument", ["nowhere", "photos/*.gif", "nowhere/*.png", "photos/.cache/../none"])
def test_naming_nothing_is_an_error(folder: Path, argument: str) -> None:
    with pytest.raises(InputError, match="names no image"):
        names(argument)


@pytest.mark.parametrize("argument", ["photos/*/../../other/*.png", "photos/*/../*.png", "*/../other/a.png"])
def test_a_pattern_that_goes_up_again_would_have_results_elsewhere_and_is_refused(
    folder: Path, argument: str
) -> None:
    with pytest.raises(InputError, match="goes up again behind a wildcard"):
        names(argument)


def test_a_pattern_may_begin_further_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "photos")
    assert names("../other/*.png", "../photos/deep/*/*") == ["a.png", "down/c.heic"]
