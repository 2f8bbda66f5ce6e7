"""Tuning: the search for steps, its distances on a flow that is known, the choice, the command."""

import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import messages, with_

from ddpm_jax import DDPM
from ddpm_jax.calibration import Calibration
from ddpm_jax.errors import NonFiniteSamples, UserError
from ddpm_jax.evaluation import choice, flow
from ddpm_jax.evaluation import tune as tuning
from ddpm_jax.evaluation.flow import TOO_FAR, Chains, distance, fine_steps, network_calls
from ddpm_jax.evaluation.grids import cheapest_chain, descend, euler_costs, moved
from ddpm_jax.evaluation.tune import (
    DDIM_STEPS,
    EVALUATIONS,
    FINALISTS,
    FIRST,
    GRIDS,
    Search,
    calls_of_search,
    merged,
    table,
    tune,
    untuned_grids,
)
from ddpm_jax.keys import TUNING, seed_key
from ddpm_jax.sampler import Sampler, Tuned
from ddpm_jax.samplers import SAMPLERS
from ddpm_jax.weights.load import Loaded

CENTRES = np.array([0.6, -0.3, -0.7])
DEVIATION = 0.1


class Mixture(DDPM):
    """Pixels of three heights, independent, and their optimal network: nothing is trained."""

    @functools.cached_property
    def shapes(self):
        return {"x": jax.ShapeDtypeStruct((1,), jnp.float32)}

    def denoise(self, params, x_t, t):
        a = self.schedule.alphas_bar[t].reshape(-1, 1, 1, 1)
        total = a * DEVIATION**2 + 1 - a
        logits = [-((x_t - jnp.sqrt(a) * each) ** 2) / (2 * total) for each in CENTRES]
        of_each = jax.nn.softmax(jnp.stack(logits), axis=0)
        gain = jnp.sqrt(a) * DEVIATION**2 / total
        x_0 = [each + gain * (x_t - jnp.sqrt(a) * each) for each in CENTRES]
        x_0 = (of_each * jnp.stack(x_0)).sum(axis=0)
        return (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)


@pytest.fixture(scope="module")
def mixture(tiny):
    """A Mixture of 200 steps as a model that was loaded."""
    config = with_(
        tiny,
        diffusion=dataclasses.replace(
            tiny.diffusion, num_timesteps=200, beta_start=5e-4, beta_end=0.1
        ),
        data={"image_shape": (2, 2, 1)},
    )
    params = {"x": jnp.zeros(1)}
    return Loaded("mixture", Mixture(config), params, "ema", 1, None)


def placed(model, folder):
    """The model as it was loaded from `folder`."""
    return model._replace(path=folder)


def chains_of(model, batch_size=64):
    """Chains whose calls are counted."""
    calls = []
    return Chains(model, 0, batch_size, calls.append), calls


def test_the_cheapest_chain_is_that_of_an_exhaustive_search(rng):
    N = 8
    costs = rng.random((N, N + 1))
    costs[:, 1:][np.triu_indices(N)] = np.inf

    def cost(chain):
        return sum(costs[i, j + 1] for j, i in itertools.pairwise(chain)) + costs[chain[0], 0]

    for steps in range(1, N + 1):
        every = [(*rest, N - 1) for rest in itertools.combinations(range(N - 1), steps - 1)]
        assert tuple(cheapest_chain(costs, steps)) == min(every, key=cost)
    with pytest.raises(ValueError, match="steps"):
        cheapest_chain(costs, N + 1)


def test_costs_are_how_far_a_ddim_step_lands(rng):
    """From inner products alone, against the steps themselves."""
    N, count, D = 5, 3, 7
    alphas = np.sort(rng.random(N))[::-1]
    sigmas = np.sqrt(1 - alphas**2)
    x = rng.normal(size=(count, N, D))
    x_0 = rng.normal(size=(count, N, D))
    image = rng.normal(size=(count, D))
    both = np.concatenate([x, x_0], axis=1)
    products = np.einsum("nid,njd->ij", both, both) / (count * D)
    to_image = np.square(x_0 - image[:, None]).mean(axis=(0, 2))
    costs = euler_costs(alphas, sigmas, products, to_image)
    for i in range(N):
        eps = (x[:, i] - alphas[i] * x_0[:, i]) / sigmas[i]
        np.testing.assert_allclose(costs[i, 0] ** 2, to_image[i])
        for j in range(N):
            lands = alphas[j] * x_0[:, i] + sigmas[j] * eps
            expected = np.sqrt(np.square(lands - x[:, j]).mean()) if j < i else np.inf
            np.testing.assert_allclose(costs[i, j + 1], expected)


