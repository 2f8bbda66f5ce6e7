"""CIFAR10 as in Improved DDPM (Nichol & Dhariwal 2021).

Cosine schedule, T = 4000, hybrid loss, variance in a learned range. They report FID 3.19 and 3.17
bits/dim after 500,000 steps. The network here is Ho et al.'s with their depth, attention levels and
dropout; theirs also has four heads and scales by the time embedding. Flips, the average of the
weights and gradient clipping are Ho et al.'s.

    ddpm-jax train cifar10_improved --workdir runs/cifar10_improved
"""

import dataclasses

from ddpm_jax.config import Diffusion, Model, load_config

BASE = load_config("cifar10")
CONFIG = dataclasses.replace(
    BASE,
    model=Model(num_res_blocks=3, attention_resolutions=(16, 8), dropout=0.3),
    diffusion=Diffusion(
        schedule="cosine", num_timesteps=4000, variance="learned_range", loss="hybrid"
    ),
    optim=dataclasses.replace(BASE.optim, learning_rate=1e-4, warmup_steps=0),
    train=dataclasses.replace(BASE.train, steps=500_000),
)
