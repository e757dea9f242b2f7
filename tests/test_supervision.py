"""Drawing labelled anomalies: who moves into training, who stays in the test set, and what is known of each."""

from collections import Counter

import pytest

from pushpull_jax.data.manifest import Record
from pushpull_jax.data.supervision import deal_labels, draw_shots
from pushpull_jax.errors import InputError


def records(category: str = "nut", **counts: int) -> tuple[Record, ...]:
    """Test records: so many of each type."""
    made = []
    for kind, count in counts.items():
        for i in range(count):
            key = f"{category}/test/{kind}/{i:03}.png"
            label = int(kind != "good")
            made.append(Record(key, f"/{key}", f"/{key}_mask" if label else None, label, kind, "test", category))
    return tuple(sorted(made, key=lambda record: record.key))


TEST = records(good=5, bent=8, color=3, scratch=12)


@pytest.mark.parametrize("seed", range(5))
def test_general_parts_the_test_set(seed):
    drawn = draw_shots(TEST, shots=10, seed=seed)
    assert len(drawn.shots) == 10 and all(record.label == 1 for record in drawn.shots)
    assert sorted((*drawn.shots, *drawn.test), key=lambda r: r.key) == list(TEST)
    assert drawn.withheld == ()
    # Three types take turns over ten images: 4, 3, 3, and the third of "color" is its last.
    assert sorted(Counter(record.defect_type for record in drawn.shots).values()) == [3, 3, 4]


def test_a_type_that_is_used_up_leaves_its_turns_to_the_others():
    drawn = draw_shots(records(good=1, bent=9, color=2), shots=9, seed=0)
    assert Counter(record.defect_type for record in drawn.shots) == {"bent": 7, "color": 2}


def test_drawing_is_a_function_of_the_seed_alone():
    first = draw_shots(TEST, shots=6, seed=3)
    assert draw_shots(tuple(reversed(TEST)), shots=6, seed=3).shots == first.shots
    others = [draw_shots(TEST, shots=6, seed=seed).shots for seed in range(4, 10)]
    assert any(other != first.shots for other in others)


def test_a_smaller_draw_is_the_beginning_of_a_larger_one():
    assert draw_shots(TEST, shots=10, seed=1).shots[:4] == draw_shots(TEST, shots=4, seed=1).shots


def test_hard_sees_one_type_and_tests_the_others():
    drawn = draw_shots(TEST, shots=3, setting="hard", seen="bent", seed=0)
    assert {record.defect_type for record in (*drawn.shots, *drawn.withheld)} == {"bent"}
    assert (len(drawn.shots), len(drawn.withheld)) == (3, 5)
    assert {record.defect_type for record in drawn.test} == {"good", "color", "scratch"}
    assert not set(drawn.shots) & set(drawn.withheld)


def test_hard_draws_its_type_by_the_seed():
    seen = {draw_shots(TEST, shots=1, setting="hard", seed=seed).shots[0].defect_type for seed in range(20)}
    assert seen == {"bent", "color", "scratch"}


def test_every_category_gives_its_own():
    both = records("nut", good=2, bent=4) + records("pill", good=2, crack=4, color=4)
    drawn = draw_shots(both, shots=2, seed=0)
    assert Counter(record.category for record in drawn.shots) == {"nut": 2, "pill": 2}
    hard = draw_shots(
        records("pill", crack=4, color=4) + records("nut", bent=4, cut=4), shots=2, setting="hard", seed=0
    )
    for category in ("nut", "pill"):
        parts = [{r.defect_type for r in part if r.category == category} for part in (hard.shots, hard.test)]
        assert len(parts[0]) == 1 and not parts[0] & parts[1]


def test_no_shots_leave_the_test_set_as_it_is():
    assert draw_shots(TEST, shots=0, seed=0).test == TEST


@pytest.mark.parametrize(
    "test, options, message",
    [
        (TEST, {"shots": 24}, "24 labelled anomalies were asked for, but category nut has 23 anomalous test images"),
        (records(good=4), {"shots": 1}, "category nut has 0 anomalous test images"),
        ((), {"shots": 1}, "no test images"),
        (TEST, {"shots": 4, "setting": "hard", "seen": "color"}, "3 anomalous test images of type color"),
        (records(good=3, bent=4), {"shots": 1, "setting": "hard"}, "1 types of defects .bent."),
        (TEST, {"shots": 1, "setting": "hard", "seen": "colour"}, "did you mean color"),
    ],
)
def test_labels_that_cannot_be(test, options, message):
    with pytest.raises(InputError, match=message):
        draw_shots(test, seed=0, **options)


def test_every_type_gets_every_kind_of_label():
    # Types take turns in the draw: dealt in that order, three kinds would each go to a type of its own.
    drawn = draw_shots(records(good=1, bent=6, cut=6, color=6), shots=9, seed=0).shots
    dealt = deal_labels(drawn, ("mask", "image", "unlabelled"))
    assert len({(record.defect_type, label) for record, label in dealt}) == 9
    assert [record for record, _ in dealt] == list(drawn)


def test_kinds_of_labels_take_turns():
    bent = [record for record in TEST if record.defect_type == "bent"][:5]
    dealt = deal_labels(bent, ("mask", "image", "unused"))
    assert dealt == ((bent[0], "mask"), (bent[1], "image"), (bent[3], "mask"), (bent[4], "image"))
    assert [label for _, label in deal_labels(bent, ("unlabelled",))] == ["unlabelled"] * 5


def test_masks_that_are_asked_for_must_be_there():
    without = Record("nut/test/bent/000.png", "/x", None, 1, "bent", "test", "nut")
    with pytest.raises(InputError, match="nut/test/bent/000.png"):
        deal_labels([without], ("mask",))
    assert deal_labels([without], ("image",))[0][1] == "image"


def test_nothing_is_known_of_an_image_without_a_label():
    unlabelled = Record("nut/0.png", "/x", None, None, "unlabelled", "train", "nut")
    bent = [record for record in TEST if record.defect_type == "bent"][:2]
    for labels in (("mask",), ("image",), ("unused",), ("mask", "image")):
        dealt = deal_labels([unlabelled, *bent], labels)
        assert dealt == ((unlabelled, "unlabelled"), *deal_labels(bent, labels))
