#!/usr/bin/env bash
# The whole test suite on a machine that has only Python and pip.
#
#   bash scripts/test.sh           everything but what is marked slow
#   bash scripts/test.sh --slow    everything
#   bash scripts/test.sh ARGS      arguments for pytest
export EXTRAS=dev VENV=${VENV:-.venv-test}
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "${1:-}" = "--slow" ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
exec python -m pytest -n 2 "$@"
