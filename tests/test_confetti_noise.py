"""Confetti noise against numbers by hand, a float64 oracle pixel by pixel, and the distributions of FCDD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import correlate1d

from pushpull_jax.confetti_noise import Squares, add_squares, confetti, sample_squares

KEY = jax.random.key(0)
DRAWS = 40_000
# Significance of the tests of a distribution; the keys are fixed, so that they pass always or never.
LEVEL = 1e-3

# Nearly all of the time is compilation: tests share these two functions and the shape of the images.
SHAPE = (6, 30, 40, 3)
TRACES = []


@functools.partial(jax.jit, static_argnames=("counts", "sides", "angle", "kernel", "sigma"))
def add_confetti(key, images, **parameters):
    TRACES.append(images.shape)
    return confetti(key, images, **parameters)


add = jax.jit(add_squares, static_argnames=("kernel", "sigma"))


def random_images(seed, shape):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def one_square(**changes):
    """A black square of side 3 in the middle of 9x9 pixels, unless changed."""
    values = {"present": True, "center": (4, 4), "side": 3, "angle": 0, "color": (-255, -255, -255)} | changes
    return Squares(
        **{name: np.array([value], bool if name == "present" else np.float32) for name, value in values.items()}
    )


NOTHING = one_square(present=False)


def together(*squares):
    return Squares(*map(np.concatenate, zip(*squares, strict=True)))


@functools.cache
def drawn():
    """Squares of many images of 240x240 pixels: coloured, black."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    layers = jax.jit(jax.vmap(functools.partial(sample_squares, size=(240, 240))))(keys)
    return [Squares(*map(np.asarray, layer)) for layer in layers]


def oracle(image, layers):
    """The noise of one image in float64, pixel by pixel; scipy's blur with its name for the mirrored edge."""
    noise = np.zeros(image.shape)
    for layer in layers:
        covered = np.zeros(image.shape)
        for present, center, side, angle, color in zip(*(np.asarray(field, float) for field in layer), strict=True):
            turn = np.exp(-1j * np.radians(angle))
            for row, column in np.ndindex(image.shape[:2]):
                point = complex(column - center[1], row - center[0]) * turn
                if present and max(abs(point.real), abs(point.imag)) <= side / 2:
                    covered[row, column] = color
        noise += covered
    scale = np.sqrt(image.shape[0] * image.shape[1]) / 240
    radius = round(12 * scale)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * (5 * scale) ** 2))
    for axis in (0, 1):
        noise = correlate1d(noise, kernel / kernel.sum(), axis=axis, mode="mirror")
    added, subtracted = np.clip(image + noise / 255, 0, 1), np.clip(image - noise / 255, 0, 1)
    changes = [255 * abs((result - image).mean()) for result in (added, subtracted)]
    return subtracted if changes[0] < 0.025 and changes[1] > changes[0] else added


# The contract.


def test_images_and_masks_of_a_batch():
    images = random_images(0, SHAPE)
    noisy, masks = add_confetti(KEY, images)
    assert (noisy.shape, noisy.dtype) == (SHAPE, jnp.float32)
    assert (masks.shape, masks.dtype) == (SHAPE[:-1], jnp.bool_)
    assert jnp.min(noisy) >= 0 and jnp.max(noisy) <= 1
    assert 0 < jnp.mean(masks) < 1
    change = np.abs(np.asarray(noisy) - images)
    np.testing.assert_array_equal(masks, (change >= 0.5 / 255).any(axis=-1))


def test_the_key_decides():
    images = random_images(1, SHAPE)
    noisy, masks = add_confetti(KEY, images)
    again = add_confetti(KEY, images)
    np.testing.assert_array_equal(again[0], noisy)
    np.testing.assert_array_equal(again[1], masks)
    assert not np.array_equal(add_confetti(jax.random.key(1), images)[1], masks)


def test_jit_equals_eager():
    images = random_images(1, SHAPE)
    noisy, masks = confetti(KEY, images)
    np.testing.assert_allclose(noisy, add_confetti(KEY, images)[0], atol=1e-6)
    np.testing.assert_array_equal(masks, add_confetti(KEY, images)[1])


