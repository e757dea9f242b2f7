#!/usr/bin/env bash
# The benchmark against PyTorch and scikit-learn: prints the table and writes benchmark.json.
#
#   bash scripts/benchmark.sh                 all rows, half an hour or so on two cores
#   bash scripts/benchmark.sh --rows a,b      some of them; --list names them all
# torch.compile needs a C++ compiler; without one the peer runs uncompiled, and its rows say so.
export EXTRAS=bench VENV=${VENV:-.venv-bench}
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python scripts/benchmark.py "$@"
