"""Four fake CPU devices, strict shapes, and the tiny things that many tests share."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time here: no optimisation in what tests compile themselves.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax
import numpy as np
import pytest

from ddpm_jax.config import Checkpoint, Config, Data, Diffusion, Model, Optim, Train

jax.config.update("jax_numpy_rank_promotion", "raise")
# And many tests compile the same programs.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache/xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny():
    """A config with a network of some 4,000 parameters, dropout and flips: compiling is what costs."""
    return Config(
        model=Model(
            base_channels=4,
            channel_multipliers=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            dropout=0.2,
            norm_groups=2,
        ),
        diffusion=Diffusion(num_timesteps=10, beta_start=0.01, beta_end=0.5),
        data=Data(source="array", image_shape=(8, 8, 1), flip=True, holdout=0.2),
        optim=Optim(learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
        train=Train(steps=4, batch_size=8, log_every=2, eval_every=4, sample_every=0, num_samples=4),
        checkpoint=Checkpoint(every=2, keep=2),
    )


@pytest.fixture(scope="session")
def pictures():
    """48 uint8 images [48,8,8,1]."""
    return np.random.default_rng(1).integers(0, 256, (48, 8, 8, 1), dtype=np.uint8)
