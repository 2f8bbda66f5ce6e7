"""The 1,797 digits with their classes: the network draws the digit it is asked for, in minutes.

    ddpm-jax train digits_class --workdir runs/digits_class
    ddpm-jax sample runs/digits_class --labels 0 1 2 3 4 5 6 7 8 9 --guidance 2 -n 100

The rest is as in digits.
"""

import dataclasses

from ddpm_jax.config import load_config

BASE = load_config("digits")
CONFIG = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, num_classes=10))
