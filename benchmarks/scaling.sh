#!/usr/bin/env bash
# The three parts of the scaling benchmark, each under 8 minutes on 8 H200; figures go to the folder given.
#   benchmarks/scaling.sh OUT [speed|equality|overlap …]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder for the figures}
shift
for part in "${@:-speed equality overlap}"; do
    for one in $part; do
        python -m benchmarks.scaling "$one" --json "$out/scaling_$one.json"
    done
done
