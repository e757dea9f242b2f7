"""MVTec-AD and VisA as builders of tensorflow-datasets, prepared from their official archives (manual download).

Images and masks are stored as the bytes of their files, in the order of the records that `mvtec_ad.read_mvtec_ad` and
`visa.read_visa` find in the extracted archive; all that these records say stands in the metadata too, so that a
manifest is read without touching the images. This module is imported when a builder is wanted, not before: it imports
tensorflow-datasets, which takes a second.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pushpull_jax.data.manifest import Record
from pushpull_jax.data.mvtec_ad import MVTEC_AD_ARCHIVE, MVTEC_AD_CATEGORIES, read_mvtec_ad
from pushpull_jax.data.split_folders import categories
from pushpull_jax.data.visa import VISA_ARCHIVES, read_visa, visa_categories


class MvtecAd(tfds.core.GeneratorBasedBuilder):
    """MVTec-AD: a config for each category, and "all" for all that the archive holds."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("all", *MVTEC_AD_CATEGORIES)]  # noqa: RUF012
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    ARCHIVES = (MVTEC_AD_ARCHIVE,)
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Get {MVTEC_AD_ARCHIVE} from {HOMEPAGE} (CC BY-NC-SA 4.0)."

    def _info(self) -> tfds.core.DatasetInfo:
        return _described(self, "P. Bergmann et al., MVTec AD, CVPR 2019.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        root, name = _extracted(self, dl_manager), self.builder_config.name
        names = categories(root) if name == "all" else (name,)
        return _splits(self, [record for category in names for record in read_mvtec_ad(root, category)])

    def _generate_examples(self, records: list[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        return _examples(records)


class Visa(tfds.core.GeneratorBasedBuilder):
    """VisA: a config for each of the official protocols, with all categories."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name) for name in ("1cls", "2cls_fewshot", "2cls_highshot")
    ]
    HOMEPAGE = "https://github.com/amazon-science/spot-diff"
    ARCHIVES = VISA_ARCHIVES
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar (CC BY 4.0)."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return _described(self, "Y. Zou et al., SPot-the-Difference, ECCV 2022.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        root, protocol = _extracted(self, dl_manager), self.builder_config.name
        names = visa_categories(root, protocol)
        return _splits(self, [record for name in names for record in read_visa(root, name, protocol=protocol)])

    def _generate_examples(self, records: list[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        return _examples(records)


def _described(builder: MvtecAd | Visa, source: str) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder,
        description=f"{source} Images and masks are the bytes of their files.",
        homepage=builder.HOMEPAGE,
        features=tfds.features.FeaturesDict(
            {
                "key": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3)),
                # Not every image has a mask, so it is no Image feature: empty where there is none.
                "mask": tfds.features.Tensor(shape=(), dtype=np.object_),
                "label": tfds.features.ClassLabel(names=("normal", "anomalous")),
                "defect_type": tfds.features.Text(),
                "category": tfds.features.Text(),
            }
        ),
        metadata=tfds.core.MetadataDict(),
        # Examples stay in the order of the metadata.
        disable_shuffling=True,
    )


def _extracted(builder: MvtecAd | Visa, dl_manager: tfds.download.DownloadManager) -> Path:
    archive = next(path for name in builder.ARCHIVES if (path := dl_manager.manual_dir / name).exists())
    # Without its method named, an archive of this extension is handed back as it is (tensorflow-datasets 4.9.10).
    method = tfds.download.ExtractMethod.TAR
    return Path(dl_manager.extract(tfds.download.Resource(path=archive, extract_method=method)))


def _splits(builder: MvtecAd | Visa, records: list[Record]) -> dict[str, Any]:
    splits = {}
    for split in ("train", "test"):
        chosen = sorted((record for record in records if record.split == split), key=lambda record: record.key)
        builder.info.metadata[split] = [
            [record.key, record.mask is not None, record.label, record.defect_type, record.category]
            for record in chosen
        ]
        splits[split] = builder._generate_examples(chosen)
    return splits


def _examples(records: list[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
    for position, record in enumerate(records):
        yield (
            position,
            {
                "key": record.key,
                "image": record.image,
                "mask": b"" if record.mask is None else Path(record.mask).read_bytes(),
                "label": record.label,
                "defect_type": record.defect_type,
                "category": record.category,
            },
        )
