#!/usr/bin/env bash
# Everything that is measured on a machine with an NVIDIA GPU, in one call of under ten minutes, the tables last and in
# the folder $1 (runs/benchmark-gpu). RUN=python3 takes a Python that has all that is needed; else .venv-benchmark is made.
# NETWORK, DTYPE and BATCHES are "cifar10", "bfloat16" and "128 256 512", unless it is to be tried elsewhere.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [ -z "${RUN:-}" ]; then
  EXTRAS=${EXTRAS-cuda12} install_package interop .venv-benchmark
  RUN=.venv-benchmark/bin/python
fi
out=${1:-runs/benchmark-gpu}
network=${NETWORK:-cifar10} dtype=${DTYPE:-bfloat16}
read -ra batches <<<"${BATCHES:-128 256 512}"
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# jax and PyTorch share the memory, most of which jax would take at its start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.55

# A process each: what one took is free for the next, and one that fails leaves the others.
failed=0
"$RUN" benchmarks/roofline.py "$network" "${batches[@]}" --dtype "$dtype" >"$out/roofline.md" || failed=1
"$RUN" benchmarks/hotspots.py "$network" training "${batches[0]}" --dtype "$dtype" >"$out/hotspots.md" || failed=1
"$RUN" benchmarks/compare.py --networks "$network" --dtypes "$dtype" --variants channels_last compile \
  --seconds $((400 - SECONDS)) --out "$out" || failed=1
cat "$out/roofline.md" "$out/hotspots.md" "$out/benchmark.md"
exit $failed
