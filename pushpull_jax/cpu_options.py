"""Options of XLA with which our programs are faster on two cores of an AMD EPYC: set by programs, never by importing.

Measured in docs/experiments.md, section 11: single products by Eigen instead of YNNPACK, which keeps the sums over an
axis, and vectors of 512 bits where a processor has them, of which XLA takes half by default. Numbers move by rounding.
"""

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from pathlib import Path

_PRODUCTS = ("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE")
_VECTORS = ("xla_cpu_prefer_vector_width", "512")
# XLA ends the process for an option that it does not know, so those of versions that were tried only: from, to before.
# TensorFlow has an XLA of its own, which reads XLA_FLAGS too.
_VERSIONS = {"jaxlib": ((0, 10), (0, 12)), "tensorflow": ((2, 21), (2, 22))}


def set_cpu_options() -> None:
    """Add the options to XLA_FLAGS, which XLA reads once: to be called before jax is asked for a device or computes.

    One that XLA_FLAGS has already stays as it is. Nothing is set where XLA_FLAGS names a file of flags, outside jaxlib
    0.10 and 0.11 (four versions of them were tried) and TensorFlow 2.21, on a processor that is not an x86-64, or where
    a TPU's library is installed, which reads XLA_FLAGS too.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("--"):
        return
    was_tried = all(first <= _version(package) < end for package, (first, end) in _VERSIONS.items())
    if not was_tried or find_spec("libtpu"):
        return
    new = [f"--{name}={value}" for name, value in _options() if name not in flags]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([flags, *new]).strip()


def _version(package: str) -> tuple[int, ...]:
    """Its first two numbers, of whichever package brings it; none where none does."""
    for name in (package, f"{package}-cpu"):
        try:
            return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            continue
    return ()


def _options() -> list[tuple[str, str]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        processor = ""
    # Intel's first processors with AVX-512 lower their clock for it, which is why XLA does not ask for it by itself.
    has_wide_vectors = "AuthenticAMD" in processor and "avx512f" in processor
    return [_PRODUCTS, _VECTORS] if has_wide_vectors else [_PRODUCTS]
