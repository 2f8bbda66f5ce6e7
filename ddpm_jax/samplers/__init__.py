"""Samplers: reverse chains by their names, a file a method (Ho et al. 2020, Algorithm 2)."""

from ddpm_jax.keys import START, example_keys, gaussian_noise
from ddpm_jax.samplers.ancestral import ancestral, ancestral_step
from ddpm_jax.samplers.chain import Chain, Method, State, start_state
from ddpm_jax.samplers.ddim import ddim, ddim_encode, ddim_encode_step, ddim_step
from ddpm_jax.samplers.deis import deis
from ddpm_jax.samplers.dpm_solver import dpm_solver, dpm_solver_3, sde_dpm_solver
from ddpm_jax.samplers.grids import Grid, time_grid
from ddpm_jax.samplers.heun import heun
from ddpm_jax.samplers.ipndm import ipndm
from ddpm_jax.samplers.unipc import BH, unipc

SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm-solver++": dpm_solver,
    "dpm-solver++3m": dpm_solver_3,
    "sde-dpm-solver++": sde_dpm_solver,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
    "heun": heun,
}
"""Every sampler by the name that users choose it by: a new one is a file and a line here."""

__all__ = [
    "BH",
    "SAMPLERS",
    "START",
    "Chain",
    "Grid",
    "Method",
    "State",
    "ancestral",
    "ancestral_step",
    "ddim",
    "ddim_encode",
    "ddim_encode_step",
    "ddim_step",
    "deis",
    "dpm_solver",
    "dpm_solver_3",
    "example_keys",
    "gaussian_noise",
    "heun",
    "ipndm",
    "sde_dpm_solver",
    "start_state",
    "time_grid",
    "unipc",
]
