#!/usr/bin/env bash
# The three parts of the scaling benchmark, each under 8 minutes on 8 H200; figures go to the folder given.
#   benchmarks/scaling.sh OUT [speed|equality|overlap …] [-- --ranks 2 4 --tiny]
set -euo pipefail
out=$(realpath "${1:?folder for the figures}")
shift
cd "$(dirname "$0")/.."
parts=()
while (($#)) && [[ $1 != -- ]]; do
    parts+=("$1")
    shift
done
for part in "${parts[@]:-}"; do
    for one in ${part:-speed equality overlap}; do
        "${PYTHON:-python}" -m benchmarks.scaling "$one" --json "$out/scaling_$one.json" "${@:2}"
    done
done