def test_a_step_moves_within_its_gaps():
    assert moved((2, 10, 30), 1, True, 40, 0.25) == (2, 15, 30)
    assert moved((2, 10, 30), 1, False, 40, 0.25) == (2, 8, 30)
    assert moved((2, 10, 30), 2, True, 40, 0.5) == (2, 10, 35)
    assert moved((0, 1, 39), 0, True, 40, 0.5) is None is moved((0, 1, 39), 0, False, 40, 0.5)
    assert moved((0, 1, 39), 2, True, 40, 0.5) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_descent_is_never_worse_and_asks_for_few_grids_once(seed):
    rng = np.random.default_rng(seed)
    T = 50
    goal = np.sort(rng.choice(T, 4, replace=False))
    asked = []

    def error(grid):
        assert len(grid) == 4 and grid[0] >= 0 and grid[-1] < T and (np.diff(grid) > 0).all()
        asked.append(grid)
        return float(np.sum((goal - grid) ** 2)) + 1

    start = (3, 17, 30, 44)
    for evaluations in (0, 1, 7, 500):
        asked.clear()
        best = descend(start, error, T, evaluations)
        tried = list(asked)
        assert len(set(tried)) == len(tried) <= evaluations + 1
        assert error(best) == min(map(error, tried)) <= error(start)
    np.testing.assert_array_equal(best, goal)


def test_rounding_is_no_gain():
    assert descend((5, 20), lambda grid: 1 - 1e-6 * grid[0], 40, 100) == (5, 20)


@pytest.mark.parametrize("T", [1, 2, 9, 100, 101, 200, 1000, 4000])
def test_fine_steps_are_distinct_and_reach_both_ends(T):
    steps = fine_steps(T)
    assert len(steps) == min(T, flow.FINE) and steps[0] == 0 and steps[-1] == T - 1
    assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize("name", ["unipc", "deis", "heun", "ddim", "sde-dpm-solver++", "ancestral"])
def test_images_on_any_grid_are_those_of_the_samplers_own_program(mixture, name):
    variance = "optimal" if name == "ancestral" else None
    options = {"eta": 0.5} if name == "ddim" else {"variance": variance}
    T = mixture.ddpm.schedule.num_timesteps
    mse = np.linspace(0.01, 0.3, T)
    cells = np.ones((T, 2, 2, 1), np.float32)
    calibration = Calibration(mse, 0 * mse, cells, cells, 3)
    ddpm = dataclasses.replace(mixture.ddpm, calibration=calibration)
    chains, calls = chains_of(mixture._replace(ddpm=ddpm), batch_size=3)
    grid = (3, 20, 90, 150, 199)
    images = chains.images(Sampler(name, **options), grid, 2, 4)
    key = jax.random.fold_in(seed_key(0), TUNING)
    own = ddpm.sample(mixture.params, key, 4, start=2, sampler=name, timesteps=grid, **options)
    np.testing.assert_allclose(images, own, atol=2e-5)
    if name != "heun":
        assert sum(calls) == 4 * 5
    assert network_calls(Sampler("heun"), 5) == 9


def test_a_new_grid_takes_no_new_program(mixture):
    chains, _ = chains_of(mixture)
    chains.images(Sampler("deis"), (3, 20, 199), 0, 2)
    before = flow.programs.advance_on._cache_size()
    chains.images(Sampler("deis"), (0, 7, 20, 120, 199), 0, 2)
    assert flow.programs.advance_on._cache_size() == before


def test_the_fine_solution_is_far_nearer_to_a_finer_one_than_ten_steps_are(mixture):
    chains, _ = chains_of(mixture)
    fine, costs = chains.fine_costs(0, 16)
    np.testing.assert_allclose(fine, chains.fine(0, 16), atol=1e-5)
    finest = chains.images(Sampler("unipc"), tuple(range(200)), 0, 16)
    ten = chains.images(Sampler("unipc"), untuned_grids(200, 10)["trailing"], 0, 16)
    assert distance(fine, finest).rmse < 0.1 * distance(ten, finest).rmse
    below = np.tri(len(costs), k=-1, dtype=bool)
    assert np.isfinite(costs[:, 0]).all() and np.isfinite(costs[:, 1:][below]).all()


