"""A program for test_processes.py: pushpull's command line, which tells what images it has decoded.

    python counted_training.py FOLDER train CONFIG ...

Writes the keys of the images, as often as each was decoded, to FOLDER/PROCESS.json.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pushpull_jax import feature_stores
from pushpull_jax.cli import main
from pushpull_jax.data import pipeline


def counting(read: Callable, decoded: list[str]) -> Callable:
    def call(record: Any) -> Any:
        decoded.append(record.key)
        return read(record)

    return call


if __name__ == "__main__":
    folder, decoded = Path(sys.argv.pop(1)), []
    for module in (feature_stores, pipeline):
        module.read_image = counting(module.read_image, decoded)
    process = sys.argv[sys.argv.index("--hosts.process") + 1] if "--hosts.process" in sys.argv else "0"
    try:
        main()
    finally:
        folder.mkdir(exist_ok=True)
        (folder / f"{process}.json").write_text(json.dumps(decoded))
