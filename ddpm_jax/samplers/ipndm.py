"""iPNDM (Liu et al. 2022; Zhang & Chen 2023): Adams and Bashforth's formula for even steps."""

import numpy as np

from ddpm_jax.samplers.chain import Method
from ddpm_jax.samplers.deis import eps_row
from ddpm_jax.samplers.multistep import Tables, eps_step, levels, order_at, padded, weights
from ddpm_jax.schedule import Schedule


def _tables(schedule: Schedule, original: Schedule) -> Tables:
    chain = levels(schedule, original)
    rows = []
    for t in range(schedule.num_timesteps):
        count = order_at(chain, t, 4)
        of_eps = np.ones(1)
        if count > 1:
            width = np.exp(-chain.log_snr[t - 1]) - np.exp(-chain.log_snr[t])
            # As if the steps were even: for four, (55, -59, 37, -9) / 24.
            powers = np.arange(count)
            of_eps = width * weights(-powers.astype(float), 1 / (powers + 1))
        rows.append(padded(eps_row(chain, t, of_eps), 5))
    return Tables(np.array(rows))


ipndm = Method(eps_step, "squares", memory=3, tables=_tables, deterministic=True)
"""iPNDM with four predictions."""
