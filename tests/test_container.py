"""The container file, as far as it can be checked without Docker: what it copies, installs and runs is there."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line and not line.startswith("#")]


def of_kind(name: str) -> list[str]:
    return [rest for kind, rest in INSTRUCTIONS if kind == name]


def copied() -> set[str]:
    return {source for rest in of_kind("COPY") for source in rest.split()[:-1]}


def test_what_is_copied_is_there_and_is_all_that_docker_is_given():
    assert all((ROOT / name).exists() for name in copied())
    given = (ROOT / ".dockerignore").read_text().splitlines()
    assert given[0] == "*" and {line[1:] for line in given if line.startswith("!")} == copied()


def test_what_is_built_from_is_copied():
    """The package, its configs, and the files that pyproject.toml names."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *build["packages"]}
    assert needed | set(build["force-include"]) <= copied()


def test_the_python_is_one_that_is_supported():
    (image,) = of_kind("FROM")
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", image)[1])
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert int(low) <= minor < int(high)


@pytest.mark.parametrize(("extra", "expected"), [("", "."), ("cuda", ".[cuda]"), ("tpu", ".[tpu]")])
def test_the_package_is_installed_with_its_extra(extra, expected):
    """As a shell expands it."""
    (install,) = of_kind("RUN")
    script = f'pip() {{ printf "%s\\n" "$@"; }}; EXTRA={shlex.quote(extra)}; {install}'
    arguments = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True).stdout.split("\n")
    assert arguments[:-1] == ["install", "--no-cache-dir", "-c", "constraints.txt", expected]
    assert not extra or extra in PROJECT["optional-dependencies"]


def test_the_command_is_run_without_a_shell():
    (command,) = map(json.loads, of_kind("ENTRYPOINT"))
    assert command == list(PROJECT["scripts"])
