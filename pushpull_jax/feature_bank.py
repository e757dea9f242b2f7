"""Features of images, each extracted once and kept: what several sets of examples, or several runs, have in common.

Features are [N,h,w,C] float32, not standardised, on the host. A row is a position among them; an image that is asked
for twice has the row it had.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pushpull_jax.batching import BATCH_SIZE
from pushpull_jax.config import Data
from pushpull_jax.conversion.tensors import Parameters
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.features import FeatureSpec, Standardisation, extract_all
from pushpull_jax.hosts import divided
from pushpull_jax.progress import progress_bar


class FeatureBank:
    """Rows of features by record; `add` takes features of anything else.

    Attributes:
        spec: what is extracted.
        parameters: of the backbone.
        data: how images are read and resized.
    """

    def __init__(self, spec: FeatureSpec, parameters: Parameters, data: Data):
        self.spec, self.parameters, self.data = spec, parameters, data
        self._rows: dict[Record, int] = {}
        self._parts: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def features(self) -> np.ndarray:
        """All features so far, [N,h,w,C] float32."""
        if len(self._parts) != 1:
            empty = np.zeros((0, self.spec.grid, self.spec.grid, sum(self.spec.widths)), np.float32)
            self._parts = [np.concatenate(self._parts or [empty])]
        return self._parts[0]

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Features of some rows in batches [b,h,w,C] of BATCH_SIZE, the last one of what remains."""
        for start in range(0, len(rows), BATCH_SIZE):
            yield self.features[rows[start : start + BATCH_SIZE]]

    def add(self, features: np.ndarray) -> np.ndarray:
        """Keep features [n,h,w,C]; their rows, [n] int32."""
        first = len(self)
        self._parts.append(features)
        return np.arange(first, first + len(features), dtype=np.int32)

    def rows(self, records: Sequence[Record], *, what: str, dropped: dict[str, str]) -> np.ndarray:
        """Rows of the records that can be read, in their order, [n] int32; those that are new are extracted.

        Args:
            records: of images.
            what: what the progress bar calls them.
            dropped: receives key -> reason of each record that is left out, where the data say "skip".

        Raises:
            InputError: see `image_batches`.
        """
        new = [record for record in dict.fromkeys(records) if record not in self._rows]
        if new:
            rows = self.add(divided(functools.partial(self._extracted, what), new, dropped))
            read = (record for record in new if record.key not in dropped)
            self._rows |= dict(zip(read, rows.tolist(), strict=True))
        return np.asarray([self._rows[record] for record in records if record in self._rows], np.int32)

    def _extracted(self, what: str, records: Sequence[Record], dropped: dict[str, str]) -> np.ndarray:
        """Features of the records that can be read."""
        total = -(-len(records) // BATCH_SIZE)
        bar = progress_bar(self.batches(records, dropped), desc=what, total=total, unit="batch")
        return extract_all(self.spec, self.parameters, bar, batch_size=BATCH_SIZE)

    def rows_with_masks(
        self, records: Sequence[Record], *, what: str, dropped: dict[str, str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`rows` of images that are not yet there, their masks [n,S,S] bool, and whether these are known, [n] bool."""
        masks, has_mask = [np.zeros((0, self.data.image_size, self.data.image_size), bool)], [np.zeros(0, bool)]

        def watched(batches: Iterator) -> Iterator:
            for batch in batches:
                masks.append(batch["mask"].copy())
                has_mask.append(batch["has_mask"].copy())
                yield batch

        batches = watched(self.batches(records, dropped, with_masks=True))
        bar = progress_bar(batches, desc=what, total=-(-len(records) // BATCH_SIZE), unit="batch")
        rows = self.add(extract_all(self.spec, self.parameters, bar, batch_size=BATCH_SIZE))
        return rows, np.concatenate(masks), np.concatenate(has_mask)

    def batches(
        self, records: Sequence[Record], dropped: dict[str, str], *, with_masks: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of images, see `image_batches`."""
        return image_batches(
            records,
            image_size=self.data.image_size,
            batch_size=BATCH_SIZE,
            resize=self.data.resize,
            with_masks=with_masks,
            on_unreadable=self.data.on_unreadable,
            dropped=dropped,
        )


@dataclass(frozen=True)
class FeatureRows:
    """Standardised features of some rows of a bank, which are read batch by batch, as often as they are gone through.

    Attributes:
        bank: whose rows they are.
        rows: [n] int32.
        standardisation: of the run.
    """

    bank: FeatureBank
    rows: np.ndarray
    standardisation: Standardisation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: np.ndarray) -> "FeatureRows":
        """Those of some of the rows, by their position among these."""
        return FeatureRows(self.bank, self.rows[chosen], self.standardisation)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches [b,h,w,C] float32 of BATCH_SIZE rows, the last one of what remains."""
        return (np.asarray(self.standardisation(batch)) for batch in self.bank.read(self.rows))
