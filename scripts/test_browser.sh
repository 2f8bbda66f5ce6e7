#!/usr/bin/env bash
# Installs selenium and runs the tests that open reports in Chromium, which must be there: on Debian,
# apt-get install chromium chromium-driver. Takes a minute. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package test,browser
.venv/bin/python -m pytest -n 0 -m browser tests/test_report_browser.py "$@"
