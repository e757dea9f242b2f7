"""What networks compute in: the dtype inside, and how exactly an accelerator multiplies what is float32.

Both are settled where a network is traced, so that a program computes alike whoever compiles it. Parameters are float32
always, and so is what surrounds the networks: normalisation of images, statistics, losses, scores and maps.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import jax
import jax.numpy as jnp

MatmulPrecision = Literal["default", "high", "highest"]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def matmul_precision(name: MatmulPrecision | None) -> AbstractContextManager[None]:
    """The precision of products that are traced inside and name none; None leaves it to the caller, and to JAX."""
    return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)
