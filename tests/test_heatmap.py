"""Heat colours, overlays and whole writes: expectations by hand from the stated scale, or properties of it."""

import os

import numpy as np
import pytest
from PIL import Image

from pushpull_jax import heatmap


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def constant(value, shape=(24, 32)):
    return np.full(shape, value, np.float32)


def test_colours_at_the_stops_are_those_of_the_palette():
    # By hand: score / threshold 0, 1, 1.5, 2 are 4575b4, ffffbf, fdae61, d73027 of ColorBrewer's 11-class RdYlBu.
    colours = heatmap.heat_colours(np.array([[0.0, 3.0, 4.5, 6.0]]), threshold=3.0)
    assert colours.dtype == np.uint8
    assert colours.tolist() == [[[69, 117, 180], [255, 255, 191], [253, 174, 97], [215, 48, 39]]]


def test_colours_between_stops_are_linear():
    # By hand, halfway from 1 to 1.5: (255+253)/2, (255+174)/2 = 214.5 (to even), (191+97)/2.
    assert heatmap.heat_colours(constant(1.25), threshold=1.0)[0, 0].tolist() == [254, 214, 144]


def test_heat_rises_and_turns_at_the_threshold():
    relative = np.linspace(-1.0, 3.0, 801)
    colours = heatmap.heat_colours(relative[None], threshold=1.0)[0].astype(int)
    warmth = colours[:, 0] - colours[:, 2]  # red minus blue
    assert (np.diff(warmth) >= -1).all()  # -1: the two channels are rounded apart
    assert (warmth[relative <= 0.9] < 0).all() and (warmth[relative >= 1.0] > 0).all()
    assert warmth[-1] - warmth[0] > 250


def test_beyond_the_ends_the_ends_colour():
    colours = heatmap.heat_colours(np.array([[-np.inf, -1.0, 0.0, 2.0, 9.0, np.inf]]), threshold=1.0)[0]
    assert (colours[:3] == colours[2]).all() and (colours[3:] == colours[3]).all()


def test_a_colour_depends_on_its_own_score_alone():
    maps = np.random.default_rng(1).gamma(2.0, 1.0, (2, 3, 8, 9)).astype(np.float32)
    together = heatmap.heat_colours(maps, threshold=2.5)
    assert together.shape == (2, 3, 8, 9, 3)
    for index in np.ndindex(2, 3):
        assert np.array_equal(together[index], heatmap.heat_colours(maps[index], threshold=2.5))
    hotter = maps[0, 0].copy()
    hotter[0, 0] = 100.0
    assert np.array_equal(heatmap.heat_colours(hotter, threshold=2.5)[1:], together[0, 0, 1:])


def test_only_the_ratio_to_the_threshold_counts(image):
    maps = np.random.default_rng(2).gamma(2.0, 1.0, (24, 32)).astype(np.float32)
    for picture in (heatmap.heat_colours, lambda m, threshold: heatmap.overlay(image, m, threshold=threshold)):
        # A power of two scales floats exactly.
        assert np.array_equal(picture(maps, threshold=1.5), picture(8 * maps, threshold=12.0))


def test_overlay_leaves_a_cold_image_as_it_is(image):
    cold = np.random.default_rng(3).uniform(-1.0, 0.5, (24, 32)).astype(np.float32)
    assert np.array_equal(heatmap.overlay(image, cold, threshold=1.0), image)


def test_overlay_tints_little_up_to_the_threshold(image):
    # alpha <= 0.6 (1 - 0.5) = 0.3 of a difference of at most 255, and a rounding.
    below = np.random.default_rng(4).uniform(0.0, 1.0, (24, 32)).astype(np.float32)
    changed = np.abs(heatmap.overlay(image, below, threshold=1.0).astype(int) - image)
    assert 0 < changed.max() <= 0.3 * 255 + 0.5


def test_overlay_by_hand():
    # alpha = 0.6 (1 - 0.5) = 0.3 at the threshold, 0.6 from 1.5 times it; nothing or everything above it: no line.
    grey = np.full((4, 4, 3), 100, np.uint8)
    at = heatmap.overlay(grey, constant(1.0, (4, 4)), threshold=1.0)
    assert (at == np.rint([0.7 * 100 + 0.3 * 255, 0.7 * 100 + 0.3 * 255, 0.7 * 100 + 0.3 * 191])).all()
    hot = heatmap.overlay(grey, constant(7.0, (4, 4)), threshold=1.0)
    assert (hot == np.rint([0.4 * 100 + 0.6 * 215, 0.4 * 100 + 0.6 * 48, 0.4 * 100 + 0.6 * 39])).all()
    assert np.array_equal(heatmap.overlay(grey, constant(7.0, (4, 4)), threshold=1.0, opacity=0.0), grey)


