"""A small network for a first look at your own images: 32x32 in colour.

    ddpm-jax train small32 --data.source folder:PATH --workdir runs/mine

Images are resized and cropped to 32x32. Two CPU cores make 1.3 steps per second; for a first look
on a CPU add --data.image-shape 16 16 3 --train.steps 2500.
"""

from ddpm_jax.config import Checkpoint, Config, Data, Model, Optim, Train

CONFIG = Config(
    model=Model(
        base_channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        dropout=0.0,
        norm_groups=8,
    ),
    data=Data(source="folder:data/images", image_shape=(32, 32, 3), holdout=0.1),
    optim=Optim(learning_rate=1e-3, warmup_steps=200, ema_decay=0.998, ema_warmup=True),
    train=Train(
        steps=20_000,
        batch_size=32,
        log_every=50,
        eval_every=500,
        eval_images=512,
        sample_every=5000,
    ),
    checkpoint=Checkpoint(every=500),
)
