"""The reader of the extracted VisA archive."""

import pytest

from pushpull_jax.data.manifest import Record
from pushpull_jax.data.sources import category_names, read_records
from pushpull_jax.data.visa import read_visa, visa_categories
from pushpull_jax.errors import InputError

HEADER = "object,split,label,image,mask"
ROWS = (
    "candle,train,normal,candle/Data/Images/Normal/0001.JPG,",
    "candle,test,normal,candle/Data/Images/Normal/0000.JPG,",
    "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png",
    "candle,train,anomaly,candle/Data/Images/Anomaly/001.JPG,candle/Data/Masks/Anomaly/001.png",
    "pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,",
)


@pytest.fixture
def root(tmp_path):
    for row in ROWS:
        for name in row.split(",")[3:]:
            if name:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(name)
    table(tmp_path, *ROWS)
    return tmp_path


def table(root, *rows, header=HEADER):
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "2cls_fewshot.csv").write_text("\r\n".join((header, *rows, "")))


def test_records_of_the_layout(root):
    folder = root / "candle" / "Data"
    images, masks = folder / "Images", folder / "Masks" / "Anomaly"
    key = "candle/Data/Images"
    expected = (
        Record(f"{key}/Anomaly/000.JPG", str(images / "Anomaly/000.JPG"), str(masks / "000.png"), 1, "anomaly", "test"),
        Record(
            f"{key}/Anomaly/001.JPG", str(images / "Anomaly/001.JPG"), str(masks / "001.png"), 1, "anomaly", "train"
        ),
        Record(f"{key}/Normal/0000.JPG", str(images / "Normal/0000.JPG"), None, 0, "good", "test"),
        Record(f"{key}/Normal/0001.JPG", str(images / "Normal/0001.JPG"), None, 0, "good", "train"),
    )
    records = read_visa(root, "candle", protocol="2cls_fewshot")
    assert [vars(record) for record in records] == [vars(record) | {"category": "candle"} for record in expected]
    assert visa_categories(root, "2cls_fewshot") == category_names("visa_2cls_fewshot", str(root)) == ("candle", "pcb1")
    everything = read_records("visa_2cls_fewshot", str(root), "all")
    assert everything == (*records, *read_visa(root, "pcb1", protocol="2cls_fewshot"))


def test_types_of_defects_come_from_the_annotations(root):
    (root / "candle" / "image_anno.csv").write_text(
        "image,label,mask\n"
        "candle/Data/Images/Normal/0000.JPG,normal,\n"
        'candle/Data/Images/Anomaly/000.JPG,"melt, weird candle wick",candle/Data/Masks/Anomaly/000.png\n'
        "candle/Data/Images/Anomaly/001.JPG,melt ,candle/Data/Masks/Anomaly/001.png\n"
    )
    kinds = [record.defect_type for record in read_visa(root, "candle", protocol="2cls_fewshot")]
    assert kinds == ["combined", "melt", "good", "good"]


def test_missing_tables_and_categories(root):
    with pytest.raises(InputError, match=r"no file .*split_csv/1cls\.csv"):
        read_records("visa", str(root), "candle")
    with pytest.raises(InputError, match=r"no category 'pcb2' in .*2cls_fewshot\.csv.*candle, pcb1; did you mean pcb1"):
        read_visa(root, "pcb2", protocol="2cls_fewshot")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (ROWS[0], "stand in the table twice: candle/Data/Images/Normal/0001.JPG"),
        ("candle,test,normal,candle/Data/Images/Normal/9.JPG,", "do not exist: candle/Data/Images/Normal/9.JPG"),
        ("candle,test,anomaly,candle/Data/Images/Normal/0000.JPG,", "anomalies without a mask: candle/.*/0000.JPG"),
        ("candle,val,normal,candle/Data/Images/Normal/0000.JPG,", "rows without a split.*candle,val,normal"),
        ("candle,test,bad,candle/Data/Images/Normal/0000.JPG,", "or a label.*candle,test,bad"),
        ("candle,test,normal,candle/Data/Images/Normal/0000.JPG", "row 7 has 4 fields, expected 5"),
    ],
)
def test_faults_of_a_table_are_named(root, row, named):
    table(root, *ROWS, row)
    with pytest.raises(InputError, match=named):
        read_visa(root, "candle", protocol="2cls_fewshot")


def test_other_tables_are_refused(root):
    table(root, header="object,set,label,image,mask")
    with pytest.raises(InputError, match=f"first line must be {HEADER}, got object,set"):
        read_visa(root, "candle", protocol="2cls_fewshot")
    (root / "split_csv" / "2cls_fewshot.csv").write_text("")
    with pytest.raises(InputError, match=r"2cls_fewshot\.csv: cannot be read as a table"):
        read_visa(root, "candle", protocol="2cls_fewshot")
