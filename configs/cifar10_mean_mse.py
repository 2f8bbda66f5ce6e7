"""CIFAR10, Table 2 of Ho et al. 2020: mean prediction, trained on the squared error.

35.7 M parameters, 800,000 steps; the paper reports that it is unstable.

ddpm-jax train cifar10_mean_mse --workdir runs/cifar10_mean_mse
"""

import dataclasses

from ddpm_jax.config import Diffusion, load_config

BASE = load_config("cifar10")
CONFIG = dataclasses.replace(
    BASE,
    diffusion=Diffusion(prediction="mean", variance="fixed_large", loss="simple"),
)
