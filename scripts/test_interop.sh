#!/usr/bin/env bash
# Runs the tests that compare with torch, diffusers and torch-fidelity, which they install; minutes. Arguments go to
# pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test,interop,hub
# Its Inception network needs none of what it declares, torchvision above all.
.venv/bin/python -m pip install --quiet --no-deps torch-fidelity==0.4.0
.venv/bin/python -m pytest -m interop "$@"
