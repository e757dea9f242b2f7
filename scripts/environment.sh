# Sourced by the other scripts: makes the virtual environment VENV with the package and its extra EXTRAS, and enters it.
# A second call finds the environment as the project files want it and installs nothing.
#
#   PYTHON   interpreter to make it with (python3)
#   VENV     folder of the environment (.venv)
#   EXTRAS   extras to install (none)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-}

"$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else
    f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; set PYTHON to another interpreter")'
wanted="$("$PYTHON" -V) extras=$EXTRAS $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing pushpull_jax into $VENV (a few minutes the first time)"
    if [ -e "$VENV" ] && [ ! -e "$VENV/installed" ] && [ ! -e "$VENV/unfinished" ]; then
        echo "$VENV exists and was not made by these scripts: remove it, or set VENV to another folder" >&2
        exit 1
    fi
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV"
    touch "$VENV/unfinished"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${EXTRAS:+[$EXTRAS]}"
    echo "$wanted" > "$VENV/installed"
    rm "$VENV/unfinished"
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"
