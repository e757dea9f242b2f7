"""The shares of several processes, which are pretended one after another; test_processes.py has two real ones."""

import itertools

import jax
import numpy as np
import pytest

from pushpull_jax import hosts, shares
from pushpull_jax.errors import InputError


@pytest.fixture
def as_process(monkeypatch):
    """(number, count) -> this is the process of that number, and nobody tells anything."""

    def become(number: int, count: int) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(hosts, "_exchanged", lambda text: [text] * count)

    return become


def gathered_from(monkeypatch, arrays):
    """What each process gathers, where these are the rows of each."""
    results, width = [], arrays[0].nbytes // len(arrays[0])
    for number in range(len(arrays)):
        blocks = itertools.count()  # each process gathers as many

        def exchange(mine):
            return [len(array) for array in arrays]

        def gather(block, blocks=blocks, number=number):
            start, size = 64 * next(blocks), len(block)
            flat = [np.frombuffer(array.tobytes(), np.uint8).reshape(-1, width) for array in arrays]
            parts = [part[start : start + size] for part in flat]
            whole = np.stack([np.pad(part, ((0, size - len(part)), (0, 0))) for part in parts])
            np.testing.assert_array_equal(block, whole[number])
            return whole

        with monkeypatch.context() as patch:
            patch.setattr(shares, "exchange", exchange)
            patch.setattr(shares.multihost_utils, "process_allgather", gather)
            results.append(shares.gathered(arrays[number]))
    return results


def test_one_process_has_it_all():
    rows = np.arange(6.0).reshape(2, 3)
    assert shares.share([3, 1]) == [3, 1] and shares.gathered(rows) is rows
    np.testing.assert_array_equal(shares.summed({"a": rows})["a"], rows)
    dropped = {}
    made = shares.shared_out(lambda items, dropped: dropped.update(b="broken") or items, ["a", "b"], dropped)
    assert made == ["a", "b"] and dropped == {"b": "broken"}


@pytest.mark.parametrize(("items", "count"), [(143, 2), (7, 3), (2, 5), (0, 4)])
def test_every_item_is_in_one_share(items, count, as_process):
    parts = []
    for number in range(count):
        as_process(number, count)
        parts.append(shares.shared_out(lambda some, dropped: some, np.arange(items), {}))
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool])
def test_rows_stand_in_the_order_of_the_processes(dtype, monkeypatch):
    """70 rows are two blocks; one process has none; float64 keeps its bits."""
    whole = np.random.default_rng(0).normal(size=(143, 3, 2)).astype(dtype)
    for gathered in gathered_from(monkeypatch, np.split(whole, (70, 70))):
        assert gathered.dtype == dtype
        np.testing.assert_array_equal(gathered, whole)
    for gathered in gathered_from(monkeypatch, np.split(whole[:5, 0, 0], (2, 4))):
        np.testing.assert_array_equal(gathered, whole[:5, 0, 0])


def test_what_one_leaves_out_all_do(monkeypatch, as_process):
    as_process(1, 2)
    monkeypatch.setattr(hosts, "_exchanged", lambda text: [text.replace("b", "a"), text])
    dropped = {}
    shares.shared_out(lambda items, dropped: dropped.update({item: "gone" for item in items}), ["a", "b"], dropped)
    assert dropped == {"a": "gone", "b": "gone"}


def test_what_one_finds_wrong_stops_all(monkeypatch, as_process):
    as_process(0, 2)
    monkeypatch.setattr(hosts, "_exchanged", lambda text: [text, '["b.png is no image", null]'])
    with pytest.raises(InputError, match="^b.png is no image$"):
        shares.shared_out(lambda items, dropped: items, ["a", "b"], {})
