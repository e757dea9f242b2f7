"""What a run says of devices and memory; the sizes are those of the arrays."""

import functools
import logging
import os
import re

import jax
import jax.numpy as jnp
import pytest

from pushpull_jax.mesh import device_mesh
from pushpull_jax.resources import devices_line, free_host_memory, saying_memory


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


MEMINFO = "MemTotal:       64 kB\nMemAvailable:   40 kB\nHugePages_Total:       0\n"
V1 = "9:cpuset:/other\n4:memory,hugetlb:/job\n"


@pytest.mark.parametrize(
    ("files", "kilobytes"),
    [
        ({}, 40),  # no groups
        ({"proc/self/cgroup": "0::/\n"}, 40),  # the root of a machine has no limit
        # Of 30, 12 are used, 2 of which are files that were not read lately.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup": (30, 12, 2)}, 20),
        # A cluster limits the job, and the step below it not; 25 - 20 are left to the job, and more to its user.
        (
            {
                "proc/self/cgroup": "0::/user/job/step\n",
                "sys/fs/cgroup/user": (39, 20, 0),
                "sys/fs/cgroup/user/job": (25, 20, 0),
                "sys/fs/cgroup/user/job/step": ("max", 20, 0),
            },
            5,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup": (30, 31, 0)}, 0),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/job": (30, 12, 1)}, 19),
        # Seen from within a container of version 1, which has the machine's path of it.
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory": (30, 12, 0)}, 18),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory": (2**53 - 4, 12, 0)}, 40),  # "no limit" of version 1
    ],
)
def test_free_memory_is_what_a_container_may_take(tmp_path, files, kilobytes):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
            continue
        most, used, kept = (value if value == "max" else 1024 * value for value in content)
        is_first = "memory" in name
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(f"{most}\n")
        (tmp_path / name / ("memory.usage_in_bytes" if is_first else "memory.current")).write_text(f"{used}\n")
        prefix = "total_" if is_first else ""
        (tmp_path / name / "memory.stat").write_text(f"active_file 7\n{prefix}inactive_file {kept}\n")
    assert free_host_memory(root=tmp_path) == 1024 * kilobytes


def test_free_memory_where_there_is_no_proc_is_that_of_the_machine(tmp_path):
    assert free_host_memory(root=tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
