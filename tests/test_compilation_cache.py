"""The cache of compiled programs, by processes that compile: what it keeps, where, and how it is mended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pushpull_jax import compilation_cache

# Prints the folder, sin(1) + ... + sin(1) over 16 entries, and how often JAX read or wrote an entry.
PROGRAM = """
import collections, sys
from pushpull_jax import compilation_cache
assert "jax" not in sys.modules
folder = compilation_cache.enable()
import jax, jax.numpy as jnp
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
total = jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(16))
print(folder, f"{float(total):.4f}", events["cache_hits"], events["cache_misses"])
"""
SUM = "13.4635"  # 16 sin(1)


def run(tmp_path: Path, **variables: str) -> tuple[list[str], str]:
    """What the program printed, and what it said on stderr, as a user with these variables would see it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "XDG_"))}
    environment |= {
        "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | variables, check=True)
    return done.stdout.split(), done.stderr


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A home with a filled cache."""
    home = tmp_path_factory.mktemp("home")
    (folder, total, hits, misses), said = run(home)
    assert folder == str(home / ".cache/pushpull_jax/compiled")
    assert (total, hits) == (SUM, "0") and int(misses) == len(entries(Path(folder))) > 0
    assert said == ""
    return home


def test_a_second_process_compiles_nothing(filled):
    (folder, total, hits, misses), said = run(filled)
    assert (total, misses, said) == (SUM, "0", "") and int(hits) == len(entries(Path(folder)))
    assert Path(folder).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kept", [0, -1], ids=["empty", "all but 1"])
def test_truncated_entries_are_replaced_without_a_word(filled, kept):
    folder = filled / ".cache/pushpull_jax/compiled"
    whole = {entry: entry.stat().st_size for entry in entries(folder)}
    for entry, size in whole.items():
        os.truncate(entry, kept if kept >= 0 else size + kept)
    (_, total, hits, misses), said = run(filled)
    assert (total, hits, int(misses), said) == (SUM, "0", len(whole), "")
    assert [entry.stat().st_size > 60 for entry in entries(folder)] == [True] * len(whole)
    (_, total, hits, misses), said = run(filled)
    assert (total, int(hits), misses, said) == (SUM, len(whole), "0", "")


def test_an_entry_that_jax_could_not_evict_is_deleted(filled):
    # A process killed between its two writes leaves an entry without the time of its last use: JAX cannot make room.
    folder = filled / ".cache/pushpull_jax/compiled"
    for used in folder.glob("*-atime"):
        used.unlink()
    (_, total, hits, misses), said = run(filled)
    assert (total, hits, said) == (SUM, "0", "") and int(misses) == len(list(folder.glob("*-atime"))) > 0


def test_the_folder_follows_xdg_and_is_bounded(tmp_path):
    # Smaller than all entries together: some must go.
    (folder, *_), said = run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"), JAX_COMPILATION_CACHE_MAX_SIZE="4000")
    assert folder == str(tmp_path / "xdg/pushpull_jax/compiled") and said == ""
    assert 0 < sum(entry.stat().st_size for entry in entries(Path(folder))) <= 4000
    assert not (tmp_path / ".cache").exists()


def test_a_folder_of_the_users_choice_is_mended_and_not_bounded(tmp_path):
    (folder, *_), said = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own") and said == "" and not (tmp_path / ".cache").exists()
    count = len(entries(tmp_path / "own"))
    assert count and not list((tmp_path / "own").glob("*-atime"))
    for entry in entries(tmp_path / "own"):
        os.truncate(entry, 30)
    for expected in (["0", str(count)], [str(count), "0"]):
        (_, total, *found), said = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
        assert (total, found, said) == (SUM, expected, "")


def test_the_switch_is_respected(tmp_path):
    (folder, total, hits, misses), said = run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert (folder, total, hits, misses, said) == ("None", SUM, "0", "0", "")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (folder, total, hits, misses), said = run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (folder, total, hits, misses) == ("None", SUM, "0", "0")
    assert len(said.splitlines()) == 1 and said.startswith("compiled programs are not kept: ") and "file" in said


# What is known of entries, without compiling.


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in (
        ("zlib-cache", compilation_cache.zlib.compress(b"program")),
        ("unknown-cache", b"of another format"),
        ("short-cache", compilation_cache.zlib.compress(b"program")[:-1]),
        ("empty-cache", b""),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder-cache").mkdir()
    return tmp_path


def test_only_what_is_known_to_be_broken_is_deleted(folder):
    compilation_cache._mend(folder, is_bounded=False)
    assert [entry.name for entry in entries(folder)] == ["folder-cache", "unknown-cache", "zlib-cache"]


def test_entries_are_read_once(folder, monkeypatch):
    compilation_cache._mend(folder, is_bounded=False)
    read, is_whole = [], compilation_cache._is_whole
    monkeypatch.setattr(compilation_cache, "_is_whole", lambda entry: read.append(entry.name) or is_whole(entry))
    (folder / "new-cache").write_bytes(compilation_cache.zlib.compress(b"new"))
    for _ in range(2):
        compilation_cache._mend(folder, is_bounded=False)
    assert [name for name in read if name != "folder-cache"] == ["new-cache"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"short-cache": 3}'])
def test_a_broken_list_of_checked_entries_is_written_again(folder, content):
    (folder / "checked.json").write_text(content)
    compilation_cache._mend(folder, is_bounded=False)
    assert {"zlib-cache", "unknown-cache"} == set(json.loads((folder / "checked.json").read_text()))


def test_what_another_process_holds_is_left_alone(folder):
    import filelock

    with filelock.FileLock(folder / ".lockfile"):
        compilation_cache._mend(folder, is_bounded=False)
    assert len(entries(folder)) == 5


def test_importing_sets_nothing():
    command = "import sys, pushpull_jax.compilation_cache; print(sorted({'jax', 'filelock'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