def test_image_does_not_depend_on_the_others():
    images = random_images(2, SHAPE)
    changed = images.copy()
    changed[:5] = 0.5
    np.testing.assert_array_equal(add_confetti(KEY, changed)[0][5], add_confetti(KEY, images)[0][5])
    # Two images of a batch get two draws, even if they are the same.
    assert not np.array_equal(*add_confetti(KEY, images[[0, 0, 1, 1, 1, 1]])[1][:2])


def test_one_image_leading_axes_and_vmap():
    images = random_images(3, SHAPE)
    noisy, masks = add_confetti(KEY, images)
    single = add_confetti(KEY, images[0])
    np.testing.assert_allclose(single[0], noisy[0], atol=1e-6)
    np.testing.assert_array_equal(single[1], masks[0])
    # Keys along one axis, then 2x2 of the images: the second key is the one above.
    keys = jax.random.split(jax.random.key(2)).at[1].set(KEY)
    mapped = jax.jit(jax.vmap(confetti, (0, None)))(keys, images[:4].reshape(2, 2, *SHAPE[1:]))
    assert mapped[1].shape == (2, 2, 2, *SHAPE[1:-1])
    np.testing.assert_allclose(mapped[0][1].reshape(4, *SHAPE[1:]), noisy[:4], atol=1e-6)
    np.testing.assert_array_equal(mapped[1][1].reshape(4, *SHAPE[1:-1]), masks[:4])


def test_traced_once():
    add_confetti(KEY, random_images(0, SHAPE))
    before = len(TRACES)
    for seed in range(3):
        add_confetti(jax.random.key(seed), random_images(seed, SHAPE))
    assert len(TRACES) == before > 0
    assert "callback" not in add_confetti.lower(KEY, random_images(0, SHAPE)).as_text()


# What is drawn.


@pytest.mark.parametrize(("layer", "chance"), [(0, 1.8e-5), (1, 1.2e-5)])
def test_numbers_of_squares_are_those_of_240_pixels(layer, chance):
    counts = drawn()[layer].present.sum(axis=1)
    assert counts.min() == 1
    # FCDD: each of 240x240 pixels is a centre with this chance, drawn again until there is one.
    centers = stats.binom(240 * 240, chance)
    expected = centers.pmf(np.arange(1, 5)) / centers.sf(0)
    observed = [(counts == number).sum() for number in range(1, 5)]
    tail = DRAWS - sum(observed), 1 - expected.sum()
    assert stats.chisquare([*observed, tail[0]], DRAWS * np.append(expected, tail[1])).pvalue > LEVEL


def test_three_squares_on_average():
    # 1.0368 / (1 - exp(-1.0368)) + 0.6912 / (1 - exp(-0.6912)) = 1.6073 + 1.3851; the paper says 3.
    counts = sum(layer.present.sum(axis=1) for layer in drawn())
    assert abs(counts.mean() - 2.9924) < 4 * counts.std() / DRAWS**0.5


@pytest.mark.parametrize("layer", [0, 1])
def test_squares_are_uniform(layer):
    squares = drawn()[layer]
    used = squares.present
    for values, low, high in [
        (squares.side, 8, 54),
        (squares.center[..., 0], 0, 239),
        (squares.center[..., 1], 0, 239),
    ]:
        observed = np.bincount(values[used].astype(int))
        assert (values[used] == np.floor(values[used])).all()
        assert np.flatnonzero(observed)[[0, -1]].tolist() == [low, high]
        assert stats.chisquare(observed[low:]).pvalue > LEVEL
    assert np.abs(squares.angle).max() <= 45
    assert stats.kstest(squares.angle[used], stats.uniform(-45, 90).cdf).pvalue > LEVEL


def test_colours():
    colored, black = drawn()
    assert (black.color == -255).all()
    channels = colored.color[colored.present]
    assert (channels.min(), channels.max()) == (-256, -1)
    assert stats.chisquare(np.bincount((channels.ravel() + 256).astype(int))).pvalue > LEVEL
    # A channel says nothing of another, nor of anything else: deviation of a correlation 1 / sqrt(6,400).
    attributes = [*channels.T, colored.side[colored.present], colored.angle[colored.present]]
    attributes += [
        *colored.center[colored.present].T,
        np.broadcast_to(colored.present.sum(1)[:, None], colored.side.shape)[colored.present],
    ]
    correlations = np.corrcoef(attributes)
    assert np.abs(correlations - np.eye(len(attributes))).max() < 4.5 / 80


