"""Class subfolders read as one normal class against the others."""

import re

import numpy as np
import pytest
from PIL import Image

from pushpull_jax.data.class_folders import class_names, one_class_record, read_class_folders
from pushpull_jax.data.images import read_image
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.data.sources import category_names, read_records
from pushpull_jax.errors import InputError


def write(root, *names):
    """Files whose contents are their names: the reader decodes nothing."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "train/cat/0.jpg", "train/cat/1.png", "train/dog/0.jpg", "train/notes.txt", ".git/train/x/0.png")
    write(tmp_path, "test/cat/0.jpg", "test/dog/0.jpg", "test/dog/1.jpg", "test/fox/0.jpg", "test/fox/readme.md")
    return tmp_path


def test_one_class_is_normal_and_the_whole_test_set_is_used(root):
    def record(key, label, kind):
        return Record(key, str(root / key), None, label, kind, key.split("/")[0], category="cat")

    assert read_class_folders(root, "cat") == (
        record("test/cat/0.jpg", 0, "good"),
        record("test/dog/0.jpg", 1, "dog"),
        record("test/dog/1.jpg", 1, "dog"),
        # A class that is never trained on is an anomaly like the others.
        record("test/fox/0.jpg", 1, "fox"),
        record("train/cat/0.jpg", 0, "good"),
        record("train/cat/1.png", 0, "good"),
    )
    assert read_records("classes", str(root), "cat") == read_class_folders(root, "cat")
    assert class_names(root) == category_names("classes", str(root)) == ("cat", "dog")


def test_labels_turn_with_the_normal_class(root):
    labels = {record.key: record.label for record in read_class_folders(root, "dog")}
    assert labels == {
        "test/cat/0.jpg": 1, "test/dog/0.jpg": 0, "test/dog/1.jpg": 0, "test/fox/0.jpg": 1, "train/dog/0.jpg": 0,
    }  # fmt: skip
    # A class that is called good is an anomaly where it is not the normal one.
    assert one_class_record("k", "i", shows="good", split="test", normal="bad").label == 1


def test_what_is_missing_or_out_of_place_is_named(root):
    with pytest.raises(
        InputError, match=rf"no category 'cats' in {root}/train, which holds: cat, dog; did you mean cat"
    ):
        read_class_folders(root, "cats")
    with pytest.raises(InputError, match='"all" is none of classes, where the category is .*: cat, dog'):
        read_records("classes", str(root), "all")
    with pytest.raises(InputError, match=re.escape(f"{root / 'test'}: no folder train")):
        read_class_folders(root / "test", "cat")
    with pytest.raises(InputError, match="does not exist; the nearest folder"):
        read_class_folders(root / "nowhere", "cat")
    (root / "train" / "owl").mkdir()
    with pytest.raises(InputError, match=r"class owl in .*\n  no image \(\.png.*\) of the normal class: train/owl"):
        read_class_folders(root, "owl")
    write(root, "test/fox/deeper/0.jpg")
    with pytest.raises(InputError, match="folders where images belong: test/fox/deeper"):
        read_class_folders(root, "cat")


def test_images_of_32_pixels_pass_the_pipeline_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for position, image in enumerate(pixels):
        path = tmp_path / "train" / "cat" / f"{position}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for mode in ("stretch", "letterbox"):
        (batch,) = image_batches(read_class_folders(tmp_path, "cat"), image_size=32, batch_size=4, resize=mode)
        np.testing.assert_array_equal(batch["image"], pixels)


def test_real_classes(shared_data):
    # 500 training images a class and 100 test images, as the notes that come with them say.
    records = read_class_folders(shared_data / "cifar10_jpg", "ship")
    kinds = [(record.split, record.label) for record in records]
    assert [kinds.count(kind) for kind in (("train", 0), ("test", 0), ("test", 1))] == [500, 100, 900]
    assert len(kinds) == 1500 and len({record.defect_type for record in records}) == 10
    assert read_image(records[0]).shape == (32, 32, 3)
