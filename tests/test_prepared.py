"""Data sets of tensorflow-datasets, prepared for real from miniature archives in the official layouts."""

import hashlib
import io
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pushpull_jax.data.images import read_image, read_mask
from pushpull_jax.data.manifest import Record, Stored, fingerprint
from pushpull_jax.data.mvtec_ad import MVTEC_AD_ARCHIVE
from pushpull_jax.data.pipeline import check_readable, image_batches
from pushpull_jax.data.prepared import CIFAR10_CLASSES
from pushpull_jax.data.sources import category_names, read_irrelevant, read_records
from pushpull_jax.data.visa import VISA_ARCHIVES
from pushpull_jax.errors import InputError

# Names of classes that CIFAR-100 has.
COUNTS = {"coarse": 20, "fine": 100}
# A port that nothing listens on: whatever goes to the internet fails at once, on any machine.
OFFLINE = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower(), value)


def pixels(name: str, *, shape: tuple[int, ...] = (12, 9, 3)) -> np.ndarray:
    """Pixels that tell each file from every other."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "JPEG" if path.suffix == ".JPG" else "PNG")


def write_mask(path: Path, *, values: int) -> None:
    """A mask with one anomalous row, of the value that the data set uses."""
    mask = np.zeros((12, 9), np.uint8)
    mask[len(path.stem)] = values
    write_image(path, mask)


def archive(folder: Path, path: Path, mode: str) -> Path:
    """An archive of what a folder holds, its members at the top, as the official ones have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for entry in sorted(folder.iterdir()):
            tar.add(entry, arcname=entry.name)
    return path


def same(prepared: tuple[Record, ...], folder: tuple[Record, ...]) -> None:
    """Records agree in every field; images and masks bit for bit."""
    assert [replace(record, image="", mask=None) for record in prepared] == [
        replace(record, image="", mask=None) for record in folder
    ]
    for ours, reference in zip(prepared, folder, strict=True):
        assert isinstance(ours.image, Stored) and isinstance(reference.image, str)
        image = read_image(ours)
        np.testing.assert_array_equal(image, read_image(reference))
        assert (ours.mask is None) == (reference.mask is None)
        masks = [read_mask(record, size=image.shape[:2]) for record in (ours, reference)]
        np.testing.assert_array_equal(*masks)
    assert fingerprint(prepared) == fingerprint(folder)


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory) -> tuple[Path, Path]:
    """A folder in the official layout with two categories, and a data folder with its archive where it belongs."""
    folder, data = tmp_path_factory.mktemp("mvtec"), tmp_path_factory.mktemp("data")
    for category, kinds in (("bottle", ("broken_large", "contamination")), ("zipper", ("rough", "labelled"))):
        # Grey in one category, as in the real zipper.
        shape = (12, 9, 3) if category == "bottle" else (12, 9)
        for part, kind, count in (("train", "good", 12), ("test", "good", 2), *(("test", kind, 2) for kind in kinds)):
            for number in range(count):
                path = folder / category / part / kind / f"{number:03}.png"
                write_image(path, pixels(f"{category}{part}{kind}{number}", shape=shape))
                # Some anomalies are known by their label only.
                if kind not in ("good", "labelled"):
                    write_mask(folder / category / "ground_truth" / kind / f"{number:03}_mask.png", values=255)
        (folder / category / "license.txt").write_text("a licence")
    (folder / "readme.txt").write_text("read me")
    archive(folder, data / "downloads" / "manual" / MVTEC_AD_ARCHIVE, "w:xz")
    return folder, data


def test_prepared_mvtec_ad_equals_its_folder(mvtec):
    folder, data = mvtec
    one = read_records("tfds_mvtec_ad", str(data), "zipper")
    same(one, read_records("mvtec_ad", str(folder), "zipper"))
    assert (data / "mvtec_ad" / "zipper").is_dir() and not (data / "mvtec_ad" / "all").exists()
    everything = read_records("tfds_mvtec_ad", str(data), "all")
    same(everything, read_records("mvtec_ad", str(folder), "all"))
    assert [record.category for record in everything] == ["bottle"] * 18 + ["zipper"] * 18
    assert {record.defect_type for record in everything if record.label} == set(
        "broken_large contamination labelled rough".split()
    )
    # With all prepared, one category is read from there and not prepared again.
    same(read_records("tfds_mvtec_ad", str(data), "bottle"), read_records("mvtec_ad", str(folder), "bottle"))
    assert not (data / "mvtec_ad" / "bottle").exists()
    with pytest.raises(InputError, match="no category 'cable' in .*mvtec_ad/all/1.0.0, which holds: bottle, zipper"):
        read_records("tfds_mvtec_ad", str(data), "cable")