def test_squares_scale_with_the_image():
    keys = jax.random.split(KEY, 5)
    # Sides grow with the root of the area; 120x480 pixels are as many as 240x240.
    for size, scale in [((60, 60), 0.25), ((120, 480), 1), ((480, 480), 2)]:
        for key in keys:
            native, scaled = sample_squares(key, size=(240, 240)), sample_squares(key, size=size)
            for layer, reference in zip(scaled, native, strict=True):
                np.testing.assert_allclose(layer.side, scale * reference.side, rtol=1e-6)
                for name in ("present", "angle", "color"):
                    np.testing.assert_array_equal(getattr(layer, name), getattr(reference, name))
                # A centre keeps its place in the image, but for less than a pixel of either.
                place = (layer.center + 0.5) / np.array([size])
                assert (abs(place - (reference.center + 0.5) / 240) < 0.5 / np.minimum([size], 240)).all()


def test_parameters_are_used():
    # At 30x40 a square of 50 px has 50 sqrt(1200) / 240 = 7.2, 49 pixels; one in each layer, and no blur.
    images = np.full(SHAPE, 0.5, np.float32)
    changed = add_confetti(KEY, images, counts=(1e-6, 1e-6), sides=(50, 50), angle=0.0, kernel=1)[1].sum(axis=(1, 2))
    assert 49 <= changed.max() <= 2 * 49
    # And of about 40 squares many remain to be seen; one of at most 10 sqrt(1200) / 240 = 1.4 px is one pixel.
    many = add_confetti(KEY, images, counts=(40.0, 1e-6), sides=(1, 10), angle=0.0, kernel=1)[1].sum(axis=(1, 2))
    assert 15 < many.min() and many.max() < 65  # Poisson: 40, deviation 6.3
    image = np.ones((9, 9, 3), np.float32)
    # At 9x9 a kernel of 213 reaches round(106 x 9 / 240) = 4 pixels, and a sigma of 1e6 makes it flat: 3 of 9 twice.
    centre = add(image, one_square(), NOTHING, kernel=213, sigma=1e6)[0][4, 4, 0]
    assert centre == pytest.approx(1 - (3 / 9) ** 2, abs=1e-4)


def test_share_of_changed_pixels():
    # The paper: 12 % on average. FCDD cuts its noise to whole grey levels, which makes its masks a little smaller.
    masks = add_confetti(KEY, np.full((200, 120, 120, 3), 0.5, np.float32))[1]
    assert abs(jnp.mean(masks) - 0.125) < 0.02


# What is done with it.


def test_square_by_hand():
    noisy, mask = add(np.ones((9, 9, 3)), one_square(color=(-51, -255, 0)), NOTHING, kernel=1)
    expected = np.ones((9, 9, 3))
    expected[3:6, 3:6] = 0.8, 0, 1
    np.testing.assert_allclose(noisy, expected, atol=1e-6)
    np.testing.assert_array_equal(mask, expected[..., 1] == 0)


def test_rotated_square_is_a_diamond():
    mask = add(np.ones((9, 9, 3)), one_square(side=3.5 * 2**0.5, angle=45), NOTHING, kernel=1)[1]
    row, column = np.indices((9, 9)) - 4
    np.testing.assert_array_equal(mask, abs(row) + abs(column) <= 3)


def test_last_square_of_a_layer_covers_and_layers_are_summed():
    first, second = one_square(color=[-51] * 3), one_square(color=[-102] * 3, center=(4, 5))
    noisy = add(np.ones((9, 9, 3)), together(first, second, NOTHING), together(NOTHING, second, NOTHING), kernel=1)[0]
    # Columns 3 to 6 of the middle row: first alone, then second in both layers.
    np.testing.assert_allclose(noisy[4, 2:8, 0], [1, 0.8, 0.2, 0.2, 0.2, 1], atol=1e-6)
    swapped = add(np.ones((9, 9, 3)), together(second, first, NOTHING), together(NOTHING, second, NOTHING), kernel=1)[0]
    np.testing.assert_allclose(swapped[4, 2:8, 0], [1, 0.8, 0.4, 0.4, 0.2, 1], atol=1e-6)


