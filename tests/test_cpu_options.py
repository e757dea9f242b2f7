"""XLA's options for a CPU: what programs set, for which processors and versions, and that XLA knows them."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pushpull_jax import cpu_options
from pushpull_jax.cpu_options import set_cpu_options

PRODUCTS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
VECTORS = "--xla_cpu_prefer_vector_width=512"
ZEN_5, SKYLAKE, ZEN_3 = "AuthenticAMD avx512f", "GenuineIntel avx512f", "AuthenticAMD avx2"


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this one look like another, and says what is set there."""

    def set_on(processor=ZEN_5, *, kind="x86_64", jaxlib="0.10.2", tensorflow="2.21.0", installed=(), flags=""):
        monkeypatch.setattr(platform, "machine", lambda: kind)
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: processor)
        versions = {"jaxlib": jaxlib, "tensorflow": tensorflow}
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
        monkeypatch.setattr(cpu_options, "find_spec", lambda name: name in installed or None)
        monkeypatch.setenv("XLA_FLAGS", flags)
        set_cpu_options()
        return os.environ["XLA_FLAGS"]

    return set_on


@pytest.mark.parametrize(
    ("processor", "expected"), [(ZEN_5, f"{PRODUCTS} {VECTORS}"), (SKYLAKE, PRODUCTS), (ZEN_3, PRODUCTS)]
)
def test_what_a_processor_gets(machine, processor, expected):
    assert machine(processor) == expected


@pytest.mark.parametrize(
    "other",
    [{"kind": "arm64"}, {"jaxlib": "0.9.2"}, {"jaxlib": "0.12.0.dev1"}, {"tensorflow": "2.20.0"},
     {"tensorflow": "2.22.0"}, {"installed": ("libtpu",)}],
)  # fmt: skip
def test_nothing_is_set_where_nothing_was_tried(machine, other):
    assert machine(flags="--a=1", **other) == "--a=1"


def test_a_file_of_flags_stays_the_only_one(machine):
    """XLA takes all of XLA_FLAGS for its name."""
    assert machine(flags="flags.txt") == "flags.txt"


def test_what_the_user_has_set_stays(machine):
    mine = "--xla_cpu_prefer_vector_width=128 --a=1"
    once = machine(flags=mine)
    assert once == f"{mine} {PRODUCTS}"
    assert machine(flags=once) == once  # a child of a program


def test_a_system_without_that_file(monkeypatch, machine):
    def absent(*_, **__):
        raise FileNotFoundError

    machine()
    monkeypatch.setattr(Path, "read_text", absent)
    assert cpu_options._options() == [cpu_options._PRODUCTS]


PROGRAM = """
import os, sys
import pushpull_jax
from pushpull_jax import cpu_options
assert "XLA_FLAGS" not in os.environ
{setting}
assert "jax" not in sys.modules
import jax, jax.numpy as jnp
square = jnp.ones((128, 128))
print("ynn" in jax.jit(jnp.matmul).lower(square, square).compile().as_text())
"""


@pytest.mark.skipif(not cpu_options._options(), reason="this processor gets no options")
@pytest.mark.parametrize("setting", ["cpu_options.set_cpu_options()", ""])
def test_the_installed_xla_knows_the_options_and_importing_sets_none(setting):
    """XLA would end the process for one it does not know. Fails, too, for a new jaxlib that has not been tried."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM.format(setting=setting)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(not setting)]
