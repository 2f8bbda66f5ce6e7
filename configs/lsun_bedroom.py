"""LSUN Bedroom, 256x256: Ho et al. 2020, Section 4 and Appendix B. 113.7 M parameters, no flips, 2.4 M steps, FID 6.36.

tfds reads LSUN where it was made ready once, which takes tensorflow_io beside TensorFlow. A folder of the
images does as well: --data.source folder:PATH.

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
