#!/usr/bin/env bash
# Compares this project with diffusers on PyTorch on a CPU: runs benchmarks/compare.py, which gets
# the arguments, then benchmarks/startup.py. Installs diffusers and PyTorch into .venv-benchmark.
# Takes 35 minutes and writes results to runs/benchmark.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package interop .venv-benchmark
.venv-benchmark/bin/python benchmarks/compare.py "$@"
.venv-benchmark/bin/python benchmarks/startup.py
