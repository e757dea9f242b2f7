#!/usr/bin/env bash
# The whole main job on embedded data, on a machine that has only Python and pip: draw, train, evaluate, report.
#
#   bash scripts/demo.sh           the run goes to runs/demo; a second call finds it finished and evaluates it again
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
pushpull demo --workdir runs/demo
