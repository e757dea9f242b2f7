"""Features of images, each extracted once: what several sets of examples, or several runs, have in common.

A row is a position among the sources of features, [h,w,C] float32 each, not standardised; where they are is the store's
affair. An image that is asked for twice has the row it had.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pushpull_jax.batching import BATCH_SIZE
from pushpull_jax.config import Data
from pushpull_jax.conversion.tensors import Parameters
from pushpull_jax.data.manifest import Record
from pushpull_jax.extraction import Extractor, Source
from pushpull_jax.feature_stores import OnDisk, Resident, Streamed
from pushpull_jax.features import FeatureSpec, Standardisation, extract_all
from pushpull_jax.progress import progress_bar


class FeatureBank:
    """Rows of features by what they are extracted from.

    Attributes:
        extractor: of the features.
        store: where they are.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        parameters: Parameters,
        data: Data,
        *,
        store: Callable[[Extractor], Resident | OnDisk | Streamed] = Resident,
    ):
        self.extractor = Extractor(spec, parameters, data)
        self.store = store(self.extractor)
        self._rows: dict[Record, int] = {}

    @property
    def spec(self) -> FeatureSpec:
        """What is extracted."""
        return self.extractor.spec

    @property
    def parameters(self) -> Parameters:
        """Of the backbone."""
        return self.extractor.parameters

    @property
    def features(self) -> np.ndarray:
        """All features so far, [N,h,w,C] float32, where they are kept in memory."""
        return self.store.features

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Features of some rows in batches [b,h,w,C] of BATCH_SIZE, the last one of what remains."""
        return self.store.read(rows)

    def rows(self, records: Sequence[Record], *, what: str, dropped: dict[str, str]) -> np.ndarray:
        """Rows of the records that can be read, in their order, [n] int32.

        Args:
            records: of images.
            what: what the progress bar calls them.
            dropped: receives key -> reason of each record that is left out, where the data say "skip".

        Raises:
            InputError: see `image_batches`.
        """
        new = [record for record in dict.fromkeys(records) if record not in self._rows]
        if new:
            rows, _ = self._add([Source(record) for record in new], what, dropped, reduce=None)
            self._rows |= {record: int(row) for record, row in zip(new, rows, strict=True) if row >= 0}
        return np.asarray([self._rows[record] for record in records if record in self._rows], np.int32)

    def confetti_rows(
        self, records: Sequence[Record], *, seed: int, copies: int, reduce: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows [n] int32 of copies of images with confetti noise, copy by copy, and their masks [n,...].

        Args:
            records: of images that can be read; copy c of image i is drawn from the key (seed, c, i).
            seed: of the run.
            copies: of each image.
            reduce: from the pixels [S,S] that noise changed to the mask that is kept.
        """
        sources = [Source(record, (seed, c, i)) for c in range(copies) for i, record in enumerate(records)]
        rows, masks = self._add(sources, "confetti", {}, reduce=reduce)
        return rows[rows >= 0], masks

    def _add(
        self, sources: list[Source], what: str, dropped: dict[str, str], *, reduce: Callable | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of sources, -1 of those that cannot be read, and the masks of the others."""
        rows = np.full(len(sources), -1, np.int32)
        with progress_bar(desc=what, total=len(sources), unit="image") as bar:
            positions, masks = self.store.add(sources, dropped, bar.update, reduce)
        rows[positions] = np.arange(len(self.store) - len(positions), len(self.store))
        return rows, masks

    def rows_with_masks(
        self, records: Sequence[Record], *, what: str, dropped: dict[str, str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`rows` of images that are not yet there, their masks [n,S,S] bool, and whether these are known, [n] bool.

        For a bank that keeps features in memory.
        """
        size = self.extractor.data.image_size
        masks, has_mask = [np.zeros((0, size, size), bool)], [np.zeros(0, bool)]

        def watched(batches: Iterator) -> Iterator:
            for batch in batches:
                masks.append(batch["mask"].copy())
                has_mask.append(batch["has_mask"].copy())
                yield batch

        batches = watched(self.extractor.images(records, dropped, with_masks=True))
        bar = progress_bar(batches, desc=what, total=-(-len(records) // BATCH_SIZE), unit="batch")
        rows = self.store.append(extract_all(self.spec, self.parameters, bar, batch_size=BATCH_SIZE))
        return rows, np.concatenate(masks), np.concatenate(has_mask)


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
