"""The command line as `python -m ddpm_jax`."""

from ddpm_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
