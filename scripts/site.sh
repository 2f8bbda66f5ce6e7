#!/usr/bin/env bash
# Builds the site of docs/ into site/, and fails on a warning, such as a link that leads nowhere.
# Arguments go to `mkdocs build`. To write pages and see them at once: .venv/bin/mkdocs serve
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package docs
NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict "$@"
