"""CIFAR10 with its ten classes, 32x32: Ho et al. 2020, with an embedding of the class.

35.8 M parameters; one label in ten is dropped in training, for guidance (Ho & Salimans 2022). The
rest is as in cifar10.

    ddpm-jax train cifar10_class --workdir runs/cifar10_class
"""

import dataclasses

from ddpm_jax.config import load_config

BASE = load_config("cifar10")
CONFIG = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, num_classes=10))