@pytest.mark.parametrize("name", ["unipc", "ddim"])
def test_tuned_steps_are_nearer_to_the_flow_on_starts_held_back(mixture, tmp_path, name):
    result = tune(placed(mixture, tmp_path), 5, Sampler(name), images=48, out=tmp_path)
    found = result.distances
    assert found.tuned.rmse < 0.8 * min(each.rmse for each in found.untuned.values())
    assert found.tuned.median < 0.9 * min(each.median for each in found.untuned.values())
    assert found.sampler.name == name and len(found.sampler.timesteps) == 5
    text = table(result)
    assert f"{name}, 5 steps: RMSE of 255" in text and "24 starts held back" in text
    assert f"{found.tuned.rmse:9.3f}{found.tuned.median:23.3f}\n" in text
    assert " ".join(map(str, found.sampler.timesteps)) in text


def test_the_search_is_never_worse_than_an_untuned_grid(mixture):
    chains, _ = chains_of(mixture)
    search = Search(chains, 4, 16)
    sampler = Sampler("ipndm")
    untuned = [search.error(sampler, grid) for grid in untuned_grids(200, 4).values()]
    least = min(untuned)
    for evaluations in (0, 3, 12):
        error = search.error(sampler, search.best(sampler, evaluations))
        assert error <= least
        least = error


def test_steps_that_are_too_wide_lose_and_end_nothing(mixture, monkeypatch):
    """Where the network's x_0 is not clipped, a chain of wide steps may overflow."""
    drawn = Chains.images

    def images(self, sampler, grid, start, count):
        if grid == untuned_grids(200, 3)["quad"] or sampler.eta == 1:
            raise NonFiniteSamples("samples: too wide")
        return drawn(self, sampler, grid, start, count)

    monkeypatch.setattr(Chains, "images", images)
    chains, _ = chains_of(mixture)
    search = Search(chains, 3, 8)
    best = search.best(Sampler("ddim"), 1)
    found = search.judged(Sampler("ddim"), best)
    assert found.untuned["quad"] == TOO_FAR > found.tuned
    kept = tuning.rounded(tuning.Result(3, 4, {}, found, None))
    assert kept["untuned"]["quad"]["rmse"] is None and kept["tuned"]["rmse"] > 0
    judge = SimpleNamespace(kid=lambda images: SimpleNamespace(mean=1.0, error=0.1), words="")
    result = choice.compare(chains, judge, found.sampler, untuned_grids(200, 3), 8, 2)
    assert result.best.sampler == found.sampler
    assert [each.kid for each in result.candidates if each.sampler.eta == 1] == [np.inf] * len(
        GRIDS
    )


def test_every_process_decides_by_the_figures_of_the_first(mixture, monkeypatch):
    monkeypatch.setattr(tuning, "agreed", lambda value: np.full_like(value, 7.0))
    monkeypatch.setattr(choice, "agreed", lambda value: np.full_like(value, 8.0))
    chains, _ = chains_of(mixture)
    search = Search(chains, 3, 8)
    assert search.error(Sampler("ddim"), (20, 90, 199)) == 7 and (search.costs == 7).all()
    judge = SimpleNamespace(kid=lambda images: SimpleNamespace(mean=1.0, error=0.1), words="")
    tuned = Sampler("ddim", timesteps=(20, 90, 199))
    result = choice.compare(chains, judge, tuned, untuned_grids(200, 3), 8, 2)
    assert {(each.kid, each.error) for each in result.candidates} == {(8, 8)}


