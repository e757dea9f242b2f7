"""Which test images a report shows, and that a browser can get back what was put in."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pushpull_jax import gallery
from pushpull_jax.gallery import Case, choose_cases, map_levels, render_cases, shrink_map, shrink_mask


def case(key="a", score=3.0, label=1, size=(32, 32), mask=None, image=None):
    generator = np.random.default_rng(3)
    return Case(
        key=key,
        defect_type="dent",
        label=label,
        score=score,
        image=generator.integers(0, 256, (*size, 3), dtype=np.uint8) if image is None else image,
        mask=mask,
        map=generator.random(size, np.float32),
    )


def decoded(html, name):
    """The first picture of an attribute."""
    form, data = re.search(rf'{name}="data:image/(\w+);base64,([^"]*)"', html).groups()
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.format.lower() == form
    return np.asarray(picture)


def test_choose_cases_by_hand():
    # Threshold 2: errors are 1 (false alarm), 4 and 6 (dents, missed, 6 farther), right are 0, 2, 3, 5, 7 and 8.
    labels, scores = [0, 0, 0, 0, 1, 1, 1, 1, 1], [1.0, 2.5, 0.5, 2.0, 1.5, 3.0, 0.7, 9.0, 4.0]
    types = ["good"] * 4 + ["dent"] * 3 + ["stain"] * 2
    # First of each verdict and type, errors before what is right, then their seconds, and 3, the third good one.
    order = [1, 6, 5, 7, 2, 4, 8, 0, 3]
    assert choose_cases(labels, scores, types, 2.0) == order
    assert choose_cases(labels, scores, types, 2.0, limit=4) == order[:4]
    # A score equal to the threshold is no alarm, and ties stay in their order.
    assert choose_cases([0, 0, 1], [2.0, 2.0, 2.0], ["x"] * 3, 2.0) == [2, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_cases_can_be_chosen_batch_by_batch(seed):
    generator = np.random.default_rng(seed)
    count, limit = int(generator.integers(1, 80)), int(generator.integers(1, 20))
    labels, scores = generator.integers(0, 2, count), np.round(generator.gamma(2.0, 1.0, count), 1)
    types = generator.choice(list("xyz"), count)
    kept = []
    for first in range(0, count, 7):
        candidates = np.array([*kept, *range(first, min(first + 7, count))])
        candidates.sort()
        chosen = choose_cases(labels[candidates], scores[candidates], types[candidates], 2.0, limit=limit)
        kept = candidates[chosen].tolist()
    assert kept == choose_cases(labels, scores, types, 2.0, limit=limit)


def test_levels_tell_what_is_above_any_hundredth_of_the_threshold():
    # By the definition: level v holds (v - 1) / 100 < score / threshold <= v / 100.
    threshold = 1.815
    maps = np.append(np.random.default_rng(0).uniform(0, 3 * threshold, 5000), [threshold, 0.0, -1.0]).astype(
        np.float32
    )
    levels = map_levels(maps[None], threshold=float(np.float32(threshold)))[0]
    relative = maps.astype(np.float64) / np.float64(np.float32(threshold))
    for step in range(255):
        np.testing.assert_array_equal(levels > step, relative > step / 100)
    assert levels[-3:].tolist() == [100, 0, 0] and levels.max() == 255


def test_pictures_come_back_as_they_were():
    mask = np.zeros((32, 32), bool)
    mask[3:9, 4:6] = True
    shown = case(mask=mask)
    html, count = render_cases([shown], threshold=2.0, map_threshold=0.25)
    assert count == 1
    np.testing.assert_array_equal(decoded(html, "data-map"), map_levels(shown.map, threshold=0.25))
    np.testing.assert_array_equal(decoded(html, "data-mask"), mask)
    smooth = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (32, 32, 3))
    html, _ = render_cases([case(image=smooth)], threshold=2.0, map_threshold=0.25)
    assert (
        np.abs(decoded(html, "src").astype(int) - smooth).max() < 12 and "data-mask" not in html
    )  # WebP of quality 80


def test_large_pictures_are_shrunk():
    html, _ = render_cases([case(size=(1000, 500), mask=np.eye(1000, 500) > 0)], threshold=2.0, map_threshold=1.0)
    assert decoded(html, "src").shape == (400, 200, 3) and decoded(html, "data-map").shape == (256, 128)
    # Of the means, that of a block; of a mask, no pixel is lost.
    score_map = np.arange(512 * 512, dtype=np.float32).reshape(512, 512)
    blocks = score_map.reshape(256, 2, 256, 2).mean((1, 3))
    np.testing.assert_allclose(shrink_map(score_map), blocks, rtol=1e-6)
    mask = np.zeros((1024, 1024), bool)
    mask[501, 37] = True
    assert np.argwhere(shrink_mask(mask)).tolist() == [[125, 9]]
    small = np.ones((8, 8), np.float32)
    assert shrink_map(small) is small


def test_cases_say_what_is_known_of_their_pixels():
    empty, some = np.zeros((32, 32), bool), np.arange(1024).reshape(32, 32) < 256
    told = {}
    for label, name, mask in ((1, "none", None), (0, "none", None), (1, "empty", empty), (1, "some", some)):
        html, _ = render_cases([case(label=label, mask=mask)], threshold=2.0, map_threshold=1.0)
        told[label, name] = re.search(r'data-truth="([^"]*)"', html)[1]
    assert told == {
        (1, "none"): "true defect: no mask",
        (0, "none"): "no defect",
        (1, "empty"): "true defect: none in the mask",
        (1, "some"): "true defect: 25% of the image",
    }


def test_cases_are_sorted_by_score_and_told_by_verdict():
    shown = [case(key, score, label) for key, score, label in (("x", 1.0, 1), ("y", 5.0, 0), ("z", 3.0, 1))]
    html, _ = render_cases(shown, threshold=2.0, map_threshold=1.0)
    assert re.findall(r'data-key="(.)"', html) == ["y", "z", "x"]
    assert re.findall(r'data-verdict="([^"]*)"', html) == ["false alarm", "found", "missed"]
    # By how much each is on the wrong side: 5 - 2, 2 - 3, 2 - 1.
    assert re.findall(r'data-wrong="([^"]*)"', html) == ["3", "-1", "1"]


def test_the_file_stays_below_its_budget(monkeypatch):
    # Noise compresses worst: one case takes more than a megabyte of a twelfth of which the others are left out.
    monkeypatch.setattr(gallery, "BUDGET", 1_000_000)
    cases = [case(str(i), size=(400, 400)) for i in range(12)]
    html, count = render_cases(cases, threshold=2.0, map_threshold=0.25)
    assert 0 < count < 12 and len(html) < 1_000_000
    assert re.findall(r'data-key="(\d+)"', html) == [str(i) for i in range(count)]


def test_a_map_that_is_not_finite_is_refused():
    broken = case()
    broken.map[3, 4] = np.nan
    with pytest.raises(ValueError, match="map of a must be finite"):
        render_cases([broken], threshold=2.0, map_threshold=1.0)
