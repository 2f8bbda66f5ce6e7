#!/usr/bin/env bash
# Runs the tests that train real networks, prepare real data sets with TensorFlow, or read thousands
# of damaged files. Each takes minutes. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test,tfds-prepare
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow "$@"
