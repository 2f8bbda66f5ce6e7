#!/usr/bin/env bash
# Kills a run with -9 twenty times, some of them while a checkpoint is being written, and compares its end with an
# uninterrupted run's, bit for bit. Minutes on two CPU cores. Arguments go to tests/crashtest.py (--kills, --seed).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test
exec env JAX_PLATFORMS=cpu .venv/bin/python tests/crashtest.py "$@"
