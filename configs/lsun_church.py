"""LSUN Church, 256x256: Ho et al. 2020, Section 4 and Appendix B. 113.7 M parameters.

1.2 M steps; the paper reports FID 7.89.

tfds reads LSUN once it has been prepared, which needs tensorflow_io besides TensorFlow. A folder of
the images works too: --data.source folder:PATH.

    ddpm-jax train lsun_church --workdir runs/lsun_church
"""

import dataclasses

from ddpm_jax.config import load_config

BASE = load_config("celebahq256")
CONFIG = dataclasses.replace(
    BASE,
    data=dataclasses.replace(
        BASE.data, source="tfds:lsun/church_outdoor", test="tfds:lsun/church_outdoor"
    ),
    train=dataclasses.replace(BASE.train, steps=1_200_000),
)
