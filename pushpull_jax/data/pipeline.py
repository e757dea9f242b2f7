"""Batches of decoded and resized images by tf.data: the only home of tensorflow, which is imported at first use.

Decoding and resizing are those of `images`, called inside tf.data in parallel; tensorflow only schedules, and is kept
off every accelerator. Batches are numpy: images [B,S,S,3] float32 in 0..255, S the image size of the run, in the
order of the records. A file that cannot be used is an InputError of ours that names it, never tensorflow's.
"""

import atexit
import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np

from pushpull_jax.data.images import Resize, mask_to_image, read_image, read_mask, resize_image
from pushpull_jax.data.manifest import Record, listed
from pushpull_jax.errors import InputError

OnUnreadable = Literal["stop", "skip"]

# Those under way. One that is left unfinished must end before Python does: its threads call Python, and the end of the
# process would wait for them for ever.
_passes: weakref.WeakSet = weakref.WeakSet()


def image_batches(
    records: Sequence[Record],
    *,
    image_size: int,
    batch_size: int,
    resize: Resize = "stretch",
    with_masks: bool = False,
    on_unreadable: OnUnreadable = "stop",
    dropped: dict[str, str] | None = None,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Decode and resize the images of some records, batch by batch, in their order.

    Every batch but the last has batch_size images; the last has what remains. A full pass is also the check of the
    files: with "stop", nothing more is yielded once a file has failed, the rest is only read, and the pass ends with
    one error that names all that failed. With "skip" the pass goes on without them; batches stay full.

    Args:
        records: what to read.
        image_size: S.
        batch_size: B.
        resize: "stretch" or "letterbox", see `images.resize_image`.
        with_masks: read masks too, reduced by `images.mask_to_image`, the rule of evaluation.
        on_unreadable: "stop" or "skip".
        dropped: with "skip", receives key -> reason of each record left out; without it a warning names them.
        threads: images decoded at a time; by default one a core.

    Yields:
        "image" [B,S,S,3] float32 in 0..255 and "index" [B] int32, the position in records; with masks "mask"
        [B,S,S] bool and "has_mask" [B] bool, False where the truth is not known: an anomalous or unlabelled image
        without a mask, whose "mask" is all False. The arrays are read-only.

    Raises:
        InputError: with "stop", at the end of the pass, when a file cannot be decoded or a mask does not fit.
    """
    _check_choice(on_unreadable)
    if image_size < 1 or batch_size < 1:
        raise ValueError(f"image_size and batch_size must be at least 1, got {image_size} and {batch_size}")
    if resize not in ("stretch", "letterbox"):
        raise ValueError(f'resize must be "stretch" or "letterbox", got {resize!r}')
    records = tuple(records)
    failed: dict[int, str] = {}

    def example(position: int) -> tuple[np.ndarray, ...]:
        image, mask = np.zeros((image_size, image_size, 3), np.float32), np.zeros((image_size, image_size), bool)
        has_mask = False
        try:
            pixels, truth = _read(records[position], with_masks=with_masks)
            image = resize_image(pixels, size=image_size, mode=resize)
            if truth is not None:
                has_mask, mask = True, mask_to_image(truth, size=image_size, mode=resize)
        except InputError as error:
            # An exception would come out of tensorflow as one of its own, and end the pass at the first bad file.
            failed[int(position)] = str(error)
        return np.bool_(int(position) not in failed), image, mask, np.bool_(has_mask)

    dataset = _dataset(example, len(records), image_size, batch_size, with_masks, threads or cores())
    return _batches(dataset, records, failed, on_unreadable, dropped)


def check_readable(
    records: Sequence[Record],
    *,
    on_unreadable: OnUnreadable = "stop",
    dropped: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> tuple[Record, ...]:
    """Decode every image and mask of some records, before anything long starts.

    Args:
        records: what to read.
        on_unreadable: "stop" or "skip".
        dropped: with "skip", receives key -> reason of each record left out; without it a warning names them.
        progress: called after each record with how many are done and how many there are.
        threads: images decoded at a time; by default one a core.

    Returns:
        The records that can be read, in their order; all of them with "stop".

    Raises:
        InputError: with "stop", when a file cannot be decoded or a mask does not fit; it names all of them.
    """
    _check_choice(on_unreadable)
    records = tuple(records)
    failed: dict[int, str] = {}
    with ThreadPoolExecutor(threads or cores()) as pool:
        for position, reason in enumerate(pool.map(_fault, records)):
            if reason is not None:
                failed[position] = reason
            if progress is not None:
                progress(position + 1, len(records))
    _report(records, failed, on_unreadable, dropped)
    return tuple(record for position, record in enumerate(records) if position not in failed)


def read_in_order(
    load: Callable[[int], np.ndarray],
    order: Iterable[int],
    *,
    shape: tuple[int, ...],
    batch_size: int,
    prefetch: int,
    threads: int | None = None,
) -> Iterator[np.ndarray]:
    """Arrays that are loaded one by one, several at a time, in batches that are ready before they are asked for.

    Args:
        load: from an item of `order` to an array, float32; it is called in threads.
        order: what to load; gone through in a thread, and no further than is needed.
        shape: of an array.
        batch_size: B.
        prefetch: batches that are ready at most.
        threads: arrays loaded at a time; by default one a core.

    Yields:
        [B, *shape] float32, in order, the last one of what remains. The arrays are read-only.

    Raises:
        Exception: the first one that `load` raised, at once.
    """
    tf, failed = _tensorflow(), []

    def loaded(item: np.ndarray) -> np.ndarray:
        try:
            return load(int(item))
        except Exception as error:  # it would come out of tensorflow as one of its own
            failed.append(error)
            return np.zeros(shape, np.float32)

    def array(item):
        result = tf.numpy_function(loaded, [item], tf.float32)
        result.set_shape(shape)
        return result

    plain = tf.autograph.experimental.do_not_convert
    dataset = tf.data.Dataset.from_generator(lambda: iter(order), output_signature=tf.TensorSpec((), tf.int64))
    dataset = dataset.map(plain(array), num_parallel_calls=threads or cores(), deterministic=True)
    dataset = dataset.batch(batch_size)
    for batch in _as_numpy(dataset.prefetch(prefetch) if prefetch else dataset):
        if failed:
            raise failed[0]
        yield batch


@cache
def _tensorflow() -> ModuleType:
    """TensorFlow, imported without its greetings and kept off accelerators, whose memory it would take whole."""
    with contextlib.ExitStack() as restored:
        # The second one greets whatever the log level says; nothing is computed by tensorflow here.
        for variable, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
            if variable not in os.environ:
                os.environ[variable] = value
                restored.callback(os.environ.pop, variable, None)
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            # Somebody who has used tensorflow's devices in this process already has chosen otherwise.
            with contextlib.suppress(RuntimeError):
                tf.config.set_visible_devices([], kind)
    return tf


def _dataset(example: Callable, count: int, image_size: int, batch_size: int, with_masks: bool, threads: int):
    """The tf.data.Dataset of batches; examples that failed are filtered out before they are batched."""
    tf = _tensorflow()
    # There is no Python control flow to compile, and autograph would warn that it cannot read these functions.
    plain = tf.autograph.experimental.do_not_convert

    def fields(position):
        kinds = (tf.bool, tf.float32, tf.bool, tf.bool)
        is_good, image, mask, has_mask = tf.numpy_function(example, [position], kinds)
        is_good.set_shape([])
        image.set_shape([image_size, image_size, 3])
        batch = {"image": image, "index": tf.cast(position, tf.int32)}
        if with_masks:
            mask.set_shape([image_size, image_size])
            has_mask.set_shape([])
            batch |= {"mask": mask, "has_mask": has_mask}
        return is_good, batch

    dataset = tf.data.Dataset.range(count).map(plain(fields), num_parallel_calls=threads, deterministic=True)
    dataset = dataset.filter(plain(lambda is_good, batch: is_good)).map(plain(lambda is_good, batch: batch))
    return dataset.batch(batch_size, drop_remainder=False).prefetch(1)


def _as_numpy(dataset) -> Iterator:
    """The elements of a dataset, without the thread that tunes what is left to tune: nothing is.

    That thread sleeps for longer and longer, and the end of a pass waits for it, by half a second after a second or so.
    """
    options = _tensorflow().data.Options()
    options.autotune.enabled = False
    elements = (element for element in dataset.with_options(options).as_numpy_iterator())
    _passes.add(elements)
    return elements


@atexit.register
def _end_passes() -> None:
    for elements in list(_passes):
        with contextlib.suppress(ValueError):  # a thread is inside it
            elements.close()


def _batches(dataset, records: tuple, failed: dict, on_unreadable: OnUnreadable, dropped: dict | None) -> Iterator:
    for batch in _as_numpy(dataset):
        if not failed or on_unreadable == "skip":
            yield batch
    _report(records, failed, on_unreadable, dropped)


def _read(record: Record, *, with_masks: bool) -> tuple[np.ndarray, np.ndarray | None]:
    image = read_image(record)
    return image, read_mask(record, size=image.shape[:2]) if with_masks else None


def _fault(record: Record) -> str | None:
    """Why a record cannot be read, None where it can."""
    try:
        _read(record, with_masks=True)
    except InputError as error:
        return str(error)
    return None


def _report(records: tuple, failed: dict, on_unreadable: OnUnreadable, dropped: dict | None) -> None:
    """Raise, record or warn of what could not be read, in the order of the records."""
    if not failed:
        return
    reasons = {records[position].key: failed[position] for position in sorted(failed)}
    lines = listed(list(reasons.values()), separator="\n  ")
    if on_unreadable == "stop":
        raise InputError(f"{len(reasons)} of {len(records)} examples cannot be read:\n  {lines}")
    if dropped is not None:
        dropped.update(reasons)
    else:
        warnings.warn(f"{len(reasons)} of {len(records)} examples cannot be read, left out:\n  {lines}", stacklevel=3)


def _check_choice(on_unreadable: str) -> None:
    if on_unreadable not in ("stop", "skip"):
        raise InputError(f'on_unreadable must be "stop" or "skip", got {on_unreadable!r}')


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
