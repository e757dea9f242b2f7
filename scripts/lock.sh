#!/usr/bin/env bash
# Resolves the dependencies anew, on the oldest Python that is supported, and writes constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet -e ".[dev]"
{
    echo "# What an install is made of; resolved on Python 3.11 by scripts/lock.sh."
    "$folder/bin/python" -m pip freeze --exclude-editable
    # The same release under its other name, for platforms without tensorflow-cpu.
    "$folder/bin/python" -m pip freeze | sed -n 's/^tensorflow-cpu==/tensorflow==/p; s/^tensorflow_cpu==/tensorflow==/p'
} > constraints.txt
