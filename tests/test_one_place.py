"""Each choice is written once: what users may choose is derived from the mathematics itself."""

import subprocess
import sys
import typing

import numpy as np
import pytest
from test_layout import FILES, PACKAGE, imports

from ddpm_jax import losses
from ddpm_jax.config import Diffusion, SamplerName, ScheduleName
from ddpm_jax.config.choices import WeightingName
from ddpm_jax.devices.rows import full_batches
from ddpm_jax.figures import Schedules
from ddpm_jax.losses import WEIGHTINGS, weight_of
from ddpm_jax.sampler import Sampler, as_sampler
from ddpm_jax.samplers import SAMPLERS
from ddpm_jax.schedule import SCHEDULES, make_schedule


def test_choices_are_the_mathematics_own():
    assert typing.get_args(ScheduleName) == tuple(SCHEDULES)
    assert typing.get_args(SamplerName) == tuple(SAMPLERS)
    assert typing.get_args(WeightingName) == tuple(WEIGHTINGS)
    of_figure = typing.get_type_hints(Schedules)["schedules"]
    assert typing.get_args(of_figure)[0] is ScheduleName
    for name in typing.get_args(losses.LossName):
        assert callable(getattr(losses, name))


NEW = """
from ddpm_jax import losses, samplers, schedule

@schedule.named
def mine(T, beta_end=0.1):
    return schedule.np.full(T, beta_end)

samplers.SAMPLERS["mine"] = samplers.Method(lambda chain, x, t, memory, *, strength=1.0: (x, ()))
losses.WEIGHTINGS["mine"] = lambda schedule, t, *, prediction: t
from ddpm_jax.config import Diffusion
from ddpm_jax.sampler import Sampler
print(Diffusion(schedule="mine", beta_end=0.2, weighting="mine").schedule_parameters)
print(Sampler("mine", 3).timesteps_of(Diffusion(schedule="mine")))
from ddpm_jax.cli import main
main(["sample", "--help"])
"""


def test_a_new_schedule_sampler_and_weighting_need_no_other_place():
    done = subprocess.run([sys.executable, "-c", NEW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{'beta_end': 0.2}\n[  0 500 999]\n" in done.stdout
    text = done.stdout.translate(str.maketrans("", "", "│ \n"))
    assert f"--sampler{{None,{','.join(SAMPLERS)},mine}}" in text


def test_a_sampler_is_one_value():
    chosen = Sampler("ddim", 50, 0.5, "quad")
    assert as_sampler("ddim", steps=50, eta=0.5, grid="quad") == chosen == as_sampler(chosen)
    given = {"sampler": "ddim", "steps": 50, "eta": 0.5, "grid": "quad"}
    others = dict.fromkeys(["order", "b_h", "variance", "timesteps"])
    assert chosen.options == given | others
    assert Sampler.from_options(chosen.options) == chosen
    assert chosen.step_options == {"eta": 0.5} and chosen.method is SAMPLERS["ddim"]
    with pytest.raises(TypeError, match="steps: not allowed beside a Sampler"):
        as_sampler(chosen, steps=3)
    with pytest.raises(TypeError, match="strength"):
        as_sampler("ddim", strength=3)
    np.testing.assert_array_equal(
        Sampler("dpm-solver++", 4).timesteps_of(Diffusion()), [0, 111, 444, 999]
    )


def test_a_weighting_is_found_by_its_name():
    schedule = make_schedule("linear", 10, beta_start=0.01, beta_end=0.5)
    t = np.arange(10)
    named = weight_of("min_snr")(schedule, t, prediction="eps")
    by_gamma = weight_of(None, 5.0)(schedule, t, prediction="eps")
    np.testing.assert_array_equal(named, by_gamma)
    assert weight_of(None) is None and weight_of("min_snr", 3.0) is not None


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("multiple", [1, 3])
def test_full_batches_count_every_place_once_in_order(shrink, multiple):
    for n in range(40):
        for size in (1, 2, 5, 8):
            batches = list(full_batches(n, size, shrink=shrink, multiple=multiple))
            counted = [place for rows, count in batches for place in rows[:count]]
            assert counted == list(range(n))
            full = -(-size // multiple) * multiple
            for rows, count in batches:
                assert len(rows) % multiple == 0 and (rows[count:] == n - 1).all()
                assert len(rows) == full or (shrink and len(rows) < full and count == n % full)
    with pytest.raises(ValueError, match="batch_size: must be at least 1, got 0"):
        list(full_batches(1, 0))


def test_evaluation_takes_a_loaded_model_and_loads_none():
    for path in FILES:
        if path.is_relative_to(PACKAGE / "evaluation"):
            taken = {name for name in imports(path) if name.startswith("ddpm_jax.weights.load")}
            assert taken <= {"ddpm_jax.weights.load.Loaded", "ddpm_jax.weights.load.words_of"}, path
            assert not {name for name in imports(path) if name.endswith(".load_checkpoint")}, path