def test_prepared_records_go_through_the_pipeline_in_threads(mvtec):
    folder, data = mvtec
    prepared, plain = (read_records(*source, "all") for source in (("tfds_mvtec_ad", str(data)), ("mvtec_ad", folder)))
    assert check_readable(prepared, threads=4) == prepared
    options = {"image_size": 32, "batch_size": 16, "with_masks": True, "threads": 4}
    for ours, reference in zip(image_batches(prepared, **options), image_batches(plain, **options), strict=True):
        for name in reference:
            np.testing.assert_array_equal(ours[name], reference[name])
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda record: record.image.read(), prepared * 5))
    assert contents == [Path(record.image).read_bytes() for record in plain] * 5


def test_a_manifest_reads_no_image_and_a_damaged_file_is_named(mvtec, tmp_path):
    folder, data = mvtec
    read_records("tfds_mvtec_ad", str(data), "zipper")
    copy = tmp_path / "mvtec_ad" / "zipper" / "1.0.0"
    copy.mkdir(parents=True)
    for path in (data / "mvtec_ad" / "zipper" / "1.0.0").iterdir():
        contents = path.read_bytes()
        if "train" in path.name:
            # Their headers stay; the examples are lost.
            middle = len(contents) // 2
            contents = contents[:100] + bytes(middle) + contents[100 + middle :]
        (copy / path.name).write_bytes(contents)
    records = read_records("tfds_mvtec_ad", str(tmp_path), "zipper")
    assert [record.key for record in records] == [r.key for r in read_records("mvtec_ad", str(folder), "zipper")]
    with pytest.raises(InputError, match=r"zipper/train/good/0.*cannot be read"):
        check_readable(records)


def test_mvtec_ad_without_its_archive_says_where_to_put_it(tmp_path):
    for category in ("bottle", "all"):
        with pytest.raises(InputError) as caught:
            read_records("tfds_mvtec_ad", str(tmp_path), category)
        message = str(caught.value)
        assert f"Put it at {tmp_path / 'downloads' / 'manual' / MVTEC_AD_ARCHIVE}" in message
        assert "https://www.mvtec.com" in message and f"is not prepared in {tmp_path}" in message
    with pytest.raises(InputError, match=r"no category 'botle' in MVTec-AD.*zipper; did you mean bottle\?"):
        read_records("tfds_mvtec_ad", str(tmp_path), "botle")


