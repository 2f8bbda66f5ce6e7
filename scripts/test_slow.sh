#!/usr/bin/env bash
# Runs the tests that train real networks, minutes each. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test
.venv/bin/python -m pytest -m slow -s "$@"
