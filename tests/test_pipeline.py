"""Batches by tf.data, and what happens to files that cannot be read."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pushpull_jax.data import pipeline
from pushpull_jax.data.images import mask_to_grid, mask_to_image, read_mask, resize_image
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.mvtec_ad import read_mvtec_ad
from pushpull_jax.data.pipeline import check_readable, image_batches, read_in_order
from pushpull_jax.errors import InputError

SHARED = Path(os.environ.get("PUSHPULL_SHARED") or Path(__file__).parents[2] / "shared" / "data")
SIZE = 24


def pixels(position: int) -> np.ndarray:
    """Every image has its own size, aspect and contents."""
    shape = (20 + position, 40 - position, 3)
    return np.random.default_rng(position).integers(0, 256, shape, dtype=np.uint8)


def truth(position: int) -> np.ndarray:
    return pixels(position)[..., 0] > 100


@pytest.fixture
def records(tmp_path):
    """Eleven images: odd ones anomalous with a mask, but 5 without one; even ones normal, 8 unlabelled."""
    made = []
    for position in range(11):
        image, mask = tmp_path / f"{position:02}.png", tmp_path / f"{position:02}_mask.png"
        Image.fromarray(pixels(position)).save(image)
        label = None if position == 8 else position % 2
        if label == 1 and position != 5:
            Image.fromarray(truth(position)).save(mask)
        made.append(Record(image.name, str(image), str(mask) if mask.exists() else None, label, "d", "test"))
    return tuple(made)


@pytest.fixture
def damaged(records):
    """The same with three bad files: a PNG cut in half, a text, and a mask of another size. Returns them by key."""
    data = Path(records[2].image).read_bytes()
    Path(records[2].image).write_bytes(data[: len(data) // 2])
    Path(records[6].image).write_text("not an image")
    Image.fromarray(truth(9)[:7]).save(records[9].mask)
    return {"02.png": records[2].image, "06.png": records[6].image, "09.png": records[9].mask}


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_batches_keep_order_and_the_last_partial_one(records, resize):
    options = {"image_size": SIZE, "batch_size": 4, "resize": resize, "with_masks": True, "threads": 3}
    batches = list(image_batches(records, **options))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 3]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    dtypes = {"image": np.float32, "index": np.int32, "mask": np.bool_, "has_mask": np.bool_}
    assert {name: array.dtype for name, array in joined.items()} == dtypes
    np.testing.assert_array_equal(joined["index"], np.arange(11))
    for position, (image, mask) in enumerate(zip(joined["image"], joined["mask"], strict=True)):
        np.testing.assert_array_equal(image, resize_image(pixels(position), size=SIZE, mode=resize))
        has_truth = position % 2 == 1 and position != 5
        expected = mask_to_image(truth(position), size=SIZE, mode=resize) & has_truth
        np.testing.assert_array_equal(mask, expected)
    # Known for anomalous ones by their mask and for normal ones by their label; not for 5 and the unlabelled 8.
    assert np.flatnonzero(~joined["has_mask"]).tolist() == [5, 8]


def test_without_masks_none_are_read(records, damaged):
    Path(records[2].image).write_bytes(Path(records[0].image).read_bytes())
    Path(records[6].image).write_bytes(Path(records[0].image).read_bytes())
    (batch,) = image_batches(records, image_size=SIZE, batch_size=50)
    assert sorted(batch) == ["image", "index"] and len(batch["image"]) == 11


def test_nothing_is_tuned_whose_thread_the_end_of_a_pass_would_wait_for(records, monkeypatch):
    dataset, tuned = pipeline._tensorflow().data.Dataset, []
    as_numpy = dataset.as_numpy_iterator
    monkeypatch.setattr(
        dataset, "as_numpy_iterator", lambda self: tuned.append(self.options().autotune.enabled) or as_numpy(self)
    )
    assert len(list(image_batches(records, image_size=SIZE, batch_size=50))) == 1
    loaded = read_in_order(lambda _: np.zeros(2, np.float32), [0, 1], shape=(2,), batch_size=2, prefetch=1)
    assert [batch.shape for batch in loaded] == [(2, 2)]
    assert tuned == [False, False]


def test_a_process_ends_in_the_middle_of_a_pass(records):
    """Its threads call Python, and would wait for it for ever."""
    images = [str(record.image) for record in records]
    program = f"""
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import image_batches
records = [Record(name, name, None, 0, "good", "train") for name in {images}]
batches = image_batches(records * 50, image_size=512, batch_size=8)
print(len(next(batches)["image"]))
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert done.stdout == "8\n"


def test_no_records_no_batches():
    assert list(image_batches((), image_size=SIZE, batch_size=4)) == []
    assert check_readable(()) == ()


