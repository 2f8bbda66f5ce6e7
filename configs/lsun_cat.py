"""LSUN Cat, 256x256: Ho et al. 2020, Section 4 and Appendix B. 113.7 M parameters.

1.8 M steps; the paper reports FID 19.75.

tfds reads LSUN once it has been prepared, which needs tensorflow_io besides TensorFlow. A folder of
the images works too: --data.source folder:PATH.

    ddpm-jax train lsun_cat --workdir runs/lsun_cat
"""

import dataclasses

from ddpm_jax.config import load_config

BASE = load_config("celebahq256")
CONFIG = dataclasses.replace(
    BASE,
    data=dataclasses.replace(BASE.data, source="tfds:lsun/cat"),
    train=dataclasses.replace(BASE.train, steps=1_800_000),
)
