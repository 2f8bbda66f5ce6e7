"""1,797 handwritten digits of 8x8, shipped with the package: a first run, minutes on two CPU cores.

ddpm-jax train digits --workdir runs/digits
"""

from ddpm_jax.config import Checkpoint, Config, Data, Model, Optim, Train

CONFIG = Config(
    model=Model(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
        norm_groups=8,
    ),
    data=Data(source="digits", image_shape=(8, 8, 1), flip=False, holdout=0.1),
    optim=Optim(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998, ema_warmup=True),
    train=Train(steps=4500, batch_size=32, log_every=100, eval_every=500, sample_every=0),
    checkpoint=Checkpoint(every=1000),
)
