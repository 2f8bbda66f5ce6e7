"""CIFAR10, Table 2 of Ho et al. 2020: noise prediction and a learned diagonal variance.

35.7 M parameters, trained on the bound for 800,000 steps; the paper reports that it is unstable.
The bound is T = 1000 times the loss of the released code, so gradients are clipped at 1000 times
its norm.

    ddpm-jax train cifar10_eps_vlb_learned --workdir runs/cifar10_eps_vlb_learned
"""

import dataclasses

from ddpm_jax.config import Diffusion, load_config

BASE = load_config("cifar10")
CONFIG = dataclasses.replace(
    BASE,
    diffusion=Diffusion(prediction="eps", variance="learned", loss="vlb"),
    optim=dataclasses.replace(BASE.optim, clip_norm=1000.0),
)
