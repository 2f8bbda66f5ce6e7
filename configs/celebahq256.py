"""CelebA-HQ, 256x256: Ho et al. 2020, Section 4 and Appendix B. 113.7 M parameters, 0.5 M steps.

tfds prepares the data set on first use, from data256x256.tar in the folder --data.manual-dir. This
needs `pip install 'ddpm-jax[tfds-prepare]'`, once. A folder of the images works too:
--data.source folder:PATH.

    ddpm-jax train celebahq256 --workdir runs/celebahq256
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Optim, Train

CONFIG = Config(
    model=Model(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
    diffusion=Diffusion(variance="fixed_small"),
    data=Data(source="tfds:celeb_a_hq/256", image_shape=(256, 256, 3), holdout=0.0),
    optim=Optim(learning_rate=2e-5),
    train=Train(steps=500_000, batch_size=64),
)
