#!/usr/bin/env bash
# Kills a run with -9 twenty times, sometimes while it writes a checkpoint, and compares its final
# state with an uninterrupted run's, bit for bit. Takes minutes on two CPU cores. Arguments go to
# tests/crashtest.py (--kills, --seed).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test
exec env JAX_PLATFORMS=cpu .venv/bin/python tests/crashtest.py "$@"
