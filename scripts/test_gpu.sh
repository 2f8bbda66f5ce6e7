#!/usr/bin/env bash
# Runs on a GPU the tests that compare it with a CPU, and those of the mathematics. Products of
# float32 are then whole, not in TF32, as those tests' bounds ask for, and no kernel
# adds in an order of its own, as resuming bit for bit asks for. Arguments go to pytest.
# Set RUN=python3 to use a Python that has all dependencies; otherwise .venv-gpu is made.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [ -z "${RUN:-}" ]; then
  EXTRAS=${EXTRAS-cuda12} install_package test .venv-gpu
  RUN=.venv-gpu/bin/python
fi
tests=()
for name in gpu schedule diffusion losses models samplers multistep likelihood chain_bounds \
  calibration average ddpm segments train tune stablehlo; do
  tests+=("tests/test_$name.py")
done
export DDPM_JAX_TEST_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest
export XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true
export XLA_PYTHON_CLIENT_PREALLOCATE=false
"$RUN" -m pytest -n 4 --dist loadfile -m "not slow and not interop" "${tests[@]}" "$@"
