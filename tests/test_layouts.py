"""The layouts of other data sets, folders of one's own and tables, read through the one manifest."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from pushpull_jax.data.images import read_mask
from pushpull_jax.data.manifest import Record, fingerprint, share_for_test
from pushpull_jax.data.sources import category_names, read_records
from pushpull_jax.errors import InputError


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def save(path, marked=None, size=(6, 8)):
    """A mask [6,8] with the pixels of some rows marked."""
    pixels = np.zeros(size, np.uint8)
    pixels[[] if marked is None else marked] = 9
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def loco(tmp_path):
    names = ("train/good/0.png", "validation/good/0.png", "test/good/0.png", "test/logical_anomalies/0.png")
    write(tmp_path, *(f"box/{name}" for name in names), "box/test/logical_anomalies/1.png", "box/defects_config.json")
    truth = tmp_path / "box/ground_truth/logical_anomalies"
    save(truth / "0/000.png", [0])
    save(truth / "0/001.png", [3])
    save(truth / "1/000.png", [1])
    return tmp_path


def test_mvtec_loco(loco):
    assert category_names("mvtec_loco", str(loco)) == ("box",)
    records = read_records("mvtec_loco", str(loco), "all")
    assert [(r.key, r.label, r.defect_type, r.split) for r in records] == [
        ("box/test/good/0.png", 0, "good", "test"),
        ("box/test/logical_anomalies/0.png", 1, "logical_anomalies", "test"),
        ("box/test/logical_anomalies/1.png", 1, "logical_anomalies", "test"),
        ("box/train/good/0.png", 0, "good", "train"),
        ("box/validation/good/0.png", 0, "good", "train"),
    ]
    truth = loco / "box/ground_truth/logical_anomalies"
    both = (str(truth / "0/000.png"), str(truth / "0/001.png"))
    assert [r.mask for r in records] == [None, both, str(truth / "1/000.png"), None, None]
    # The pixels of both masks, rows 0 and 3 of 6.
    assert read_mask(records[1], size=(6, 8)).any(axis=1).tolist() == [True, False, False, True, False, False]
    before = fingerprint(records)
    save(truth / "0/001.png", [4])
    assert fingerprint(records) != before
    with pytest.raises(InputError, match=r"0/000.png is 8x6, its image .* 9x6"):
        read_mask(records[1], size=(6, 9))
    for name in both:
        save(truth / name)
    with pytest.raises(InputError, match=r"000.png with .*001.png marks no pixel"):
        read_mask(records[1], size=(6, 8))


def test_faults_of_mvtec_loco(loco):
    write(loco, "box/ground_truth/logical_anomalies/0_mask.png", "box/ground_truth/logical_anomalies/7/000.png")
    write(loco, "box/test/logical_anomalies/2.png")
    with pytest.raises(InputError) as caught:
        read_records("mvtec_loco", str(loco), "box")
    message = str(caught.value)
    assert "belong in a folder below: ground_truth/logical_anomalies/0_mask.png" in message
    assert "masks without their image (NAME/*.png belongs to test/logical_anomalies/NAME.png): ground_truth" in message
    assert "without their mask ground_truth/logical_anomalies/NAME/*.png: test/logical_anomalies/2.png" in message


def test_btad(tmp_path):
    write(tmp_path, *(f"01/{name}" for name in ("train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp")))
    write(tmp_path, "01/ground_truth/ko/2.png", "02/train/ok/0.png")
    assert category_names("btad", str(tmp_path)) == ("01", "02")
    base = tmp_path / "01"
    assert read_records("btad", str(tmp_path), "01") == (
        Record("01/test/ko/2.bmp", f"{base}/test/ko/2.bmp", f"{base}/ground_truth/ko/2.png", 1, "ko", "test", "01"),
        Record("01/test/ok/1.bmp", f"{base}/test/ok/1.bmp", None, 0, "good", "test", "01"),
        Record("01/train/ok/0.bmp", f"{base}/train/ok/0.bmp", None, 0, "good", "train", "01"),
    )
    with pytest.raises(InputError, match="no folder of normal training images: train/good"):
        read_records("mvtec_ad", str(tmp_path), "01")


@pytest.fixture
def kolektor(tmp_path):
    """Four commutators with two surfaces each; the second of 2 and of 3 is defective."""
    for number in range(1, 5):
        for part in range(2):
            write(tmp_path, f"kos{number:02}/Part{part}.jpg")
            save(tmp_path / f"kos{number:02}/Part{part}_label.bmp", [2] if part and number in (2, 3) else None)
    return tmp_path


def test_kolektor_sdd(kolektor):
    assert category_names("kolektor_sdd", str(kolektor)) == ("kolektor_sdd",)
    records = read_records("kolektor_sdd", str(kolektor), "all")
    assert [(r.key, r.label, r.split) for r in records] == [
        ("kos01/Part0.jpg", 0, "train"),
        ("kos01/Part1.jpg", 0, "train"),
        ("kos02/Part0.jpg", 0, "train"),
        ("kos02/Part1.jpg", 1, "train"),
        ("kos03/Part0.jpg", 0, "test"),
        ("kos03/Part1.jpg", 1, "test"),
        ("kos04/Part0.jpg", 0, "train"),
        ("kos04/Part1.jpg", 0, "train"),
    ]
    assert records[5].mask == str(kolektor / "kos03/Part1_label.bmp") and records[5].defect_type == "defect"
    assert read_mask(records[5], size=(6, 8)).sum() == 8 and not read_mask(records[4], size=(6, 8)).any()


def test_faults_of_kolektor_sdd(kolektor):
    write(kolektor, "kos04/Part5.jpg")
    (kolektor / "kos01/Part1.jpg").unlink()
    with pytest.raises(InputError) as caught:
        read_records("kolektor_sdd", str(kolektor), "kolektor_sdd")
    assert "masks without their image: kos01/Part1_label.bmp" in str(caught.value)
    assert "images without their mask NAME_label.bmp: kos04/Part5.jpg" in str(caught.value)
    faults = {}
    write(kolektor, "kos03/Part0_label.bmp")
    records = read_records("kolektor_sdd", str(kolektor), "all", faults=faults)
    assert {r.key: r.label for r in records if r.label != 0} == {
        "kos02/Part1.jpg": 1,
        "kos03/Part0.jpg": None,
        "kos03/Part1.jpg": 1,
        "kos04/Part5.jpg": None,
    }
    assert {fault.kind: files for fault, files in faults.items() if files} == {
        "image_without_mask": [kolektor / "kos04/Part5.jpg"],
        "mask_without_image": [kolektor / "kos01/Part1_label.bmp"],
    }


def test_good_and_bad(tmp_path):
    write(tmp_path, *(f"nut/good/{number}.jpg" for number in range(10)), *(f"nut/bad/{n}.jpg" for n in "ab"))
    records = read_records("good_bad", str(tmp_path), "nut")
    tested = {record.key for record in records if record.split == "test"}
    assert len(records) == 12 and {"nut/bad/a.jpg", "nut/bad/b.jpg"} <= tested and len(tested) == 4
    assert {(r.label, r.defect_type, r.mask) for r in records} == {(0, "good", None), (1, "bad", None)}
    # An image that is added moves none but by the size of a fifth.
    write(tmp_path, "nut/good/new.jpg")
    more = {record.key for record in read_records("good_bad", str(tmp_path), "nut") if record.split == "test"}
    assert len(more) == 4 and len(tested - more) <= 1
    write(tmp_path, "nut/masks/a.png", "nut/masks/b_mask.png")
    masks = {r.key: r.mask for r in read_records("good_bad", str(tmp_path), "all") if r.mask}
    assert masks == {
        "nut/bad/a.jpg": str(tmp_path / "nut/masks/a.png"),
        "nut/bad/b.jpg": str(tmp_path / "nut/masks/b_mask.png"),
    }
    write(tmp_path, "nut/masks/c.png", "nut/masks/a_mask.png", "nut/bad/d.jpg")
    with pytest.raises(InputError) as caught:
        read_records("good_bad", str(tmp_path), "nut")
    assert "masks without their image in bad: masks/c.png" in str(caught.value)
    assert "more than one mask for one image: masks/a.png, masks/a_mask.png" in str(caught.value)
    assert "bad images without their mask masks/NAME.png: bad/d.jpg" in str(caught.value)
    with pytest.raises(InputError, match="looks like a category itself"):
        read_records("good_bad", str(tmp_path / "nut"), "nut")


def test_share_that_is_tested():
    keys = [f"{number}.png" for number in range(100)]
    shares = {count: len(share_for_test(keys[:count])) for count in (0, 1, 2, 10, 100)}
    assert shares == {0: 0, 1: 0, 2: 1, 10: 2, 100: 20}  # round(n / 5), one of two
    assert share_for_test(keys) == share_for_test(keys[::-1]) != set(keys[:20])


@pytest.fixture
def table(tmp_path):
    write(tmp_path, "x/0.png", "x/1.png", "x/2.png", "m/2.png", "m/2b.png")
    return tmp_path / "parts.csv"


def test_tables(table):
    base = table.parent
    table.write_text(
        "\ufeffpath,label,mask,split,category\n"
        "x/0.png,normal,,train,nut\n"
        "x/1.png,,,test,nut\n"
        f"{base}/x/2.png,BAD,m/2.png,test,nut\n",
        encoding="utf-8",
    )
    lines = (
        {"path": "x/0.png", "label": 0, "split": "train", "category": "nut"},
        {"path": "x/1.png", "label": None, "split": "test", "category": "nut", "mask": None},
        {"path": f"{base}/x/2.png", "label": True, "split": "test", "category": "nut", "mask": ["m/2.png"]},
    )
    as_json = base / "parts.jsonl"
    as_json.write_text("\n\n".join(map(json.dumps, lines)))
    image = f"{base}/x/2.png"
    expected = (
        Record(image, image, f"{base}/m/2.png", 1, "bad", "test", "nut"),
        Record("x/0.png", f"{base}/x/0.png", None, 0, "good", "train", "nut"),
        Record("x/1.png", f"{base}/x/1.png", None, None, "unlabelled", "test", "nut"),
    )
    for path in (table, as_json):
        assert category_names("manifest", str(path)) == ("nut",)
        assert read_records("manifest", str(path), "all") == expected


def test_tables_without_split_category_or_type(table):
    table.write_text("label,path,defect_type\n0,x/0.png,\n0,x/1.png,\n1,x/2.png,dent\n")
    records = read_records("manifest", str(table), "parts")
    assert [(r.label, r.defect_type, r.category) for r in records] == [
        (0, "good", "parts"),
        (0, "good", "parts"),
        (1, "dent", "parts"),
    ]
    tested = share_for_test(["x/0.png", "x/1.png"]) | {"x/2.png"}
    assert {r.key for r in records if r.split == "test"} == tested
    several = table.with_suffix(".jsonl")
    several.write_text(json.dumps({"path": "x/2.png", "label": "ko", "mask": ["m/2.png", "m/2b.png"]}))
    (record,) = read_records("manifest", str(several), "parts")
    assert record.mask == (str(table.parent / "m/2.png"), str(table.parent / "m/2b.png"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("path,label,masks\nx/0.png,0,\n", "unknown column 'masks'; did you mean mask"),
        ("path,mask\nx/0.png,\n", "no column 'label', got: path, mask"),
        ("path,label\nx/0.png\n", "row 2 has 1 fields, expected 2"),
        ("path,label\n,0\n", "row 2 has no path"),
        ("path,label\n", "holds no row"),
        ("path,label\nx/0.png,fine\n", "rows that are none: row 2: label must be one of normal, .* got 'fine'"),
        ("path,label,split\nx/0.png,0,train\nx/1.png,0,\n", "row 3: split must be train or test, got ''"),
        ("path,label\nx/0.png,0\nx/0.png,1\n", "twice: x/0.png"),
        ("path,label\nx/0.png,0\n./x/0.png,1\n", "twice: ./x/0.png, x/0.png"),
        ("path,label\nx/7.png,0\n", "do not exist: x/7.png"),
        ("path,label,mask\nx/0.png,1,m/7.png\n", "do not exist: m/7.png"),
        ("path,label,category\nx/0.png,0,nut\n", "no category 'parts' in .*parts.csv, which holds: nut"),
    ],
)
def test_faults_of_tables(table, text, named):
    table.write_text(text)
    with pytest.raises(InputError, match=named):
        read_records("manifest", str(table), "parts")


def test_faults_of_json_lines(table):
    lines = table.with_suffix(".jsonl")
    for text, named in (("{", "row 1 is no JSON"), ("[1]", "row 1 must be an object"), ("", "holds no row")):
        lines.write_text(text)
        with pytest.raises(InputError, match=named):
            read_records("manifest", str(lines), "parts")
    with pytest.raises(InputError, match=re.escape(f"no file {table}")):
        read_records("manifest", str(table), "parts")
