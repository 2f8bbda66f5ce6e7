#!/usr/bin/env bash
# Compares this project with diffusers on PyTorch on a CPU, side by side: benchmarks/compare.py, to which arguments go, then
# benchmarks/startup.py. Installs the peers into .venv-benchmark; takes an hour; results go to runs/benchmark.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package interop .venv-benchmark
.venv-benchmark/bin/python benchmarks/compare.py "$@"
.venv-benchmark/bin/python benchmarks/startup.py
