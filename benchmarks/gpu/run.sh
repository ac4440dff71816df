#!/bin/sh
# Runs every GPU benchmark on a bare machine: `benchmarks/gpu/run.sh --help`. PYTHON: another interpreter than python3.
exec "${PYTHON:-python3}" "$(dirname "$0")/run.py" "$@"
