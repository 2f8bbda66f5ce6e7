"""Prints L_simple over all held-out images of a run: holdout_loss.py RUN.

Each image gets sixteen draws of t and noise.
"""

import sys

import jax
import numpy as np

from ddpm_jax import load
from ddpm_jax.data import load_source, split

ddpm, params = load(sys.argv[1])
source = load_source(ddpm.config.data)
_, held_out = split(source, ddpm.config.data.holdout)
images = source.read(held_out) / np.float32(127.5) - 1
loss = jax.jit(ddpm.loss)
print(np.mean([loss(params, jax.random.key(draw), images) for draw in range(16)]))