def test_the_same_result_in_batches_of_any_size_and_its_calls_are_announced(
    mixture, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(tuning, "EVALUATIONS", 12)
    caplog.set_level("INFO", "ddpm_jax")
    files = []
    for size in (64, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        tune(placed(mixture, folder), 3, Sampler("unipc"), images=9, batch_size=size, out=folder)
        files.append((folder / "tuned.json").read_bytes())
    assert files[0] == files[1]
    grids = len(GRIDS)
    calls = 9 * 100 + 4 * (grids + 3 + 12) * 3 + 5 * ((grids + 1) * 3 + DDIM_STEPS)
    assert calls_of_search(mixture.ddpm, [Sampler("unipc")], 3, 9) == calls
    assert f"tuning takes at most {calls:,} network calls (images times steps)" in messages(caplog)


def test_fewer_calls_are_made_than_announced(mixture):
    chains, calls = chains_of(mixture)
    search = Search(chains, 3, 9)
    samplers = [Sampler("unipc"), Sampler("deis")]
    for each in samplers:
        search.best(each, FIRST)
    search.judged(samplers[0], search.best(samplers[0], EVALUATIONS))
    announced = calls_of_search(mixture.ddpm, samplers, 3, 9)
    assert 0.3 * announced < sum(calls) <= announced


def test_results_of_others_are_kept_and_the_same_ones_replaced():
    old = Tuned(
        (Sampler("unipc", timesteps=(1, 2)), Sampler("deis", timesteps=(1, 2))),
        (Sampler("ddim", eta=0.5, timesteps=(1, 2)), Sampler("ddim", timesteps=(1, 2, 3))),
    )
    new = Tuned((Sampler("unipc", timesteps=(3, 4)),), (Sampler("unipc", timesteps=(3, 4)),))
    both = merged(old, new)
    unipc = Sampler("unipc", timesteps=(3, 4))
    assert set(both.grids) == {unipc, Sampler("deis", timesteps=(1, 2))}
    assert set(both.choices) == {unipc, Sampler("ddim", timesteps=(1, 2, 3))}
    other = Tuned((Sampler("unipc", order=2, timesteps=(5, 6)),))
    assert len(merged(both, other).grids) == 3 and merged(old, old) == merged(old, Tuned())


@pytest.mark.parametrize(
    ("sampler", "steps", "images", "words"),
    [
        (Sampler("unipc"), 1, 8, "steps: must be from 2 to 50 to be tuned, got 1"),
        (Sampler("unipc"), 201, 8, "steps: must be from 2 to 50 to be tuned, got 201"),
        (Sampler("ancestral"), 5, 8, "sampler: ancestral draws noise"),
        (Sampler("sde-dpm-solver++"), 5, 8, "sampler: sde-dpm-solver.. draws noise"),
        (Sampler("ddim", eta=0.5), 5, 8, "sampler: ddim with --eta draws noise"),
        (Sampler("unipc", 5), 5, 8, "steps: tune finds the steps"),
        (Sampler("unipc", timesteps=(3, 4)), 5, 8, "timesteps: tune finds the steps"),
        (Sampler("unipc"), 5, 7, "images: at least 8 are needed to tune, got 7"),
        (None, 5, 8, "image.*; or name a --sampler, which needs no images"),
    ],
)
def test_what_cannot_be_tuned_is_named(mixture, tmp_path, sampler, steps, images, words):
    with pytest.raises(UserError, match=words):
        tune(placed(mixture, tmp_path), steps, sampler, images=images, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_two_steps_has_nothing_to_tune(mixture, tmp_path):
    config = with_(mixture.ddpm.config, diffusion={"num_timesteps": 2})
    with pytest.raises(UserError, match="this model's 2 are too few"):
        of_two = placed(mixture, tmp_path)._replace(ddpm=Mixture(config))
        tune(of_two, 2, Sampler("unipc"), out=tmp_path)


def test_every_deterministic_sampler_is_named_where_another_was_given(mixture, tmp_path):
    with pytest.raises(UserError) as caught:
        tune(placed(mixture, tmp_path), 5, Sampler("ancestral"), out=tmp_path)
    for name, method in SAMPLERS.items():
        assert method.deterministic == (f" {name}," in str(caught.value).partition("choose")[2])


def test_the_result_needs_a_place(mixture, tmp_path):
    for out, words in [
        (None, "choose one with --out"),
        (tmp_path / "new", "out: must be the model's own folder, or a new"),
        (tmp_path, "out: must be the model's own folder, or a new"),
    ]:
        with pytest.raises(UserError, match=words):
            tune(mixture, 5, Sampler("unipc"), out=out)
    folder = tmp_path / "run.safetensors"
    folder.mkdir()
    assert tuning.place_of(placed(mixture, folder), folder) == folder
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UserError, match="exists already"):
        tune(mixture, 5, Sampler("unipc"), out=tmp_path / "there.safetensors")


def candidate(name, kid, error, **options):
    return choice.Candidate(Sampler(name, timesteps=(1, 5), **options), "quad", kid, error)


def test_noise_is_chosen_only_where_it_gains_more_than_the_error():
    first = candidate("unipc", 0.010, 0.003)
    near = candidate("ddim", 0.006, 0.004, eta=0.5)
    far = candidate("ancestral", 0.004, 0.004, variance="optimal")
    result = choice.chosen(first, near, 0.002, [first, near], "9 images")
    assert result.best == first and result.candidates == [first, near]
    assert result.reason == (
        "unipc, quad: no sampler with noise is better by more than the error (the best, ddim, "
        "eta 0.5, quad: KID of more samples 0.00600 against 0.01000, error of the difference "
        "0.00500); the deterministic solution itself has 0.00200"
    )
    result = choice.chosen(first, far, 0.009, [first, near, far], "9 images")
    assert result.best == far
    assert result.reason.startswith("ancestral, variance optimal, quad: its images are nearer")
    assert result.reason.endswith("; the deterministic solution itself has 0.00900")


@pytest.mark.parametrize("lucky", [False, True])
def test_the_samplers_that_draw_noise_compete_on_every_untuned_grid(mixture, lucky):
    """The seventh looks best to a judge; it is chosen if it does so on other samples, too."""
    chains, calls = chains_of(mixture)
    seen = []
    compared = 1 + 3 * len(GRIDS)  # No calibration, so no ancestral.

    def kid(images):
        seen.append(images)
        best = [7] if lucky else [7, compared + FINALISTS]
        return SimpleNamespace(mean=1.0 - 0.5 * (len(seen) in best), error=0.1)

    judge = SimpleNamespace(kid=kid, words="9 images")
    grids = untuned_grids(200, 3)
    tuned = Sampler("unipc", timesteps=(20, 90, 199))
    result = choice.compare(chains, judge, tuned, grids, 8, 2)
    assert len(result.candidates) == compared == len(seen) - FINALISTS - 1
    np.testing.assert_array_equal(seen[-1], chains.fine(10, 2))
    for sampler, start, images in [
        (result.candidates[0].sampler, 10, seen[-3]),
        (result.candidates[6].sampler, 10, seen[-2]),
        (tuned, 8, seen[0]),
    ]:
        method = dataclasses.replace(sampler, timesteps=None)
        np.testing.assert_array_equal(chains.images(method, sampler.timesteps, start, 2), images)
    assert result.best.sampler == (tuned if lucky else result.candidates[6].sampler)
    named = {(each.sampler.name, each.sampler.eta) for each in result.candidates[1:]}
    assert named == {("ddim", 0.5), ("ddim", 1.0), ("sde-dpm-solver++", None)}
    for each in result.candidates[1:]:
        assert each.sampler.timesteps == grids[each.grid]
    assert sum(calls) == 2 * 3 * (compared + FINALISTS + 3) + 2 * 2 * len(fine_steps(200))
    assert len(choice.stochastic(True)) == len(choice.stochastic(False)) + 1


def test_images_without_labels_are_compared_by_pixels(run, caplog, tmp_path):
    from ddpm_jax.weights.load import load_weights

    caplog.set_level("INFO", "ddpm_jax")
    judge = choice.kid_judge_of(load_weights(run), None, tmp_path)
    assert judge.real.shape[1] == 64 and judge.words.endswith("on pixels")
    assert judge.real.min() >= -1 and judge.real.max() <= 1
    assert any(said.startswith("KID is that of pixels") for said in messages(caplog))
    np.testing.assert_array_equal(judge.features(np.ones((3, 8, 8, 1))), np.ones((3, 64)))


def test_the_steps_are_kept_before_the_samplers_that_draw_noise_compete(
    mixture, tmp_path, monkeypatch
):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "EVALUATIONS", 2)
    monkeypatch.setattr(tuning, "COMPETITORS", ("ddim",))
    monkeypatch.setattr(tuning, "kid_judge_of", lambda *args: SimpleNamespace(words=""))
    monkeypatch.setattr(tuning, "to_calibrate_on", lambda *args: None)
    monkeypatch.setattr(tuning, "compare", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(placed(mixture, tmp_path), 3, images=8, out=tmp_path)
    kept = json.loads((tmp_path / "tuned.json").read_text())
    assert [each["sampler"] for each in kept["grids"]] == ["ddim"] and kept["choices"] == []


def test_steps_that_were_not_tuned_are_advised_only_where_they_can_be():
    for steps, words in [(3, "run ddpm-jax tune RUN --steps 3 with"), (1, "from 2 to 50 can be")]:
        with pytest.raises(UserError, match=words):
            Tuned().find(Sampler(steps=steps, grid="tuned"))


def test_a_choice_has_its_own_variance():
    """One that is asked for is not silently left out."""
    choice = Sampler("unipc", timesteps=(1, 2, 9))
    asked = Sampler(steps=3, grid="tuned")
    assert Tuned((), (choice,)).find(asked) == choice
    with pytest.raises(UserError, match=r"^variance: --grid tuned takes .* leave --variance out"):
        Tuned((), (choice,)).find(dataclasses.replace(asked, variance="optimal"))
