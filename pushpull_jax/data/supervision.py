"""Which anomalous test images move into training, and what is known of each: a pure function of records and seed.

General and hard setting are those of Ding et al. (DRA, CVPR 2022): labelled anomalies of all types of defects, or of
one, with the others in the test set only. Nothing is decoded here.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pushpull_jax.config import nearest
from pushpull_jax.data.manifest import Record, listed
from pushpull_jax.errors import InputError

Label = Literal["mask", "image", "unlabelled", "unused"]


class Drawn(NamedTuple):
    """The test records of a data set, parted; sorted by key but for the shots, which are in the order drawn."""

    shots: tuple[Record, ...]
    test: tuple[Record, ...]
    withheld: tuple[Record, ...]  # the rest of the type that is seen in the hard setting


def draw_shots(
    test: Sequence[Record],
    *,
    shots: int,
    setting: Literal["general", "hard"] = "general",
    seen: str = "",
    seed: int,
) -> Drawn:
    """Draw labelled anomalies from the test records, the same number from each category.

    General: the types of a category take turns, in an order drawn by the seed, until `shots` images are drawn or a
    type is used up; each image is drawn uniformly from its type. Hard: all from one type, whose other images are
    withheld, so that the anomalies that are left to be found are of types that were never seen.

    Args:
        test: test records of any number of categories.
        shots: images a category.
        setting: "general" or "hard".
        seen: type of the hard setting; empty: drawn by the seed.
        seed: 0 or more.

    Raises:
        InputError: a category has too few anomalies, of all types or of the one seen; it has no type of that name; or
            the hard setting is asked of a category with one type.
    """
    if not shots:
        return Drawn((), tuple(test), ())
    if not test:
        raise InputError(f"supervision.shots: {shots} labelled anomalies were asked for, but there are no test images")
    import numpy as np  # here, so that the command line can read a manifest quickly

    drawn, withheld = [], []
    for category in sorted({record.category for record in test}):
        anomalies = sorted((r for r in test if r.label == 1 and r.category == category), key=lambda r: r.key)
        rng = np.random.default_rng(seed)
        types = sorted({record.defect_type for record in anomalies})
        if setting == "hard":
            seen_here = _seen_type(types, seen, category, rng)
            anomalies, types = [record for record in anomalies if record.defect_type == seen_here], [seen_here]
            withheld += anomalies
        if len(anomalies) < shots:
            of_type = f" of type {types[0]}" if setting == "hard" else ""
            raise InputError(
                f"supervision.shots: {shots} labelled anomalies were asked for, but category {category} has "
                f"{len(anomalies)} anomalous test images{of_type}"
            )
        drawn += _in_turn(anomalies, shots, rng)
    taken = {record.key for record in (*drawn, *withheld)}
    keys = {record.key for record in drawn}
    return Drawn(
        tuple(drawn),
        tuple(record for record in test if record.key not in taken),
        tuple(record for record in withheld if record.key not in keys),
    )


def deal_labels(records: Sequence[Record], labels: Sequence[Label]) -> tuple[tuple[Record, Label], ...]:
    """Give each labelled image a kind of label; those that are dealt "unused" are left out.

    The kinds take turns in the order of the keys, which puts the images of one type together: each type gets all kinds.
    An image without a label takes no turn: it is "unlabelled".

    Raises:
        InputError: an image without a mask is dealt "mask".
    """
    turn = {key: i for i, key in enumerate(sorted(record.key for record in records if record.label is not None))}
    dealt = tuple(
        (record, labels[turn[record.key] % len(labels)] if record.key in turn else "unlabelled") for record in records
    )
    without = sorted(record.key for record, label in dealt if label == "mask" and record.mask is None)
    if without:
        raise InputError(f"supervision.labels asks for the masks of images that have none: {listed(without)}")
    return tuple((record, label) for record, label in dealt if label != "unused")


def _seen_type(types: list[str], seen: str, category: str, rng) -> str:
    if len(types) < 2:
        raise InputError(
            f"supervision.setting hard: category {category} has {len(types)} types of defects ({listed(types)}); one "
            "is to be seen and others left for the test, so it takes 2 or more"
        )
    if seen and seen not in types:
        raise InputError(
            f"supervision.seen: category {category} has no type {seen!r}{nearest(seen, types)} "
            f"(it has: {listed(types)})"
        )
    return seen or types[rng.integers(len(types))]


def _in_turn(anomalies: list[Record], count: int, rng) -> list[Record]:
    """`count` records, the types in turn."""
    by_type: dict[str, list[Record]] = defaultdict(list)
    for position in rng.permutation(len(anomalies)):
        by_type[anomalies[position].defect_type].append(anomalies[position])
    queues = [by_type[name] for name in rng.permutation(sorted(by_type)).tolist()]
    drawn = []
    while len(drawn) < count:
        for queue in queues:
            if queue and len(drawn) < count:
                drawn.append(queue.pop())
    return drawn
