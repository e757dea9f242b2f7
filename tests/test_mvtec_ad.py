"""The reader of the MVTec-AD layout, and what is done with a manifest: hold-out, fingerprint."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pushpull_jax.data.manifest import Record, fingerprint, hold_out, is_image_name, listed
from pushpull_jax.data.mvtec_ad import read_mvtec_ad
from pushpull_jax.data.split_folders import categories
from pushpull_jax.errors import InputError

SHARED = Path(os.environ.get("PUSHPULL_SHARED") or Path(__file__).parents[2] / "shared" / "data")


def write(root: Path, *names: str) -> None:
    """Files whose contents are their names: the reader decodes nothing."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


@pytest.fixture
def root(tmp_path):
    """Three training images, one good and two scratched test images with masks, one dent with a label only."""
    write(tmp_path, *[f"bolt/train/good/{number:03}.png" for number in range(3)])
    write(tmp_path, "bolt/test/good/000.png", "bolt/test/scratch/000.png", "bolt/test/scratch/001.png")
    write(tmp_path, "bolt/ground_truth/scratch/000_mask.png", "bolt/ground_truth/scratch/001_mask.png")
    write(tmp_path, "bolt/test/dent/000.png")
    return tmp_path


def train_records(count: int) -> tuple[Record, ...]:
    names = [f"c/train/good/{number:03}.png" for number in range(count)]
    return tuple(Record(name, f"/{name}", None, 0, "good", "train") for name in names)


def test_records_of_the_layout(root):
    records = {record.key: record for record in read_mvtec_ad(root, "bolt")}
    assert list(records) == sorted(records) and len(records) == 7
    assert records["bolt/train/good/002.png"] == Record(
        "bolt/train/good/002.png", str(root / "bolt/train/good/002.png"), None, 0, "good", "train", "bolt"
    )
    assert records["bolt/test/scratch/001.png"] == Record(
        "bolt/test/scratch/001.png",
        str(root / "bolt/test/scratch/001.png"),
        str(root / "bolt/ground_truth/scratch/001_mask.png"),
        1,
        "scratch",
        "test",
        "bolt",
    )
    assert (records["bolt/test/dent/000.png"].label, records["bolt/test/dent/000.png"].mask) == (1, None)
    assert records["bolt/test/good/000.png"].label == 0


def test_paths_are_absolute_for_a_relative_root(root, monkeypatch):
    monkeypatch.chdir(root)
    assert read_mvtec_ad(".", "bolt") == read_mvtec_ad(root, "bolt")


def test_masks_are_paired_by_name_not_by_order(tmp_path):
    # Sorted, "1.jpg" comes before "10.TIFF" but "1_mask" after "10_mask": pairing by order would swap them.
    write(tmp_path, "c/train/good/0.PNG", "c/test/cut/1.jpg", "c/test/cut/10.TIFF", "c/test/cut/a_mask.bmp")
    write(tmp_path, *[f"c/ground_truth/cut/{name}" for name in ("1_mask.PNG", "10_mask.png", "a_mask_mask.png")])
    masks = {Path(record.image).name: record.mask for record in read_mvtec_ad(tmp_path, "c") if record.mask}
    assert {name: Path(mask).name for name, mask in masks.items()} == {
        "1.jpg": "1_mask.PNG",
        "10.TIFF": "10_mask.png",
        "a_mask.bmp": "a_mask_mask.png",
    }


def test_bystanders_are_ignored_and_others_reported(root):
    write(root, "bolt/train/good/.DS_Store", "bolt/train/good/._000.png", "bolt/test/good/Thumbs.db")
    write(root, "bolt/license.txt", "bolt/test/scratch/notes.txt")
    assert len(read_mvtec_ad(root, "bolt")) == 7
    write(root, "bolt/train/good/003.webp")
    with pytest.warns(UserWarning, match=r"ignored: train/good/003\.webp"):
        assert len(read_mvtec_ad(root, "bolt")) == 7


def test_good_may_have_masks(root):
    write(root, "bolt/test/good/001.png", "bolt/ground_truth/good/001_mask.png")
    masks = {record.key: record.mask for record in read_mvtec_ad(root, "bolt")}
    assert masks["bolt/test/good/000.png"] is None
    assert masks["bolt/test/good/001.png"] == str(root / "bolt/ground_truth/good/001_mask.png")


@pytest.mark.parametrize(
    ("added", "named"),
    [
        (["ground_truth/scratch/002_mask.png"], "masks without their image.*ground_truth/scratch/002_mask.png"),
        (["ground_truth/crack/000_mask.png"], "masks without their image.*ground_truth/crack/000_mask.png"),
        (["ground_truth/scratch/000.png"], "masks without their image.*ground_truth/scratch/000.png"),
        (["test/scratch/002.png"], "without their mask ground_truth/scratch/NAME_mask.png: test/scratch/002.png"),
        (["ground_truth/dent/readme.txt"], "images without their mask.*test/dent/000.png"),
        (["ground_truth/scratch/000_mask.bmp"], r"more than one mask.*000_mask\.bmp, .*scratch/000_mask\.png"),
        (["test/scratch/000.jpg"], r"one name.*test/scratch/000\.jpg, test/scratch/000\.png"),
        (["train/scratch/000.png"], "training folders other than train/good: train/scratch"),
        (["test/000.png"], "belong in a folder below: test/000.png"),
        (["ground_truth/scratch/000/000.png"], "folders where images belong: ground_truth/scratch/000"),
    ],
)
def test_faults_of_pairing_are_named(root, added, named):
    write(root, *[f"bolt/{name}" for name in added])
    with pytest.raises(InputError, match=named):
        read_mvtec_ad(root, "bolt")


