"""The threshold: the conformal quantile of the scores of held-out normal images. Host, numpy.

If a new normal image is exchangeable with the n held-out ones, its score exceeds the threshold with a probability of at
most f (Vovk et al., Algorithmic Learning in a Random World, 2005, chapter 4).
"""

import math
from typing import NamedTuple

import numpy as np


class Threshold(NamedTuple):
    """A threshold and what it promises.

    Attributes:
        value: an image is anomalous when its score is above it.
        false_positive_rate: the share of normal images that was asked for.
        reachable: the lowest rate that n images can promise, 1 / (n + 1).
        n: number of held-out normal images.
        rank: of their scores, from 1 on, the one that is the threshold.
    """

    value: float
    false_positive_rate: float
    reachable: float
    n: int
    rank: int

    def interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Between which shares of all normal images lie above the threshold, with equal tails.

        Were the n images drawn anew, the share would be distributed as Beta(n + 1 - rank, rank) (Vovk, Conditional
        validity of inductive conformal predictors, 2012).
        """
        from scipy.stats import beta  # half a second to import

        tail = (1 - confidence) / 2
        low, high = beta.ppf((tail, 1 - tail), self.n + 1 - self.rank, self.rank).tolist()
        return low, high

    def note(self, *, folds: int = 0) -> str:
        """The promise in words, and how well so many images keep it.

        Args:
            folds: detectors that scored the images between them; 0 where it was the one that the threshold is for,
                of which alone the interval tells.
        """
        images, rate = f"{self.n} held-out normal images", f"{self.false_positive_rate:.1%}"
        low, high = self.interval()
        spread = f"so many leave it between {low:.1%} and {high:.1%}, with a confidence of 95%"
        if folds:
            spread = f"each was scored by a detector trained without its fold, {folds} in all"
        if self.reachable > self.false_positive_rate:
            return (
                f"{images} cannot promise a false-positive rate of {rate}; the lowest they can is "
                f"{self.reachable:.1%}, which this threshold, the largest of their scores, has; {spread}"
            )
        return f"At most {rate} of normal images score above it, by {images}; {spread}"


def conformal_threshold(scores: np.ndarray, *, false_positive_rate: float) -> Threshold:
    """The ceil((n+1)(1-f))-th smallest score of n normal images, or the largest where n is too small for f.

    Args:
        scores: [n], at least one, of normal images that were not trained on.
        false_positive_rate: f, between 0 and 1.

    Raises:
        ValueError: no scores, a score is not finite, or f is not between 0 and 1.
    """
    scores = np.sort(np.asarray(scores, np.float64))
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"expected at least one finite score [n], got {scores!r}")
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"expected a false-positive rate between 0 and 1, got {false_positive_rate}")
    n = scores.size
    # The tolerance keeps 10 (1 - 0.7), which floats make 3.0000000000000004, at rank 3.
    rank = min(math.ceil((n + 1) * (1 - false_positive_rate) - 1e-9), n)
    return Threshold(float(scores[rank - 1]), false_positive_rate, 1 / (n + 1), n, rank)
