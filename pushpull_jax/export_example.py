"""Score images with the detector of this folder, by jax, NumPy and Pillow alone: python example.py IMAGE..."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps

if __name__ == "__main__":
    folder = Path(__file__).parent
    detector = jax.jit(export.deserialize(bytearray((folder / "detector.jaxexport").read_bytes())).call)
    threshold = json.loads((folder / "config.json").read_text())["thresholds"]["threshold"]
    for name in sys.argv[1:]:
        image = np.asarray(ImageOps.exif_transpose(Image.open(name)).convert("RGB"))
        scores, maps = detector(image[None])  # uint8 [B,H,W,3] -> float32 [B] and [B,H,W]
        verdict = "anomalous" if scores[0] > threshold else "normal"
        print(f"{name}: {verdict}, score {scores[0]:.6g}, threshold {threshold:.6g}, map up to {maps.max():.6g}")
