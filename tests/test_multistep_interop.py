"""The multistep samplers against those of diffusers, with our noise levels in its tables."""

import importlib.util
import types

import numpy as np
import pytest
from test_multistep import (
    CHAINS,
    Numbers,
    even_chain,
    exact_flow,
    follow,
    in_float64,
    mixtures_x_0,
)

from ddpm_jax.diffusion import clip_x_0
from ddpm_jax.samplers import SAMPLERS

ABSENT = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed: scripts/test_interop.sh does that"
    ),
]

__all__ = ["exact_flow"]  # A fixture.


@pytest.fixture(scope="module")
def library():
    """torch and diffusers, imported only when a test runs."""
    import diffusers
    import torch

    torch.set_num_threads(1)
    return types.SimpleNamespace(torch=torch, diffusers=diffusers)


def network(x, t):
    """A predicted x_0 [N] that bends, and differs from step to step."""
    return np.sin(2 * x + 0.3 * t) + 0.2 * x


def start():
    return np.random.default_rng(0).normal(size=12)


def with_levels(library, scheduler, n):
    """The scheduler with the noise levels `n` of a chain that ends at the image."""
    scheduler.set_timesteps(n.steps)
    scheduler.sigmas = library.torch.from_numpy(np.append(n.rho[::-1], 0.0))
    return scheduler


def follow_theirs(library, scheduler, n, output_of, stop=0, **options):
    """The x at t = `stop` of their chain; `output_of`(x [N], t) is the network."""
    x = start()
    for t, theirs in zip(reversed(range(stop + 1, n.steps)), scheduler.timesteps, strict=False):
        tensors = [library.torch.from_numpy(a.reshape(1, 1, 1, -1)) for a in (output_of(x, t), x)]
        given = {name: of(t) for name, of in options.items()}
        x = scheduler.step(tensors[0], theirs, tensors[1], **given).prev_sample
        x = np.float64(x.numpy()).ravel()
    return x


def assert_same(found, expected):
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


SAMPLE = {"prediction_type": "sample", "lower_order_final": True}


@pytest.mark.parametrize("chain", ["linear", "cosine"])
def test_2m(library, chain):
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    scheduler = library.diffusers.DPMSolverMultistepScheduler(solver_order=2, **SAMPLE)
    theirs = follow_theirs(library, with_levels(library, scheduler, n), n, network)
    exact = in_float64(schedule, original)
    assert_same(follow("dpm-solver++", exact, start(), network, original=original), theirs)


