#!/usr/bin/env bash
# Installs torch, diffusers, torch-fidelity and datasets and runs the tests that need them. Takes
# minutes. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test,interop,hub,hf
# torch-fidelity's Inception network needs none of its dependencies, such as torchvision.
.venv/bin/python -m pip install --quiet --no-compile --no-deps torch-fidelity==0.4.0
.venv/bin/python -m pytest -n 2 --dist worksteal -m interop "$@"
