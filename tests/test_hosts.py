"""Several processes: what they agree on, and what is said where they cannot work together; here there is one.

test_processes.py trains with two.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from pushpull_jax import hosts
from pushpull_jax.ablation import ablate
from pushpull_jax.config import Ablation, Config, Data, Hosts, check
from pushpull_jax.errors import InputError
from pushpull_jax.mesh import device_mesh

ROOT = Path(__file__).resolve().parents[1]
TWO = Hosts(coordinator="localhost:1", processes=2, process=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"coordinator": "node:1"},
            "hosts.coordinator must be HOST:PORT where hosts.processes is 2 or more, else empty",
        ),
        ({"processes": 2}, "hosts.coordinator must be HOST:PORT"),
        ({"processes": 2, "coordinator": "node", "process": 0}, "hosts.coordinator must be HOST:PORT"),
        ({"processes": 2, "coordinator": "node:1"}, "hosts.process must be from 0 to hosts.processes - 1"),
        ({"processes": 2, "coordinator": "node:1", "process": 2}, "hosts.process must be from 0"),
        ({"process": 0}, "hosts.process must be from 0 to hosts.processes - 1, with hosts.coordinator"),
        ({"processes": -1}, "hosts.processes must be 0 or more"),
        ({"heartbeat_timeout_seconds": 0}, "hosts.heartbeat_timeout_seconds must be positive"),
    ],
)
def test_what_is_given_must_be_whole(given, message):
    with pytest.raises(InputError, match=message):
        check(Config(hosts=Hosts(**given)), source="config")


def test_how_many_processes(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert hosts.process_count(Hosts()) == 1
    assert hosts.process_count(TWO) == 2
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "a[1-2]", "NTASKS": "8", "PROCID": "3", "LOCALID": "3"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert hosts.process_count(Hosts()) == 8
    assert hosts.process_count(Hosts(processes=1)) == 1  # an interactive step of a larger job


def test_one_process_connects_to_nothing():
    with hosts.connected(Hosts()):
        assert not jax.distributed.is_initialized()
    assert hosts.is_first() and hosts.exchange({"a": 1}) == [{"a": 1}]


def test_importing_connects_nothing():
    code = "import jax, pushpull_jax.training; print(jax.distributed.is_initialized(), jax._src.xla_bridge._backends)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False {}\n"


def together(monkeypatch, *texts):
    """As one of several processes of which the others have told `texts`; what this one tells is kept."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 1 + len(texts))
    monkeypatch.setattr(hosts, "_exchanged", lambda text: (told.append(json.loads(text)), [text, *texts])[1])
    return told


def test_what_another_process_found_is_raised_here(monkeypatch):
    told = together(monkeypatch, '["b.png is no image", null]', '["", null]')
    with pytest.raises(InputError, match="^b.png is no image$"), hosts.agreed(), hosts.agreed():
        pass
    assert told == [["", None]]  # once, though two contexts are left


def test_what_this_process_finds_is_told(monkeypatch):
    told = together(monkeypatch, '["b.png is no image", null]')
    with pytest.raises(InputError, match="^a.png is no image\nb.png is no image$"), hosts.agreed(), hosts.agreed():
        raise InputError("a.png is no image")
    assert told == [["a.png is no image", None]]


def test_another_error_is_not_waited_for(monkeypatch):
    told = together(monkeypatch, '["", null]')
    with pytest.raises(OSError, match="disk"), hosts.agreed():
        raise OSError("disk")
    assert told == []


def test_a_config_of_its_own_is_named(monkeypatch):
    together(monkeypatch, '["", {"seed": 2, "training.steps": 5}]')
    with pytest.raises(InputError, match="process 1 has a config of its own: seed = 1 in process 0, 2 here$"):
        hosts.check_same("a config", {"seed": 1, "training.steps": 5})


def test_a_folder_that_is_not_shared_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    answers = iter([["name"] * 3, [None] * 3, [True, False, False]])
    monkeypatch.setattr(hosts, "exchange", lambda *_, **__: next(answers))
    with pytest.raises(InputError, match="what process 0 writes there is not seen by 1, 2 of 3 processes"):
        hosts.check_shared(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_all_devices_of_several_processes_are_used(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="there are 8 devices of 2 processes, and all must be used: mesh.data -1"):
        device_mesh(data=4)


def test_an_ablation_is_for_one_process(tmp_path):
    config = replace(Config(data=Data(root="images", category="bolt")), hosts=TWO)
    with pytest.raises(InputError, match="hosts.processes: an ablation runs in one process"):
        ablate(Ablation(config, {"seed": (0, 1)}), tmp_path / "grid")
    assert not (tmp_path / "grid").exists()
