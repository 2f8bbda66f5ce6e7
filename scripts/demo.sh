#!/usr/bin/env bash
# From a bare clone to generated digits: trains for a few minutes and writes
# runs/digits/samples.png. Arguments go to `ddpm-jax train digits`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_package ""
.venv/bin/ddpm-jax train digits --workdir runs/digits "$@"
