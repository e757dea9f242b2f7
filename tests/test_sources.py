"""From a source's name to records: all categories, images that have nothing to do with the data."""

import re

import pytest

from pushpull_jax.data.images import read_image, read_mask
from pushpull_jax.data.manifest import Record, Stored, fingerprint
from pushpull_jax.data.pipeline import check_readable
from pushpull_jax.data.sources import category_names, read_irrelevant, read_records
from pushpull_jax.errors import InputError


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_all_categories_of_a_folder(tmp_path):
    write(tmp_path, "nut/train/good/0.png", "bolt/train/good/0.png", "bolt/test/dent/0.png", "papers/x.txt")
    assert category_names("mvtec_ad", str(tmp_path)) == ("bolt", "nut")
    everything = read_records("mvtec_ad", str(tmp_path), "all")
    assert [(record.key, record.category) for record in everything] == [
        ("bolt/test/dent/0.png", "bolt"),
        ("bolt/train/good/0.png", "bolt"),
        ("nut/train/good/0.png", "nut"),
    ]
    assert read_records("mvtec_ad", str(tmp_path), "nut") == everything[2:]
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'papers'} holds no category")):
        read_records("mvtec_ad", str(tmp_path / "papers"), "all")


@pytest.fixture
def folder(tmp_path):
    """Twenty images at two depths, and what is none."""
    write(tmp_path, *(f"a/b/{number:02}.JPG" for number in range(12)), *(f"{number:02}.png" for number in range(8)))
    write(tmp_path, "notes.txt", "._00.png", ".thumbnails/00.png", "a/.cache/00.png")
    return tmp_path


def test_irrelevant_images_are_drawn_by_the_seed(folder):
    drawn = read_irrelevant(str(folder), count=5, seed=1)
    assert len({record.key for record in drawn}) == 5
    for record in drawn:
        path = folder / record.key.removeprefix("irrelevant/")
        assert path.is_file()
        assert record == Record(record.key, str(path), None, 1, "irrelevant", "train", category="irrelevant")
    assert drawn == read_irrelevant(str(folder), count=5, seed=1) != read_irrelevant(str(folder), count=5, seed=2)
    # Every image is drawn at some time, and none that is hidden.
    seen = {record.key for seed in range(40) for record in read_irrelevant(str(folder), count=5, seed=seed)}
    assert len(seen) == 20 and not any("/." in key for key in seen)


def test_irrelevant_images_where_there_are_too_few(folder, tmp_path_factory):
    everything = read_irrelevant(str(folder), count=20, seed=0)
    assert len(everything) == 20
    with pytest.warns(UserWarning, match=f"{folder}: 20 irrelevant images, 21 were asked for: all taken"):
        assert read_irrelevant(str(folder), count=21, seed=0) == everything
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=f"{empty}: no image in it or below"):
        read_irrelevant(str(empty), count=1, seed=0)
    with pytest.raises(InputError, match="data folder .*nowhere does not exist"):
        read_irrelevant(str(empty / "nowhere"), count=1, seed=0)
    with pytest.raises(InputError, match="at least 1, got 0"):
        read_irrelevant(str(folder), count=0, seed=0)


def test_messages_name_what_is_stored():
    record = Record("k", Stored("k in DATA", lambda: b"text"), Stored("mask of k in DATA", lambda: b""), 1, "", "test")
    with pytest.raises(InputError, match="k in DATA: cannot be read as an image"):
        read_image(record)
    with pytest.raises(InputError, match="mask of k in DATA: cannot be read as an image: the file is empty"):
        read_mask(record, size=(1, 1))
    with pytest.raises(InputError, match="1 of 1 examples cannot be read:\n  k in DATA"):
        check_readable([record])


def test_stored_files_have_the_fingerprint_of_their_contents(tmp_path):
    write(tmp_path, "image.png", "mask.png")
    plain = Record("k", str(tmp_path / "image.png"), str(tmp_path / "mask.png"), 1, "dent", "test")
    stored = Record("k", Stored("a", lambda: b"image.png"), Stored("b", lambda: b"mask.png"), 1, "dent", "test")
    assert fingerprint([stored]) == fingerprint([plain])
    other = Record("k", Stored("a", lambda: b"image.png"), Stored("b", lambda: b"other"), 1, "dent", "test")
    assert fingerprint([other]) != fingerprint([plain])
