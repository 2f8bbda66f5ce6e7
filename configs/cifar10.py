"""CIFAR10, 32x32, unconditional: Ho et al. 2020, Section 4 and Appendix B. 35.7 M parameters.

The paper reports FID 3.17 and IS 9.46 after 800,000 steps, on a TPU v3-8 at 21 steps/s.
tfds prepares the data set on first use, which needs `pip install 'ddpm-jax[tfds-prepare]'`, once.

    ddpm-jax train cifar10 --workdir runs/cifar10
"""

from ddpm_jax.config import Config, Data

CONFIG = Config(
    data=Data(source="tfds:cifar10", test="tfds:cifar10", image_shape=(32, 32, 3), holdout=0.0)
)
