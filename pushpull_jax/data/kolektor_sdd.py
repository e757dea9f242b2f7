"""KolektorSDD on disk (D. Tabernik et al., J. Intelligent Manufacturing 2020), read into a manifest.

    kosNN/PartN.jpg                         commutator NN, each of its surfaces
    kosNN/PartN_label.bmp                   its mask, of normal surfaces too

The rule for labels: a surface is anomalous where its mask marks a pixel, so the masks are decoded here. The rule for
the split: the authors test by three-fold cross-validation over the commutators, no surface of which is in two folds.
Here every third commutator is tested (kos03, kos06, ...), as one such fold; the defective surfaces of the others are
labelled anomalies of the training split, as the authors train on them.
"""

import os
import re
from collections import defaultdict

from pushpull_jax.data.folders import Fault, Faults, existing_folder, image_files, relative, settle, subfolders
from pushpull_jax.data.manifest import Record, missing_category
from pushpull_jax.errors import InputError

KOLEKTOR_SDD = "kolektor_sdd"  # its one category


def commutators(root: str | os.PathLike) -> dict[str, int]:
    """Name of each folder kosNN -> its number.

    Raises:
        InputError: the folder does not exist.
    """
    names = [folder.name for folder in subfolders(existing_folder(root))]
    return {name: int(name[3:]) for name in names if re.fullmatch(r"kos\d+", name)}


def read_kolektor_sdd(root: str | os.PathLike, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest.

    Args:
        root: the folder that holds kos01, kos02, ...; keys are relative to it.
        category: "kolektor_sdd", the one there is.
        faults: receives what is wrong in place of an error; an image whose mask cannot be read is unlabelled then.

    Returns:
        The records sorted by key; defects are of type "defect".

    Raises:
        InputError: root or category does not exist; without `faults` also where a mask cannot be read, or an image or a
            mask has no partner.
    """
    root = existing_folder(root)
    if category != KOLEKTOR_SDD:
        raise missing_category(category, (KOLEKTOR_SDD,), where=str(root))
    numbers, found, records = commutators(root), defaultdict(list), []
    for name, number in numbers.items():
        files = image_files(root / name, found)
        masks = {path.stem.removesuffix("_label"): path for path in files if path.stem.endswith("_label")}
        for path in (path for path in files if not path.stem.endswith("_label")):
            mask = masks.pop(path.stem, None)
            if mask is None:
                found[Fault("images without their mask NAME_label.bmp", "image_without_mask")].append(path)
            label = None if mask is None else _label(str(mask), is_strict=faults is None)
            kind = {0: "good", 1: "defect", None: "unlabelled"}[label]
            split = "test" if number % 3 == 0 else "train"
            key = relative(path, root)
            records.append(Record(key, str(path), mask and str(mask), label, kind, split, KOLEKTOR_SDD))
        found[Fault("masks without their image", "mask_without_image")] += masks.values()
    if not any(record.split == "train" and record.label == 0 for record in records):
        found[Fault("no normal training image in folders kosNN", "no_training_image")].append(root)
    settle(found, faults, what="KolektorSDD", base=root)
    return tuple(sorted(records, key=lambda record: record.key))


def _label(mask: str, *, is_strict: bool) -> int | None:
    from pushpull_jax.data.images import decode_mask  # here: numpy takes longer than the listing of a folder

    try:
        return int(decode_mask(mask).any())
    except InputError:
        if is_strict:
            raise
        return None
