# shellcheck shell=bash
# Sourced by the other scripts. Changes to the repository's root, creates .venv if it is missing and
# installs this package into it. EXTRAS adds extras (EXTRAS=cuda12), PYTHON names the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# Containers often set it. Every process would then compile anew all that it imports.
unset PYTHONDONTWRITEBYTECODE

# install_package EXTRA [VENV]: installs the package with EXTRA and $EXTRAS, unless already done.
# Python compiles the few modules that are imported; pip would compile all, which takes minutes.
install_package() {
  local extras python stamp venv=${2:-.venv}
  extras=$(echo "$1,${EXTRAS:-}" | sed 's/^,*//; s/,*$//')
  stamp=$venv/installed-${extras:-base}
  if [ ! -x "$venv/bin/python" ]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$python is not Python 3.11 or newer; choose one that is: PYTHON=python3.12 $0" >&2
      exit 2
    fi
    "$python" -m venv "$venv"
  fi
  if [ ! "$stamp" -nt pyproject.toml ]; then
    echo "installing ddpm-jax${extras:+[$extras]} into $venv" >&2
    "$venv/bin/python" -m pip install --quiet --no-compile --editable ".${extras:+[$extras]}"
    touch "$stamp"
  fi
}
