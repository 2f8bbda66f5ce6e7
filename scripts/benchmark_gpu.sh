#!/usr/bin/env bash
# Runs all benchmarks for an NVIDIA GPU in under ten minutes. Prints the tables at the end and
# writes them to the folder $1 (default: runs/benchmark-gpu). Set RUN=python3 to use a Python that
# has all dependencies; otherwise .venv-benchmark is made. To try the script elsewhere, change
# NETWORK, DTYPE and BATCHES (defaults: "cifar10", "bfloat16", "128 256 512"). The comparison with
# PyTorch comes first; none of its cases starts after more than LIMIT seconds (default: 260).
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
# jax and PyTorch share the GPU's memory; by default jax would take most of it at its start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.55

# Each benchmark is a process of its own, which frees its memory for the next. If one fails, the
# others still run.
failed=0
"$RUN" benchmarks/compare.py --networks "$network" --dtypes "$dtype" \
  --variants channels_last compile --seconds "${LIMIT:-260}" --out "$out" || failed=1
"$RUN" benchmarks/roofline.py "$network" "${batches[@]}" --dtype "$dtype" \
  >"$out/roofline.md" || failed=1
"$RUN" benchmarks/hotspots.py "$network" training "${batches[0]}" --dtype "$dtype" \
  >"$out/hotspots.md" || failed=1
"$RUN" benchmarks/segments.py --rounds 5 >"$out/segments.md" || failed=1
cat "$out"/*.md
exit $failed
