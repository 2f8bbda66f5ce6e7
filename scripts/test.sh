#!/usr/bin/env bash
# Runs all tests except those that take minutes or need torch. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
  -m "not slow and not interop" "$@"