def test_overlay_draws_around_what_is_above_the_threshold(image):
    scores = constant(0.0)
    scores[10:14, 10:14] = 1.01
    drawn = (heatmap.overlay(image, scores, threshold=1.0) == (165, 0, 38)).all(axis=-1)
    assert drawn[9, 10:14].all() and drawn[10:14, 14].all() and not drawn[10:14, 10:14].any()
    scores[10:14, 10:14] = 1.0
    assert not (heatmap.overlay(image, scores, threshold=1.0) == (165, 0, 38)).all(axis=-1).any()


def test_outline_of_one_pixel_is_its_four_neighbours(image):
    region = np.zeros((24, 32), bool)
    region[5, 7] = True
    drawn = heatmap.outline(image, region, colour=(1, 2, 3))
    changed = (drawn != image).any(axis=-1)
    assert sorted(zip(*np.nonzero(changed), strict=True)) == [(4, 7), (5, 6), (5, 8), (6, 7)]
    assert (drawn[changed] == (1, 2, 3)).all()


def test_outline_is_wider_on_larger_images():
    region = np.zeros((320, 400), bool)
    region[100:150, 100:150] = True
    drawn = heatmap.outline(np.zeros((320, 400, 3), np.uint8), region, colour=(9, 9, 9)).any(axis=-1)
    assert np.flatnonzero(drawn[120]).tolist() == [98, 99, 150, 151]  # 320 / 160 = 2 pixels


@pytest.mark.parametrize("full", [False, True])
def test_outline_without_a_border_draws_nothing(image, full):
    drawn = heatmap.outline(image, np.full((24, 32), full), colour=(1, 2, 3))
    assert np.array_equal(drawn, image) and drawn is not image


@pytest.mark.parametrize("threshold", [0.0, -1.0, np.nan, np.inf])
def test_threshold_must_be_finite_and_positive(image, threshold):
    with pytest.raises(ValueError, match="threshold must be finite and above 0"):
        heatmap.heat_colours(constant(1.0), threshold=threshold)
    with pytest.raises(ValueError, match="threshold must be finite and above 0"):
        heatmap.overlay(image, constant(1.0), threshold=threshold)


def test_nan_is_refused(image):
    scores = constant(1.0)
    scores[3, 4] = np.nan
    with pytest.raises(ValueError, match="1 of 768 values are NaN"):
        heatmap.heat_colours(scores, threshold=1.0)
    with pytest.raises(ValueError, match="1 of 768 values are NaN"):
        heatmap.overlay(image, scores, threshold=1.0)


def test_shapes_and_dtypes_are_checked(image):
    with pytest.raises(ValueError, match=r"score_map \(32, 24\) must have the size of the image, \(24, 32\)"):
        heatmap.overlay(image, constant(1.0, (32, 24)), threshold=1.0)
    with pytest.raises(ValueError, match=r"image must be \[H, W, 3\] uint8"):
        heatmap.overlay(image / 255.0, constant(1.0), threshold=1.0)
    with pytest.raises(ValueError, match=r"image must be \[H, W, 3\] uint8"):
        heatmap.overlay(image[..., 0], constant(1.0), threshold=1.0)
    with pytest.raises(ValueError, match="opacity must be in 0..1, got 1.5"):
        heatmap.overlay(image, constant(1.0), threshold=1.0, opacity=1.5)
    with pytest.raises(ValueError, match=r"maps must be \[\*B, H, W\]"):
        heatmap.heat_colours(np.ones(5), threshold=1.0)
    with pytest.raises(ValueError, match=r"region \(24, 32\) uint8 must be boolean"):
        heatmap.outline(image, np.ones((24, 32), np.uint8), colour=(1, 2, 3))


def test_saved_png_is_lossless_and_leaves_nothing_beside_it(tmp_path, image):
    heatmap.save_png(tmp_path / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failing_write_leaves_the_old_file(tmp_path, image, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        heatmap.save_png(path, image)
    assert path.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["a.png"]
