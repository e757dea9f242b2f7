"""Features on disk, a file for each source, named by all that its numbers depend on; a file is there whole or not.

The name has the digest of the image's bytes and its noise, the folder that of the weights, the preprocessing, the code
and the platform. So a run finds what any run before it has extracted, or was killed while extracting, and whatever has
changed is extracted again, alone. Files are NumPy's .npz, which carry a CRC-32 of each array.
"""

import hashlib
import importlib.metadata
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from pushpull_jax.data.manifest import file_digest
from pushpull_jax.extraction import Extractor, Source
from pushpull_jax.user_cache import prepare_folder
from pushpull_jax.workdir import write_bytes

# Of the package: what decides the numbers of features. Others may change without a miss.
_CODE = ("data/images.py", "features.py", "extraction.py", "confetti_noise.py", "scoring.py", "backbones.py", "models")


class FeatureCache:
    """The files of one way to extract features.

    Attributes:
        folder: where they are, in 256 folders by the first two digits of their names.
    """

    def __init__(self, folder: Path, extractor: Extractor):
        self.folder = folder / extraction_digest(extractor)
        prepare_folder(self.folder)

    def path(self, source: Source) -> Path:
        """The file of a source; InputError where its image cannot be read."""
        name = hashlib.sha256(f"{file_digest(source.record.image)} {source.noise}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npz"

    def write(self, path: Path, features: np.ndarray, mask: np.ndarray | None) -> None:
        """Keep features [h,w,C] and the pixels [S,S] that noise changed."""
        file = io.BytesIO()
        np.savez(file, features=features, **{} if mask is None else {"mask": np.packbits(mask, axis=-1)})
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, file.getvalue())

    def features(self, path: Path) -> np.ndarray:
        """Those of a file that is whole."""
        with np.load(path) as arrays:
            return arrays["features"]

    def check(self, path: Path, *, size: int) -> tuple[bool, np.ndarray | None]:
        """Whether a file is there and whole, and its mask [S,S] bool, S being `size`."""
        try:
            # Opened here: np.load leaves a file open that it cannot read.
            with open(path, "rb") as file, np.load(file) as arrays:
                read = {name: arrays[name] for name in arrays.files}  # which is when the CRC is checked
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return False, None
        mask = read.get("mask")
        is_whole = "features" in read
        return is_whole, None if mask is None else np.unpackbits(mask, axis=-1, count=size).astype(bool)


def extraction_digest(extractor: Extractor) -> str:
    """SHA-256 of all that features depend on but for the image and its noise."""
    spec, data, backbone = extractor.spec, extractor.data, extractor.spec.backbone
    told = {
        "backbone": repr(replace(backbone, source="", licence="", origin=None, keras=None, namings=(), sha256="")),
        "spec": [spec.stages, spec.grid, spec.resample],
        "images": [data.image_size, data.resize],
        "platform": [jax.default_backend(), jax.devices()[0].device_kind, jax.config.jax_default_matmul_precision],
        "versions": [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "pillow")],
    }
    digest = hashlib.sha256(json.dumps(told).encode())
    for path, leaf in jax.tree.leaves_with_path(extractor.parameters):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf, order="C").tobytes())
    package = Path(__file__).parent
    for name in _CODE:
        for file in sorted((package / name).glob("*.py")) if name == "models" else [package / name]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
