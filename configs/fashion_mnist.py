"""Fashion-MNIST, 28x28 in grey: 1.1 M parameters, as in examples/fashion_mnist.safetensors.

    ddpm-jax train fashion_mnist --workdir runs/fashion_mnist

tfds prepares the data set on first use, which needs `pip install 'ddpm-jax[tfds-prepare]'`, once.
One CPU core makes 1.4 steps per second, two make 1.9: three to four hours for 20,000.
"""

from ddpm_jax.config import Checkpoint, Config, Data, Model, Optim, Train

CONFIG = Config(
    model=Model(
        base_channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        dropout=0.0,
        norm_groups=8,
    ),
    data=Data(
        source="tfds:fashion_mnist",
        test="tfds:fashion_mnist",
        image_shape=(28, 28, 1),
        flip=False,
        holdout=0.05,
    ),
    optim=Optim(learning_rate=1e-3, warmup_steps=200, ema_decay=0.9995, ema_warmup=True),
    train=Train(
        steps=20_000,
        batch_size=32,
        log_every=50,
        eval_every=1000,
        eval_images=512,
        sample_every=0,
    ),
    checkpoint=Checkpoint(every=500),
)