def test_archives_that_cannot_be_used_are_named(mvtec, tmp_path):
    archived = (mvtec[1] / "downloads" / "manual" / MVTEC_AD_ARCHIVE).read_bytes()
    manual = tmp_path / "cut" / "downloads" / "manual" / MVTEC_AD_ARCHIVE
    manual.parent.mkdir(parents=True)
    manual.write_bytes(archived[: len(archived) // 2])
    with pytest.raises(InputError, match=f"mvtec_ad/zipper/1.0.0 cannot be prepared in .*{MVTEC_AD_ARCHIVE}"):
        read_records("tfds_mvtec_ad", str(tmp_path / "cut"), "zipper")
    # One whose layout has faults gives the message of the folder reader.
    write_image(tmp_path / "faulty" / "tile" / "train" / "good" / "000.png", pixels("tile"))
    write_image(tmp_path / "faulty" / "tile" / "ground_truth" / "crack" / "000_mask.png", pixels("mask"))
    archive(tmp_path / "faulty", tmp_path / "data" / "downloads" / "manual" / MVTEC_AD_ARCHIVE, "w:xz")
    with pytest.raises(InputError, match="masks without their image.*ground_truth/crack/000_mask.png"):
        read_records("tfds_mvtec_ad", str(tmp_path / "data"), "tile")


@pytest.fixture(scope="module")
def visa(tmp_path_factory) -> tuple[Path, Path]:
    """As `mvtec`, for VisA: lines end as in the official tables, and masks hold the number of a class."""
    folder, data = tmp_path_factory.mktemp("visa"), tmp_path_factory.mktemp("data")
    tables = {protocol: ["object,split,label,image,mask"] for protocol in ("1cls", "2cls_fewshot", "2cls_highshot")}
    for category in ("candle", "pcb1"):
        annotations = ["image,label,mask"]
        for number in range(6):
            image = f"{category}/Data/Images/Normal/{number:04}.JPG"
            write_image(folder / image, pixels(image))
            annotations.append(f"{image},normal,")
            for position, rows in enumerate(tables.values()):
                rows.append(f"{category},{'train' if number < 3 + position else 'test'},normal,{image},")
        for number, kind in enumerate(("melt", '"scratch, melt"', "scratch")):
            image = f"{category}/Data/Images/Anomaly/{number:03}.JPG"
            mask = f"{category}/Data/Masks/Anomaly/{number:03}.png"
            write_image(folder / image, pixels(image))
            write_mask(folder / mask, values=1 + number)
            annotations.append(f"{image},{kind},{mask}")
            for position, rows in enumerate(tables.values()):
                rows.append(f"{category},{'train' if number < position else 'test'},anomaly,{image},{mask}")
        (folder / category / "image_anno.csv").write_text("\r\n".join(annotations))
    (folder / "split_csv").mkdir()
    for protocol, rows in tables.items():
        (folder / "split_csv" / f"{protocol}.csv").write_text("\r\n".join([*rows, ""]))
    archive(folder, data / "downloads" / "manual" / VISA_ARCHIVES[0], "w")
    return folder, data


@pytest.mark.parametrize(("source", "shots"), [("visa", 0), ("visa_2cls_fewshot", 1), ("visa_2cls_highshot", 2)])
def test_prepared_visa_equals_its_folder_in_each_protocol(visa, source, shots):
    folder, data = visa
    one = read_records(source, str(data), "pcb1")
    same(one, read_records(source, str(folder), "pcb1"))
    labelled = [(record.split, record.label) for record in one]
    kinds = [("train", 0), ("test", 0), ("train", 1), ("test", 1)]
    assert [labelled.count(kind) for kind in kinds] == [3 + shots, 3 - shots, shots, 3 - shots]
    same(read_records(source, str(data), "all"), read_records(source, str(folder), "all"))


def test_visa_without_its_archive_says_where_to_put_it(tmp_path):
    with pytest.raises(InputError, match=f"Put it at {tmp_path / 'downloads' / 'manual' / VISA_ARCHIVES[0]}"):
        read_records("visa", str(tmp_path), "candle")
    with pytest.raises(InputError, match=r"no category 'pcb5' in VisA.*did you mean pcb4\?"):
        read_records("visa", str(tmp_path), "pcb5")


def cifar_archive(path: Path, *, rows: dict[str, np.ndarray], names: dict[str, str], folder: str) -> None:
    """The official binary layout: a row is its labels (one byte each), then 1024 red, green and blue bytes each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, contents in (*names.items(), *((name, row.tobytes()) for name, row in rows.items())):
            contents = contents.encode() if isinstance(contents, str) else contents
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A data folder with miniature archives of CIFAR-10 and CIFAR-100, and their images [32,32,3] by key."""
    data, images = tmp_path_factory.mktemp("data"), {}
    manual = data / "downloads" / "manual"
    batches = {f"data_batch_{number}.bin": 4 for number in range(1, 6)} | {"test_batch.bin": 20}
    rows, position = {}, 0
    for name, count in batches.items():
        rows[name] = pixels(name, shape=(count, 3073))
        rows[name][:, 0] = np.arange(count) % 10
        split = name.split("_")[0].replace("data", "train")
        for row in rows[name]:
            key = f"{split}/{CIFAR10_CLASSES[row[0]]}/{split}_{position % 20:05}"
            images[key] = row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
            position += 1
    names = {"batches.meta.txt": "\n".join(CIFAR10_CLASSES) + "\n\n"}
    cifar_archive(manual / "cifar-10-binary.tar.gz", rows=rows, names=names, folder="cifar-10-batches-bin")
    fine = {"train.bin": pixels("train", shape=(30, 3074)), "test.bin": pixels("test", shape=(5, 3074))}
    for some in fine.values():
        some[:, :2] %= 20
    for position, row in enumerate(fine["train.bin"]):
        images[f"irrelevant/train/fine{row[1]}/train_{position:05}"] = row[2:].reshape(3, 32, 32).transpose(1, 2, 0)
    names = {f"{kind}_label_names.txt": "".join(f"{kind}{i}\n" for i in range(n)) for kind, n in COUNTS.items()}
    cifar_archive(manual / "cifar-100-binary.tar.gz", rows=fine, names=names, folder="cifar-100-binary")
    return data, images


@pytest.fixture
def registered(cifar, monkeypatch) -> Path:
    """The miniature archives in place of the official ones, whose checksums tensorflow-datasets knows."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core.download import checksums

    builders = [tfds.builder_cls(name) for name in ("cifar10", "cifar100")]
    official = [builder.url_infos for builder in builders]
    for builder, ((url, file),) in zip(builders, (infos.items() for infos in official), strict=True):
        info = checksums.compute_url_info(epath.Path(cifar[0] / "downloads" / "manual" / file.filename))
        monkeypatch.setattr(builder, "url_infos", {url: info})
    return cifar[0]


def test_cifar10_by_its_own_builder_is_one_class_against_nine(registered, cifar):
    records = read_records("cifar10", str(registered), "cat")
    assert [record.key for record in records] == sorted(record.key for record in records)
    # Class 3 is cat: one in each of the five batches of 0..3, and two of the twenty test images.
    kinds = [(record.split, record.label) for record in records]
    assert [kinds.count(kind) for kind in (("train", 0), ("test", 0), ("test", 1), ("train", 1))] == [5, 2, 18, 0]
    for record in records:
        np.testing.assert_array_equal(read_image(record), cifar[1][record.key])
        shows = record.key.split("/")[1]
        assert (record.label, record.defect_type) == ((0, "good") if shows == "cat" else (1, shows))
        assert (record.mask, record.category) == (None, "cat")
    (batch,) = image_batches(records[:4], image_size=32, batch_size=8)
    np.testing.assert_array_equal(batch["image"], np.stack([cifar[1][record.key] for record in records[:4]]))
    with pytest.raises(InputError, match=r"no category 'car' in CIFAR-10.*truck; did you mean cat\?"):
        read_records("cifar10", str(registered), "car")
    with pytest.raises(InputError, match='"all" is none of cifar10.*airplane, automobile'):
        read_records("cifar10", str(registered), "all")


def test_cifar100_gives_irrelevant_anomalies(registered, cifar):
    drawn = read_irrelevant("cifar100", count=7, seed=3, root=str(registered))
    assert len({record.key for record in drawn}) == 7
    for record in drawn:
        np.testing.assert_array_equal(read_image(record), cifar[1][record.key])
        assert (record.label, record.mask, record.defect_type, record.split) == (1, None, "irrelevant", "train")
    assert drawn == read_irrelevant("cifar100", count=7, seed=3, root=str(registered))
    assert drawn != read_irrelevant("cifar100", count=7, seed=4, root=str(registered))


def test_cifar_out_of_reach_is_one_message_at_once(tmp_path):
    start = time.monotonic()
    for read, file in (
        (lambda: read_records("cifar10", str(tmp_path), "cat"), "cifar-10-binary.tar.gz"),
        (lambda: read_irrelevant("cifar100", count=1, seed=0, root=str(tmp_path)), "cifar-100-binary.tar.gz"),
    ):
        with pytest.raises(
            InputError, match=f"cannot be downloaded: https:.*{tmp_path / 'downloads' / 'manual' / file}"
        ):
            read()
    assert time.monotonic() - start < 30, "tensorflow-datasets by itself tries for minutes"


def test_another_archive_under_the_name_of_cifar_is_refused(cifar, tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz").write_bytes(
        (cifar[0] / "downloads" / "manual" / "cifar-10-binary.tar.gz").read_bytes()
    )
    with pytest.raises(InputError, match=r"cifar10/3.* cannot be prepared in .*wrong checksum"):
        read_records("cifar10", str(tmp_path), "cat")


def test_data_prepared_without_random_access_are_refused(registered, tmp_path):
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=tmp_path)
    config = tfds.download.DownloadConfig(manual_dir=registered / "downloads" / "manual")
    builder.download_and_prepare(file_format="tfrecord", download_config=config)
    with pytest.raises(InputError, match=f"{builder.data_dir} is prepared as tfrecord, .* another data folder"):
        read_records("cifar10", str(tmp_path), "cat")


def test_names_of_categories_need_no_data():
    assert len(category_names("tfds_mvtec_ad", "")) == 15 and len(category_names("visa_2cls_fewshot", "")) == 12
    assert category_names("cifar10", "")[3] == "cat"
