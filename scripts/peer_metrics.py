"""Pixel AUROC and AU-PRO as one would write them with NumPy, SciPy and scikit-learn: the peer of our metrics.

Masks [N,H,W] boolean and maps [N,H,W] float; exact, each by one sort of all pixels, nothing binned.
"""

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score


def plain_aupro(masks: np.ndarray, maps: np.ndarray, *, fpr_limit: float = 0.3) -> float:
    """AU-PRO of Bergmann et al. (CVPR 2019): mean overlap of 8-connected regions over the false-positive rate.

    Args:
        masks: [N,H,W] bool.
        maps: [N,H,W] float.
        fpr_limit: up to which the curve is integrated, linear at the limit, and by which the area is divided.
    """
    weights, count = np.zeros(masks.shape, np.float64), 0
    for mask, weight in zip(masks, weights, strict=True):
        regions, found = ndimage.label(mask, np.ones((3, 3)))
        areas = np.bincount(regions.ravel())
        weight[mask] = 1.0 / areas[regions[mask]]
        count += found
    order = np.argsort(-maps, axis=None)
    scores = maps.ravel()[order]
    last_of_ties = np.append(scores[1:] != scores[:-1], True)
    fpr = np.cumsum(~masks.ravel()[order])[last_of_ties] / np.count_nonzero(~masks)
    pro = np.cumsum(weights.ravel()[order])[last_of_ties] / count
    fpr, pro = np.append(0.0, fpr), np.append(0.0, pro)
    within = fpr <= fpr_limit
    at_limit = np.interp(fpr_limit, fpr, pro)
    return float(np.trapezoid(np.append(pro[within], at_limit), np.append(fpr[within], fpr_limit)) / fpr_limit)


def plain_pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    """ "pixel_auroc" and "aupro"."""
    return {"pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel())), "aupro": plain_aupro(masks, maps)}
