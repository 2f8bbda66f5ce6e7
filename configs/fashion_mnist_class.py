"""Fashion-MNIST with its ten classes of clothes, 28x28 in grey: 1.1 M parameters.

    ddpm-jax train fashion_mnist_class --workdir runs/fashion_mnist_class

The rest, the time included, is as in fashion_mnist.
"""

import dataclasses

from ddpm_jax.config import load_config

BASE = load_config("fashion_mnist")
CONFIG = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, num_classes=10))
