"""The conformal threshold: ranks by hand, its promise by simulation, its words."""

import numpy as np
import pytest

from pushpull_jax.calibration import conformal_threshold


@pytest.mark.parametrize(
    ("n", "rate", "rank"),
    [
        (19, 0.05, 19),  # 20 * 0.95 = 19
        (20, 0.05, 20),  # 19.95
        (39, 0.05, 38),  # 40 * 0.95 = 38
        (99, 0.05, 95),  # 100 * 0.95 = 95
        (98, 0.05, 95),  # 94.05
        (100, 0.05, 96),  # 95.95
        (9, 0.1, 9),  # 10 * 0.9 = 9
        (99, 0.1, 90),
        (999, 0.001, 999),  # 1000 * 0.999 = 999
        (9, 0.7, 3),  # 10 * 0.3 = 3, which floats make 3.0000000000000004
        (19, 0.95, 1),  # 20 * 0.05 = 1, likewise
        (1, 0.5, 1),  # 2 * 0.5 = 1
        (2, 0.5, 2),  # 3 * 0.5 = 1.5
        (3, 0.99, 1),  # 4 * 0.01 = 0.04
        (10, 0.05, 10),  # 10.45, beyond the largest
        (1, 0.05, 1),
    ],
)
def test_rank_by_hand(n, rate, rank):
    # The value of each score is its rank.
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    given = scores.copy()
    threshold = conformal_threshold(scores, false_positive_rate=rate)
    assert threshold.value == rank and type(threshold.value) is float
    assert (threshold.n, threshold.false_positive_rate) == (n, rate)
    assert threshold.reachable == 1 / (n + 1)
    np.testing.assert_array_equal(scores, given)


def test_rank_against_integers():
    # The rank is the smallest r with r / (n + 1) >= 1 - f, here f = p / 1000 in integers, so without rounding.
    for n in range(1, 400):
        for p in (1, 5, 10, 50, 100, 333, 500, 700, 850, 999):
            rank = min(-(-(n + 1) * (1000 - p) // 1000), n)
            assert conformal_threshold(np.arange(1, n + 1), false_positive_rate=p / 1000).value == rank


def test_threshold_is_one_of_the_float32_scores():
    # Scores are compared as float32: a threshold that float32 rounds would call its own image anomalous.
    scores = np.random.default_rng(1).random(50).astype(np.float32)
    threshold = conformal_threshold(scores, false_positive_rate=0.1)
    assert np.float32(threshold.value) in scores
    assert (scores > threshold.value).sum() == 4  # rank 46 of 50: 51 * 0.9 = 45.9


def test_ties_are_not_above():
    threshold = conformal_threshold(np.array([1.0, 2, 2, 2, 2, 2, 2, 2, 2]), false_positive_rate=0.1)
    assert threshold.value == 2


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (99, 0.05), (50, 0.1), (30, 0.3)])
def test_promise_by_simulation(n, rate):
    # The mean exceedance of a continuous score is 1 - rank / (n + 1), by exchangeability: at most f, and less than
    # 1 / (n + 1) below it. Its mean over 4,000 draws of [n] deviates by at most 4 * sqrt(f (1 - f) / (n + 2) / 4000).
    rng = np.random.default_rng(n)
    exceedance = [
        # Scores are uniform, so that a threshold t is exceeded with a probability of 1 - t.
        1 - conformal_threshold(rng.random(n), false_positive_rate=rate).value
        for _ in range(4000)
    ]
    tolerance = 4 * np.sqrt(rate * (1 - rate) / (n + 2) / 4000)
    assert rate - 1 / (n + 1) - tolerance < np.mean(exceedance) < rate + tolerance


def test_too_few_images_reach_only_the_lowest_rate():
    # The largest of n scores is exceeded with a probability of 1 / (n + 1).
    rng = np.random.default_rng(3)
    drawn = [conformal_threshold(rng.random(10), false_positive_rate=0.05) for _ in range(4000)]
    assert np.mean([1 - threshold.value for threshold in drawn]) == pytest.approx(drawn[0].reachable, rel=0.06)


def test_note_where_it_is_reachable():
    note = conformal_threshold(np.arange(19.0), false_positive_rate=0.05).note()
    assert note == (
        "At most 5.0% of normal images score above it, by 19 held-out normal images; "
        "so many leave it between 0.1% and 17.6%, with a confidence of 95%"  # 1 - 0.975^(1/19) and 1 - 0.025^(1/19)
    )


def test_note_where_it_is_not():
    threshold = conformal_threshold(np.arange(10.0), false_positive_rate=0.05)
    assert threshold.value == 9
    assert "10 held-out normal images cannot promise a false-positive rate of 5.0%" in threshold.note()
    assert "the lowest they can is 9.1%" in threshold.note()  # 1 / 11
    assert "between 0.3% and 30.8%" in threshold.note()  # 1 - 0.975^(1/10) and 1 - 0.025^(1/10)


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        ([], 0.05, r"at least one finite score \[n\]"),
        ([1.0, np.nan], 0.05, "finite score"),
        ([1.0, np.inf], 0.05, "finite score"),
        ([[1.0, 2.0]], 0.05, r"\[n\]"),
        ([1.0], 0.0, "between 0 and 1, got 0.0"),
        ([1.0], 1.0, "between 0 and 1, got 1.0"),
        ([1.0], -0.1, "between 0 and 1"),
        ([1.0], np.nan, "between 0 and 1, got nan"),
    ],
)
def test_errors(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        conformal_threshold(np.asarray(scores), false_positive_rate=rate)
