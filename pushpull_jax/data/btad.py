"""BTAD on disk (P. Mishra et al., VT-ADL, ISIE 2021), as its archive extracts it: categories 01, 02, 03.

    CATEGORY/train/ok/NAME.bmp
    CATEGORY/test/{ok,ko}/NAME.bmp
    CATEGORY/ground_truth/ko/NAME.png

The split is the official one. ok is normal, recorded as "good"; ko is anomalous and the one type of defect. A mask has
the name of its image and any extension: in the archive images and masks are bmp or png, not always the same.
"""

import os

from pushpull_jax.data.folders import Faults
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.split_folders import SplitFolders, read_split_folders

_LAYOUT = SplitFolders(normal="ok", masks="NAME.png")


def read_btad(root: str | os.PathLike, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of one category; see `read_split_folders`."""
    return read_split_folders(root, category, layout=_LAYOUT, faults=faults)
