"""LSUN Bedroom, 256x256: Ho et al. 2020, Section 4 and Appendix B. 113.7 M parameters.

No flips, 2.4 M steps; the paper reports FID 6.36.

tfds reads LSUN once it has been prepared, which needs tensorflow_io besides TensorFlow. A folder of
the images works too: --data.source folder:PATH.

    ddpm-jax train lsun_bedroom --workdir runs/lsun_bedroom
"""

import dataclasses

from ddpm_jax.config import load_config

BASE = load_config("celebahq256")
CONFIG = dataclasses.replace(
    BASE,
    data=dataclasses.replace(
        BASE.data, source="tfds:lsun/bedroom", test="tfds:lsun/bedroom", flip=False
    ),
    train=dataclasses.replace(BASE.train, steps=2_400_000),
)
