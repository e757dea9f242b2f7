"""What holds for every test: eight fake CPU devices, no silent rank promotion, and the shared data where they are.

PUSHPULL_PLATFORM=cuda puts what is computed onto a GPU instead; the tests of pure functions and of networks pass there.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

from pushpull_jax.cpu_options import set_cpu_options

# Before jax is imported anywhere. Of XLA's options the tests have those that programs have, to the same bits.
set_cpu_options()
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = PLATFORM = os.environ.get("PUSHPULL_PLATFORM", "cpu")
if PLATFORM != "cpu":  # tests compare to float32's last digits, which an accelerator's default does not have
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# One program that several tests train with is compiled once a session (and worker); it is traced every time.
_compiled = tempfile.TemporaryDirectory(prefix="pushpull_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images beside the repository, or the one that PUSHPULL_SHARED names; skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PUSHPULL_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"the folder of real images is absent: {folder.name}; PUSHPULL_SHARED names it")
    return folder


@pytest.fixture
def stopped_at(monkeypatch):
    """A context in which a training stops as soon as the checkpoint of a step is written, and must stop there."""
    from pushpull_jax.checkpoint import Checkpoints  # not before the environment above is set

    @contextlib.contextmanager
    def stopped_at(step: int):
        save = Checkpoints.save

        def save_then_stop(self, state, **options):
            save(self, state, **options)
            if int(state.step.ravel()[0]) == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoints, "save", save_then_stop)
            yield

    return stopped_at
