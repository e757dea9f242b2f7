"""What a run says of devices and memory; the sizes are those of the arrays."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import pytest

from pushpull_jax.mesh import device_mesh
from pushpull_jax.resources import devices_line, saying_memory


def test_devices_are_counted_and_named():
    line = devices_line(device_mesh(data=4))
    assert re.fullmatch(r"devices: 4 of 8 cpu, grid 1 x data 4; memory: [\d.]+ GB of the machine, \d+ processors", line)


def test_a_program_says_once_what_it_takes_and_is_not_compiled_again(capsys, caplog):
    @functools.partial(jax.jit, donate_argnums=0)
    def chunk(state, added):
        return state + added, jnp.sum(added)

    # Two arrays of 2**18 float32, of which one is donated; the sum is what comes out besides.
    program = saying_memory(chunk, what="a chunk")
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        state, _ = program(jnp.zeros(2**18), jnp.ones(2**18))
        state, total = program(state, jnp.ones(2**18))
    assert total == 2**18 and state[0] == 2
    compiled = [record for record in caplog.records if "Finished XLA compilation of jit(chunk)" in record.getMessage()]
    assert len(compiled) == 1
    said = capsys.readouterr().err.splitlines()
    found = [
        re.fullmatch(
            r"memory: a chunk needs ([\d.]+) MB a device, and 2\.0 MB for what it is given; "
            r"the process had [\d.]+ [MG]B at most",
            line,
        )
        for line in said
    ]
    assert [float(match[1]) for match in found if match] == [pytest.approx(0.0, abs=0.05)]