def test_stop_names_all_bad_files_and_yields_nothing_after_the_first(records, damaged):
    seen = []
    with pytest.raises(InputError) as caught:
        for batch in image_batches(records, image_size=SIZE, batch_size=2, with_masks=True, threads=1):
            seen += batch["index"].tolist()
    message = str(caught.value)
    assert message.startswith("3 of 11 examples cannot be read:")
    places = [message.index(path) for path in damaged.values()]
    assert places == sorted(places)
    assert "tensorflow" not in message.lower() and "Traceback" not in message
    assert seen in ([], [0, 1]), "image 2 is bad; good ones of its batch do not come out either"


def test_skip_goes_on_without_them_in_full_batches(records, damaged):
    options = {"image_size": SIZE, "batch_size": 3, "with_masks": True, "on_unreadable": "skip"}
    dropped = {}
    batches = list(image_batches(records, dropped=dropped, **options))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 3], [4, 5, 7], [8, 10]]
    np.testing.assert_array_equal(batches[2]["image"][1], resize_image(pixels(10), size=SIZE))
    assert list(dropped) == list(damaged) and all(path in dropped[key] for key, path in damaged.items())
    with pytest.warns(UserWarning, match=f"3 of 11 examples.*left out:\n  {re.escape(damaged['02.png'])}"):
        list(image_batches(records, **options))


def test_check_readable_stops_or_skips(records, damaged):
    with pytest.raises(InputError) as caught:
        check_readable(records)
    assert all(path in str(caught.value) for path in damaged.values())
    calls, dropped = [], {}
    kept = check_readable(
        records, on_unreadable="skip", dropped=dropped, progress=lambda *done: calls.append(done), threads=2
    )
    assert [record.key for record in kept] == [record.key for record in records if record.key not in damaged]
    assert list(dropped) == list(damaged) and calls == [(done, 11) for done in range(1, 12)]
    with pytest.warns(UserWarning, match="3 of 11 examples cannot be read, left out"):
        check_readable(records, on_unreadable="skip")
    assert check_readable(records[:2]) == records[:2]


def test_ten_bad_files_are_named_and_the_rest_counted(records):
    for record in records:
        Path(record.image).write_text("not an image")
    with pytest.raises(InputError) as caught:
        check_readable(records)
    message = str(caught.value)
    assert message.startswith("11 of 11") and message.endswith("and 1 more") and records[10].image not in message


def test_wrong_choices_are_refused_before_anything_is_read(records):
    with pytest.raises(InputError, match="on_unreadable must be"):
        image_batches(records, image_size=SIZE, batch_size=2, on_unreadable="ignore")
    with pytest.raises(InputError, match="on_unreadable must be"):
        check_readable(records, on_unreadable="ignore")
    with pytest.raises(ValueError, match="resize must be"):
        image_batches(records, image_size=SIZE, batch_size=2, resize="crop")
    for wrong in ({"image_size": 0, "batch_size": 1}, {"image_size": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            image_batches(records, **wrong)


def test_bugs_are_not_taken_for_bad_files(records, monkeypatch):
    monkeypatch.setattr(pipeline, "resize_image", lambda *_, **__: 1 / 0)
    with pytest.raises(Exception, match="ZeroDivisionError") as caught:
        list(image_batches(records, image_size=SIZE, batch_size=2, on_unreadable="skip"))
    assert not isinstance(caught.value, InputError)


def test_tensorflow_comes_late_silently_and_without_accelerators(records):
    script = f"""
import os, sys
before = dict(os.environ)
from pushpull_jax.data.manifest import Record, hold_out
from pushpull_jax.data.mvtec_ad import read_mvtec_ad
assert "numpy" not in sys.modules
from pushpull_jax.data.pipeline import check_readable, image_batches
records = [Record("k", {records[0].image!r}, None, 0, "good", "test")]
check_readable(records)
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
assert len(list(image_batches(records, image_size=8, batch_size=2))) == 1
import tensorflow as tf
assert tf.config.get_visible_devices("GPU") == [] and dict(os.environ) == before
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    environment["PYTHONPATH"] = str(Path(pipeline.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real images; set PUSHPULL_SHARED to one")
def test_real_images_can_all_be_read():
    records = read_mvtec_ad(SHARED / "mvtec_ad_256", "bottle")
    assert check_readable(records) == records
    native = [record for record in read_mvtec_ad(SHARED / "mvtec_ad_native", "bottle") if record.label == 1]
    keys = {record.key for record in native}
    small = [record for record in records if record.key in keys]
    options = {"image_size": 256, "batch_size": 8, "with_masks": True}
    ((batch,), (reference,)) = (tuple(image_batches(some, **options)) for some in (native, small))
    # The small files were reduced by Lanczos, which is sharper: edges differ, the mean hardly.
    assert np.abs(batch["image"] - reference["image"]).mean() < 3
    # Their masks were reduced by Pillow's box filter, which counts whole pixels by their centres (900 / 256 is no
    # whole number): only cells whose exact share is close to one half may differ.
    for position, record in enumerate(native):
        share = mask_to_grid(read_mask(record, size=(900, 900)), grid=(256, 256), rule="fraction")
        differs = batch["mask"][position] != reference["mask"][position]
        assert differs.sum() < 20 and np.abs(share[differs] - 0.5).max() < 0.1
