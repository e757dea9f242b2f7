"""The plainest layout of one's own photographs: good ones, bad ones, and masks if there are any; nothing is decoded.

    CATEGORY/good/NAME.png
    CATEGORY/bad/NAME.png
    CATEGORY/masks/NAME.png                 or NAME_mask.png, of NAME in bad; any extension

The rule for the split, which such a folder does not have: all bad images are tested, and so is a fifth of the good ones
(`manifest.share_for_test`); the others are trained on. Where there is a folder masks, each bad image has one; a table
(`manifest_table`) can leave some out.
"""

import os
from collections import defaultdict
from pathlib import Path

from pushpull_jax.data.folders import Fault, Faults, existing_folder, image_files, relative, settle, subfolders
from pushpull_jax.data.manifest import IMAGE_SUFFIXES, Record, missing_category, share_for_test


def good_bad_categories(root: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories in a folder: its subfolders that hold a folder good, sorted.

    Raises:
        InputError: the folder does not exist.
    """
    return tuple(folder.name for folder in subfolders(existing_folder(root)) if (folder / "good").is_dir())


def read_good_bad(root: str | os.PathLike, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of one category.

    Args:
        root: the folder that holds the categories; keys are relative to it.
        category: name of a subfolder.
        faults: receives what is wrong in place of an error.

    Returns:
        Its records sorted by key; defects are of type "bad".

    Raises:
        InputError: root or category does not exist; without `faults` also where there is no good image, or a bad image
            or a mask has no partner or more than one.
    """
    root = existing_folder(root)
    if category not in good_bad_categories(root):
        hint = f"; {root} looks like a category itself: the data folder is {root.parent}, the category {root.name}"
        is_category = (root / "good").is_dir()
        raise missing_category(category, good_bad_categories(root), where=str(root), hint=hint if is_category else "")
    base, found = root / category, defaultdict(list)
    good = {relative(path, root): path for path in image_files(base / "good", found)}
    if not good:
        fault = Fault(f"no image ({', '.join(IMAGE_SUFFIXES)}) among the good ones", "no_training_image")
        found[fault].append(base / "good")
    tested = share_for_test(good)
    records = [
        Record(key, str(path), None, 0, "good", "test" if key in tested else "train", category)
        for key, path in good.items()
    ]
    bad = image_files(base / "bad", found)
    for path, mask in _masks(base, bad, found).items():
        records.append(Record(relative(path, root), str(path), mask, 1, "bad", "test", category))
    settle(found, faults, what=f"category {category}", base=base)
    return tuple(sorted(records, key=lambda record: record.key))


def _masks(base: Path, bad: list[Path], faults: Faults) -> dict[Path, str | None]:
    """Each bad image with its mask."""
    if not (base / "masks").is_dir():
        return dict.fromkeys(bad)
    files: dict[str, list[Path]] = defaultdict(list)
    for path in image_files(base / "masks", faults):
        files[path.stem].append(path)
    stems = [path.stem for path in bad]
    masks: dict[Path, str | None] = {}
    for path in bad:
        own = files.pop(path.stem, []) + files.pop(f"{path.stem}_mask", [])
        if stems.count(path.stem) > 1:
            faults[Fault("images of one name, so that their mask is ambiguous", "ambiguous_mask")].append(path)
        elif not own:
            faults[Fault("bad images without their mask masks/NAME.png", "image_without_mask")].append(path)
        elif len(own) > 1:
            faults[Fault("more than one mask for one image", "ambiguous_mask")] += own
        masks[path] = str(own[0]) if own else None
    for orphans in files.values():
        faults[Fault("masks without their image in bad", "mask_without_image")] += orphans
    return masks
