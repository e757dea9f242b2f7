"""Copies of one photograph among aligned parts that nearly look the same."""

import io

import numpy as np
import pytest
from PIL import Image

from pushpull_jax.data.demo import draw_part
from pushpull_jax.data.images import decode_image, resize_image
from pushpull_jax.data.near_duplicates import SIDE, near_duplicates, thumbnail


def encoded(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return decode_image(file.getvalue())


def resized(image, share):
    side = round(share * len(image))
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def brighter(image, gain):
    return np.clip(np.rint(image * gain), 0, 255).astype(np.uint8)


COPIES = {
    "encoded": lambda image: encoded(image, 75),
    "half": lambda image: resized(image, 0.5),
    "smaller": lambda image: resized(image, 0.8),
    "double": lambda image: resized(image, 2),
    "brighter": lambda image: brighter(image, 1.02),
    "darker": lambda image: brighter(image, 0.98),
    "all": lambda image: encoded(brighter(resized(image, 0.75), 1.02), 75),
}


def found(images):
    pairs = near_duplicates(np.stack(list(map(thumbnail, images))), [min(image.shape[:2]) for image in images])
    assert all(0 <= pair.distance < np.inf for pair in pairs)
    return [(pair.first, pair.second) for pair in pairs]


@pytest.fixture(scope="module")
def parts():
    """Twelve drawings of a part, in nearly the same place."""
    return [draw_part(np.random.default_rng(seed), size=256)[0] for seed in range(12)]


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_and_nothing_else(parts, name):
    copies = [COPIES[name](part) for part in parts[:3]]
    assert found([*parts, *copies]) == [(0, 12), (1, 13), (2, 14)]


def test_few_images_have_copies_too(parts):
    for count in (1, 2, 7):
        assert found([*parts[:count], brighter(parts[0], 1.02)]) == [(0, count)]
    assert near_duplicates(np.stack([thumbnail(parts[0])]), [256]) == []


def test_of_many_copies_the_nearest_in_each_group_is_kept(parts):
    images = [*parts, brighter(parts[0], 1.01), brighter(parts[0], 1.02)]
    thumbnails, sides = np.stack(list(map(thumbnail, images))), [256] * len(images)
    # A gain is taken out, rounding is not: any of 0 and 12 may be the nearer to 13.
    ((first, second, _), (other, last, _)) = near_duplicates(thumbnails, sides)
    assert (first, second, last) == (0, 12, 13) and other in (0, 12)
    groups = [0] * 12 + [1, 1]
    pairs = [(pair.first, pair.second) for pair in near_duplicates(thumbnails, sides, groups)]
    assert pairs == [(0, 12), (0, 13), (12, 13)]


def test_flat_surfaces_are_no_copies():
    # They differ by half a grey level at 32 x 32, which is all that they have: nearer than LARGEST_DISTANCE.
    rng = np.random.default_rng(0)
    light = np.linspace(100, 140, 256)[:, None, None]
    surfaces = [
        np.clip(light + resize_image(rng.normal(0, 1, (16, 16, 3)), size=256) + rng.normal(0, 1, (256, 256, 3)), 0, 255)
        for _ in range(20)
    ]
    surfaces = [surface.astype(np.uint8) for surface in surfaces]
    assert found(surfaces) == []
    assert found([*surfaces, resized(surfaces[3], 0.75)]) == [(3, 20)]


def test_another_light_is_no_copy(parts):
    # 30 grey levels and 30 % are beyond what a copy is granted.
    assert found([*parts, np.clip(parts[0].astype(int) + 30, 0, 255).astype(np.uint8)]) == []
    assert found([*parts, brighter(parts[0], 0.7)]) == []


def test_many_images_are_compared_in_parts(parts):
    # 2100 images take more than one block of rows; the copies are at both ends.
    rng = np.random.default_rng(0)
    many = rng.uniform(0, 255, (2100, 8, 8, 3)).astype(np.float16).repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)
    many[2099] = many[0]
    many[2098] = many[1000]
    pairs = near_duplicates(many, [256] * 2100)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 2099), (1000, 2098)]


def test_real_aligned_parts(shared_data):
    folders = [shared_data / "mvtec_ad_256" / name for name in ("bottle", "toothbrush")]
    expected = ([], [("006.png", "015.png")])  # one toothbrush, photographed twice: seen by eye
    for folder, pairs in zip(folders, expected, strict=True):
        files = sorted((folder / "train" / "good").iterdir())[:120]
        images = [decode_image(file) for file in files]
        assert [(files[first].name, files[second].name) for first, second in found(images)] == pairs
