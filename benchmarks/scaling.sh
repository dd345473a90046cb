#!/usr/bin/env bash
# The three parts of the scaling benchmark, each under 8 minutes on 8 H200; figures go to the folder given.
#   benchmarks/scaling.sh OUT [speed|equality|overlap …] [-- --ranks 2 4 --tiny --tokens /an/absolute/FOLDER]
set -euo pipefail
mkdir -p "${1:?folder for the figures}"
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
parts=()
while (($#)) && [[ $1 != -- ]]; do
    parts+=("$1")
    shift
done
((${#parts[@]})) || parts=(speed equality overlap)
"${PYTHON:-python}" -m benchmarks.scaling "${parts[@]}" --out "$out" "${@:2}"