def test_the_stochastic_2m(library):
    schedule, original = CHAINS["linear"]
    n = Numbers(schedule, original)
    noise = np.random.default_rng(1).normal(size=(n.steps, 12))
    scheduler = library.diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, **SAMPLE
    )
    theirs = follow_theirs(
        library,
        with_levels(library, scheduler, n),
        n,
        network,
        variance_noise=lambda t: library.torch.from_numpy(noise[t].reshape(1, 1, 1, -1)),
    )
    ours = follow(
        "sde-dpm-solver++",
        in_float64(schedule, original),
        start(),
        network,
        lambda t: noise[t],
        original=original,
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("b_h", ["b1", "b2"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("chain", ["linear", "cosine"])
def test_unipc(library, chain, order, b_h):
    schedule, original = CHAINS[chain]
    n = Numbers(schedule, original)
    scheduler = library.diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=b_h.replace("b", "bh"), **SAMPLE
    )
    theirs = follow_theirs(library, with_levels(library, scheduler, n), n, network)
    exact = in_float64(schedule, original)
    ours = follow("unipc", exact, start(), network, original=original, order=order, b_h=b_h)
    assert_same(ours, theirs)


@pytest.mark.parametrize("order", [2, 3])
def test_deis(library, order):
    """Its polynomial is one in log rho: the same as in t where steps are even in lambda."""
    schedule = even_chain(10)
    n = Numbers(schedule, schedule)
    scheduler = library.diffusers.DEISMultistepScheduler(solver_order=order, **SAMPLE)
    theirs = follow_theirs(library, with_levels(library, scheduler, n), n, network)
    assert_same(follow("deis", schedule, start(), network, order=order), theirs)


def test_ipndm(library):
    """Up to where ours takes lower orders before the image, which it does not."""
    schedule, original = CHAINS["linear"]
    n = Numbers(schedule, original)
    scheduler = library.diffusers.IPNDMScheduler()
    scheduler.set_timesteps(n.steps)
    scheduler.alphas, scheduler.betas = map(
        library.torch.from_numpy, (n.alpha[::-1].copy(), n.sigma[::-1].copy())
    )

    def v_of(x, t):
        return (n.alpha[t] * x - network(x, t)) / n.sigma[t]

    theirs = follow_theirs(library, scheduler, n, v_of, stop=2)
    exact = in_float64(schedule, original)
    assert_same(follow("ipndm", exact, start(), network, original=original, stop=2), theirs)


def test_3m_is_the_third_order_predictor_of_unipc(library):
    schedule, original = CHAINS["linear"]
    n = Numbers(schedule, original)
    scheduler = library.diffusers.UniPCMultistepScheduler(solver_order=3, **SAMPLE)
    with_levels(library, scheduler, n)
    table = SAMPLERS["dpm-solver++3m"].tables(schedule, original).predict
    arrays = np.random.default_rng(2).normal(size=(4, 1, 1, 1, 12))
    x, *predictions = map(library.torch.from_numpy, arrays)
    for t in range(2, n.steps - 2):
        scheduler._step_index = n.steps - 1 - t
        scheduler.model_outputs = predictions[::-1]
        theirs = scheduler.multistep_uni_p_bh_update(predictions[0], sample=x, order=3)
        assert_same(np.tensordot(table[t], arrays, 1), theirs.numpy())


def test_its_own_3m_is_of_second_order(library, exact_flow):
    """It gives the second difference half the weight: so it is not what ours is compared with."""
    x, expected = exact_flow

    def error_at(steps):
        n = Numbers(even_chain(steps), even_chain(steps))
        scheduler = library.diffusers.DPMSolverMultistepScheduler(solver_order=3, **SAMPLE)
        with_levels(library, scheduler, n)
        updates = [
            lambda x_0, sample: scheduler.dpm_solver_first_order_update(x_0[-1], sample=sample),
            scheduler.multistep_dpm_solver_second_order_update,
            scheduler.multistep_dpm_solver_third_order_update,
        ]
        at = library.torch.from_numpy(x)
        predictions = []
        for t in reversed(range(1, n.steps)):
            scheduler._step_index = n.steps - 1 - t
            x_0 = mixtures_x_0(at.numpy(), n.alpha[t], n.sigma[t])
            predictions.append(library.torch.from_numpy(x_0))
            order = min(3, len(predictions))
            at = updates[order - 1](predictions, sample=at)
        return np.abs(at.numpy() - expected).mean()

    assert 1.7 < np.log2(error_at(80) / error_at(160)) < 2.3


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_dynamic_clipping_is_its_thresholding(library, name):
    """With its default sample_max_value of 1 that is the plain clip."""
    x_0 = np.float32(np.random.default_rng(0).normal(size=(3, 5, 4, 3)))
    x_0[1] *= 0.3  # Its quantile is below 1.
    x_0[2, 0, 0] = 40
    tensor = library.torch.from_numpy(x_0.transpose(0, 3, 1, 2).copy())
    kind = getattr(library.diffusers, name)
    for bound, dynamic in ((1e38, True), (1.0, False)):
        scheduler = kind(thresholding=True, sample_max_value=bound)
        theirs = scheduler._threshold_sample(tensor).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(clip_x_0(x_0, dynamic=dynamic), theirs, rtol=1e-5, atol=1e-6)
