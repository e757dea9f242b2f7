"""MVTec-AD on disk (P. Bergmann et al., CVPR 2019), the layout to give one's own photographs too.

CATEGORY/train/good/NAME.png            normal training images
CATEGORY/test/good/NAME.png             normal test images
CATEGORY/test/DEFECT/NAME.png           anomalous test images, one folder for each type of defect
CATEGORY/ground_truth/DEFECT/NAME_mask.png
"""

import os

from pushpull_jax.data.folders import Faults
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.split_folders import SplitFolders, read_split_folders

# The official archive and what it holds.
MVTEC_AD_ARCHIVE = "mvtec_anomaly_detection.tar.xz"
MVTEC_AD_CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip


def read_mvtec_ad(root: str | os.PathLike, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of one category; see `read_split_folders`."""
    return read_split_folders(root, category, layout=SplitFolders(), faults=faults)
