"""All else is in pyproject.toml. configs/ is beside the package here and inside it in a wheel."""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["ddpm_jax", "ddpm_jax.*"])
setup(packages=[*PACKAGES, "ddpm_jax.configs"], package_dir={"ddpm_jax.configs": "configs"})