def test_all_faults_in_one_message_ten_named_then_counted(root):
    write(root, *[f"bolt/test/scratch/{number:03}.png" for number in range(2, 15)])
    write(root, "bolt/ground_truth/scratch/x_mask.png")
    with pytest.raises(InputError) as caught:
        read_mvtec_ad(root, "bolt")
    message = str(caught.value)
    assert "test/scratch/011.png, and 3 more" in message and "test/scratch/012.png" not in message
    assert "ground_truth/scratch/x_mask.png" in message and str(root / "bolt") in message


def test_missing_root_names_the_nearest_parent_and_name(root):
    with pytest.raises(InputError, match=re.escape(f"nearest folder that does is {root}; it holds the folders: bolt")):
        read_mvtec_ad(root / "x" / "y", "bolt")
    with pytest.raises(InputError, match=re.escape(f"did you mean {root / 'bolt'}?")):
        categories(root / "bolts")
    write(root, "file")
    with pytest.raises(InputError, match="is a file, not a folder"):
        categories(root / "file")


def test_missing_category_names_those_there(root):
    write(root, "nut/train/good/0.png", "papers/x.txt", ".hidden/train/good/0.png")
    assert categories(root) == ("bolt", "nut")
    with pytest.raises(InputError, match=r"'bolz' in .* which holds: bolt, nut; did you mean bolt\?"):
        read_mvtec_ad(root, "bolz")
    with pytest.raises(InputError, match=re.escape(f"the data folder is {root}, the category bolt")):
        read_mvtec_ad(root / "bolt", "screw")
    for name in ("", "..", "nut/train"):
        with pytest.raises(InputError, match="category must be the name of a folder"):
            read_mvtec_ad(root, name)


def test_missing_or_empty_train_good(tmp_path):
    write(tmp_path, "c/test/good/0.png")
    with pytest.raises(InputError, match="no folder of normal training images: train/good"):
        read_mvtec_ad(tmp_path, "c")
    write(tmp_path, "c/train/good/readme.txt")
    with pytest.raises(InputError, match=r"no image \(\.png.* among .*: train/good"):
        read_mvtec_ad(tmp_path, "c")


def test_hold_out_is_a_partition_of_the_normal_training_records():
    records = train_records(20)
    others = (replace(records[0], key="a", label=1), replace(records[0], key="b", label=None))
    others += (replace(records[0], key="t", split="test"),)
    fit, held = hold_out((*records, *others), fraction=0.25, seed=3)
    assert len(held) == 5 and sorted((*fit, *held), key=lambda record: record.key) == list(records)
    assert [list(part) == sorted(part, key=lambda record: record.key) for part in (fit, held)] == [True, True]
    assert (fit, held) == hold_out((*others, *records[::-1]), fraction=0.25, seed=3)
    assert held != hold_out(records, fraction=0.25, seed=4)[1]
    # Not simply one end of the list: over 40 seeds every record is held out at some time.
    assert {record for seed in range(40) for record in hold_out(records, fraction=0.25, seed=seed)[1]} == set(records)


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(0, 0.5, 0), (1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0.99, 9), (209, 0.1, 21)]
)
def test_sizes_of_the_held_out_part(count, fraction, held):
    assert [len(part) for part in hold_out(train_records(count), fraction=fraction, seed=0)] == [count - held, held]


def test_fractions_outside_0_to_1_are_refused():
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="above 0 and below 1"):
            hold_out(train_records(4), fraction=fraction, seed=0)


def test_fingerprint_depends_on_records_and_contents_but_not_on_the_place(root, tmp_path_factory):
    records = read_mvtec_ad(root, "bolt")
    reference = fingerprint(records)
    assert re.fullmatch("[0-9a-f]{64}", reference) and fingerprint(records[::-1]) == reference
    moved = tmp_path_factory.mktemp("moved") / "data"
    root.rename(moved)
    records = read_mvtec_ad(moved, "bolt")
    assert fingerprint(records) == reference
    variants = [{"label": 0}, {"defect_type": "x"}, {"split": "train"}, {"key": "x"}, {"mask": None}]
    position = next(position for position, record in enumerate(records) if record.mask)
    changed = [(*records[:position], replace(records[position], **v), *records[position + 1 :]) for v in variants]
    seen = {reference, *map(fingerprint, changed), fingerprint(records[1:])}
    assert len(seen) == 7
    for path in (records[position].mask, records[0].image):
        Path(path).write_text("other contents")
        seen.add(fingerprint(records))
    assert len(seen) == 9
    Path(records[0].image).unlink()
    with pytest.raises(InputError, match=re.escape(records[0].image)):
        fingerprint(records)


def test_names_of_images():
    assert all(map(is_image_name, ("a.png", "a.b.JPG", "a.jpeg", "a.Bmp", "a.tif", "a.TIFF")))
    assert not any(map(is_image_name, ("a.gif", "png", "a.png.txt", "._a.png", ".png")))


def test_listed_counts_what_it_leaves_out():
    assert listed(["a", "b"]) == "a, b" and listed(["a", "b", "c"], limit=1) == "a, and 2 more" and listed([]) == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real images; set PUSHPULL_SHARED to one")
def test_real_categories():
    # Counts of the official split (bottle), and of the notes that come with these folders.
    for folder, category, counts in (
        ("mvtec_ad_256", "bottle", (209, 20, 63)),
        ("mvtec_ad_256", "toothbrush", (48, 12, 30)),
        ("mvtec_loco_256", "juice_bottle", (335, 54, 142)),
    ):
        records = read_mvtec_ad(SHARED / folder, category)
        kinds = [(record.split, record.label) for record in records]
        assert tuple(kinds.count(kind) for kind in (("train", 0), ("test", 0), ("test", 1))) == counts
        assert all((record.mask is not None) == (record.label == 1) for record in records)