def test_half_a_grey_level_counts_as_changed():
    for color, changed in [((-0.4, 0, -0.4), False), ((-0.6, 0, 0), True), ((0, 0, -0.6), True)]:
        mask = add(np.full((9, 9, 3), 0.5), one_square(color=color), NOTHING, kernel=1)[1]
        assert bool(mask[4, 4]) == changed and mask.sum() == 9 * changed


def test_what_the_clamp_hides_is_not_changed():
    image = np.ones((9, 9, 3), np.float32)
    image[:5] = 0
    mask = add(image, one_square(), NOTHING, kernel=1)[1]
    assert np.flatnonzero(mask.any(axis=1)).tolist() == [5]


def test_noise_is_inverted_on_a_dark_image():
    noisy, mask = add(np.zeros((9, 9, 3)), one_square(color=(-51, -255, 0)), NOTHING, kernel=1)
    np.testing.assert_allclose(noisy[4, 4], [0.2, 1, 0], atol=1e-6)
    assert mask.sum() == 9
    # All 243 values: 9 that darken by 0.6 grey levels are 0.0222 on average; by 0.7, 0.0259, enough to stay.
    for level, sign in [(0.6, 1), (0.7, -1)]:
        image = np.full((9, 9, 3), level / 255)
        noisy = add(image, one_square(color=(-100, 0, 0)), NOTHING, kernel=1)[0]
        assert np.sign(noisy[4, 4, 0] - image[4, 4, 0]) == sign
    # On white the inverse would do less.
    noisy = add(np.ones((9, 9, 3)), one_square(color=(-0.6, 0, 0)), NOTHING, kernel=1)[0]
    assert noisy[4, 4, 0] < 1
    assert add_confetti(KEY, np.zeros(SHAPE, np.float32))[1].any(axis=(1, 2)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_float64(seed):
    images = random_images(4, SHAPE)
    images[:3] = np.array([0, 1, 0.01])[:, None, None, None]
    key = jax.random.key(seed)
    noisy, masks = add_confetti(key, images)
    for index, image in enumerate(images):
        layers = sample_squares(jax.random.fold_in(key, index), size=image.shape[:2])
        expected = oracle(image.astype(np.float64), layers)
        np.testing.assert_allclose(noisy[index], expected, atol=2e-6)
        np.testing.assert_array_equal(masks[index], (abs(expected - image) >= 0.5 / 255).any(axis=-1))


def test_gaussian_at_240_pixels_is_fcdds():
    # A square of one pixel: the image shows the kernel, 25x25 and sigma 5.
    image = np.ones((240, 240, 3), np.float32)
    noisy = np.asarray(add(image, one_square(center=(100, 120), side=1, color=[-256] * 3), NOTHING)[0])
    kernel = np.exp(-(np.arange(-12, 13) ** 2) / 50)
    expected = 256 / 255 * np.outer(kernel, kernel) / kernel.sum() ** 2
    np.testing.assert_allclose(1 - noisy[88:113, 108:133, 1], expected, atol=1e-6)
    assert (noisy != 1).any(axis=-1).sum() == 25 * 25


# What is refused.


@pytest.mark.parametrize("shape", [(40, 3), (2, 30, 40), (2, 30, 40, 1), (2, 3, 30, 40), (2, 0, 40, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="images"):
        confetti(KEY, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="images"):
        add_confetti(KEY, np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"images must be .*3. floating point in .0, 1., got .* {np.dtype(dtype)}"):
        add_confetti(KEY, np.zeros(SHAPE, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_floats_become_float32(dtype):
    images = np.full(SHAPE, 0.5)  # exact in all of them
    noisy = add_confetti(KEY, images if dtype == "float64" else jnp.asarray(images, dtype))[0]
    assert noisy.dtype == jnp.float32
    np.testing.assert_allclose(noisy, add_confetti(KEY, images.astype(np.float32))[0], atol=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"counts": (0, 1)},
        {"counts": (1, 51)},
        {"counts": (1,)},
        {"sides": (0, 8)},
        {"sides": (9, 8)},
        {"angle": -1},
        {"angle": float("nan")},
        {"kernel": 24},
        {"kernel": -1},
        {"sigma": 0},
        {"sigma": float("inf")},
    ],
)
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        jax.eval_shape(functools.partial(confetti, **parameters), KEY, np.zeros(SHAPE, np.float32))
