"""MVTec LOCO AD on disk (P. Bergmann et al., IJCV 2022), as its archive extracts it.

    CATEGORY/{train,validation}/good/NAME.png
    CATEGORY/test/{good,logical_anomalies,structural_anomalies}/NAME.png
    CATEGORY/ground_truth/{logical_anomalies,structural_anomalies}/NAME/NUMBER.png
    CATEGORY/defects_config.json

The rule for masks: an image has a mask for each of its defects, whose pixels hold the defect's number in
defects_config.json; they are united, and any value but 0 is anomalous (as in anomalib). The saturation thresholds of
that file, with which the paper's sPRO asks for part of a region only, are not used: our AU-PRO asks for the whole
region and is no sPRO. The rule for the split: validation images are normal and join the training images, of which
every run holds some out for its threshold.
"""

import os

from pushpull_jax.data.folders import Faults
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.split_folders import SplitFolders, read_split_folders

_LAYOUT = SplitFolders(training=("train", "validation"), masks="NAME/*.png")


def read_mvtec_loco(root: str | os.PathLike, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of one category; see `read_split_folders`."""
    return read_split_folders(root, category, layout=_LAYOUT, faults=faults)
