#!/usr/bin/env bash
# Compares this project with diffusers on PyTorch, side by side: benchmarks/compare.py, to which arguments go, then
# benchmarks/startup.py. Installs the peers into .venv-benchmark; the CPU takes about an hour, results go to
# runs/benchmark. On a machine with an NVIDIA GPU: EXTRAS=cuda12 scripts/benchmark.sh --dtypes float32 bfloat16
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! .venv-benchmark/installed -nt setup.py ]; then
  "${PYTHON:-python3}" -m venv .venv-benchmark
  .venv-benchmark/bin/python -m pip install --quiet --editable ".[interop${EXTRAS:+,$EXTRAS}]"
  touch .venv-benchmark/installed
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false # The peers need some of a GPU's memory, too.
.venv-benchmark/bin/python benchmarks/compare.py "$@"
.venv-benchmark/bin/python benchmarks/startup.py
