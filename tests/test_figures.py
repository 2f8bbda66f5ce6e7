"""The figures: their numbers against definitions, their files as a user gets them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused
from gaussian import Chain
from PIL import Image
from scipy.spatial.distance import cdist

from ddpm_jax import UserError, load, make_schedule, to_uint8
from ddpm_jax.calibration import Calibration
from ddpm_jax.cli import main
from ddpm_jax.config import Config
from ddpm_jax.data import from_array
from ddpm_jax.ddpm import DDPM
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation import features, metrics
from ddpm_jax.evaluation import steps as of_steps
from ddpm_jax.evaluation.bound import Likelihood
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.figures import (
    interpolate,
    neighbours,
    progressive,
    rate_distortion,
    schedules,
    shared_latent,
    steps,
)
from ddpm_jax.figures.base import keys_of, steps_at
from ddpm_jax.sampler import Sampler, Tuned
from ddpm_jax.samplers import START, gaussian_noise
from ddpm_jax.weights.load import load_weights


class Stub:
    """Stands in for a DDPM: records calls of the reverse process, adds each row's noise once."""

    schedule = make_schedule()
    image_shape = (4, 4, 1)
    config = Config()

    def __init__(self):
        self.calls = []

    def reverse(self, params, keys, x, start, stop=0, *, progress=False):
        self.calls.append((jax.random.key_data(keys), np.asarray(x), start, stop))
        x = 0.1 * x + 0.5 * gaussian_noise(keys, stop, self.image_shape)
        return x, 2 * x


def test_steps_are_named_by_fractions_of_any_chain():
    assert steps_at(1000, (1, 0.75, 0.5, 0.25, 0)) == [1000, 750, 500, 250, 0]
    assert steps_at(10, (1, 0.75, 0.5, 0.25, 0)) == [10, 8, 5, 2, 0]
    assert steps_at(1, (1, 0.75, 0.5, 0.25, 0)) == [1, 0]


@pytest.mark.parametrize("k", [1, 500, 1000])
def test_interpolation_starts_exactly_at_k_with_the_same_noise_for_every_weight(rng, k):
    x_0, weights, stub = (
        np.float32(rng.uniform(-1, 1, (2, 4, 4, 1))),
        np.linspace(0, 1, 5, dtype=np.float32),
        Stub(),
    )
    images = interpolate.mix_latents(stub, None, jax.random.key(3), x_0, weights, k)
    ((keys, mixed, start, stop),) = stub.calls
    assert (start, stop) == (k, 0) and images.shape == (5, 4, 4, 1)
    assert len(np.unique(keys, axis=0)) == 1
    # Eq. 4 in NumPy: diffused k times is the 0-based step k - 1.
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[k - 1]
    noise = np.asarray(gaussian_noise(keys_of(jax.random.key(3), 2), START, (4, 4, 1)))
    x_k = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise
    np.testing.assert_allclose(
        mixed, [(1 - w) * x_k[0] + w * x_k[1] for w in weights], rtol=1e-4, atol=1e-5
    )
    assert np.abs(noise[0] - noise[1]).max() > 0.1


def test_interpolation_at_k_0_mixes_pixels(rng):
    x_0, stub = np.float32(rng.uniform(-1, 1, (2, 4, 4, 1))), Stub()
    images = interpolate.mix_latents(
        stub, None, jax.random.key(3), x_0, np.float32([0, 0.25, 1]), 0
    )
    np.testing.assert_allclose(images, [x_0[0], 0.75 * x_0[0] + 0.25 * x_0[1], x_0[1]], rtol=1e-6)
    assert not stub.calls


def test_slerp_goes_along_the_great_circle():
    a, b = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    points = interpolate.slerp(a, b, np.float32([0, 1 / 3, 0.5, 1]))
    expected = [[1, 0], [np.cos(np.pi / 6), np.sin(np.pi / 6)], [np.sqrt(0.5)] * 2, [0, 1]]
    np.testing.assert_allclose(points[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(interpolate.slerp(a, a, np.float32([0.3])), a[None], atol=1e-6)


def test_samples_that_share_nothing_part_and_those_that_share_all_do_not():
    stub, x = Stub(), np.float32(np.random.default_rng(0).normal(size=(2, 4, 4, 1)))
    samples = shared_latent.share(stub, None, jax.random.key(0), x, 500)
    ((keys, shared, start, _),) = stub.calls
    assert samples.shape == (2, 3, 4, 4, 1) and start == 500 and len(np.unique(keys, axis=0)) == 6
    np.testing.assert_array_equal(shared.reshape(2, 3, 4, 4, 1), np.repeat(x[:, None], 3, axis=1))
    assert (np.asarray(samples).std(axis=1) > 0).all()
    others = shared_latent.share(stub, None, jax.random.key(0), x, 250)
    assert not np.isin(stub.calls[1][0], keys).all() and np.abs(others - samples).max() > 0
    the_image = np.asarray(shared_latent.share(stub, None, jax.random.key(0), x, 0))
    np.testing.assert_array_equal(the_image, np.repeat(np.clip(x, -1, 1)[:, None], 3, axis=1))


def test_the_progressive_chain_is_the_samplers(run):
    ddpm, params = load(run)
    xs, x_0s = progressive.chain(ddpm, params, keys_of(jax.random.key(1), 3), [10, 7, 1, 0])
    np.testing.assert_allclose(
        np.clip(xs[-1], -1, 1), ddpm.sample(params, jax.random.key(1), 3), atol=1e-5
    )
    np.testing.assert_array_equal(x_0s[-1], xs[-1])
    # What is predicted from x_k is the network's own answer at t = k - 1.
    a = np.cumprod(1 - np.linspace(0.01, 0.5, 10))
    for place, k in enumerate((10, 7, 1)):
        eps = ddpm.denoise(params, xs[place], jnp.full(3, k - 1))
        expected = np.clip((xs[place] - np.sqrt(1 - a[k - 1]) * eps) / np.sqrt(a[k - 1]), -1, 1)
        np.testing.assert_allclose(x_0s[place], expected, atol=1e-4)


def test_neighbours_are_those_of_a_full_search(rng, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    images, queries = (np.uint8(rng.integers(0, 256, (n, 4, 4, 3))) for n in (50, 6))
    queries[2] = images[47]
    indices = np.flatnonzero(np.arange(50) % 5)
    source = from_array(images, (4, 4, 3))
    space = neighbours.Space(
        functools.partial(neighbours.nearest, source=source, indices=indices), ""
    )
    found = space.nearest(queries, 7)
    distances = cdist(queries.reshape(6, -1), images[indices].reshape(len(indices), -1)) / np.sqrt(
        48
    )
    np.testing.assert_array_equal(found.index, np.argsort(distances, axis=1)[:, :7])
    np.testing.assert_allclose(found.distance, np.sort(distances, axis=1)[:, :7], rtol=1e-12)
    assert indices[found.index[2, 0]] == 47 and found.distance[2, 0] == 0
    between = cdist(
        images[indices].reshape(len(indices), -1), images[indices].reshape(len(indices), -1)
    ) / np.sqrt(48)
    np.fill_diagonal(between, np.inf)
    np.testing.assert_allclose(
        neighbours.distance_between(space, source, indices, flip=False), np.median(between.min(1))
    )
    mirrored = images[indices][:, :, ::-1].reshape(len(indices), -1)
    between = np.minimum(
        between, cdist(mirrored, images[indices].reshape(len(indices), -1)) / np.sqrt(48)
    )
    np.fill_diagonal(between, np.inf)
    np.testing.assert_allclose(
        neighbours.distance_between(space, source, indices, flip=True), np.median(between.min(1))
    )


def test_neighbours_in_feature_space_are_those_of_a_full_search(rng):
    real, queries = (np.float32(rng.standard_normal((n, 5))) for n in (30, 4))
    queries[1] = real[12]
    found = neighbours.nearest_features(queries, real, 6)
    np.testing.assert_array_equal(found.index, np.argsort(cdist(queries, real), axis=1)[:, :6])
    np.testing.assert_allclose(
        found.distance, np.sort(cdist(queries, real), axis=1)[:, :6], rtol=1e-5, atol=1e-6
    )
    others = neighbours.nearest_features(real[:3], real, 1, own=np.arange(3))
    between = cdist(real, real) + np.diag(np.full(30, np.inf))
    np.testing.assert_array_equal(others.index[:, 0], between[:3].argmin(axis=1))


def test_no_neighbour_is_counted_twice():
    best = neighbours._best(
        neighbours.Nearest(np.array([[3, 5, 5, 8]]), np.array([[4.0, 2.0, 1.0, 3.0]])), 3
    )
    assert best.index.tolist() == [[5, 8, 3]] and best.distance.tolist() == [[1.0, 3.0, 4.0]]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_schedules_kl_is_that_of_gaussian_pixels(name, monkeypatch):
    betas = np.float64(make_schedule(name, 200).betas)
    monkeypatch.setattr("gaussian.S", schedules.PIXEL_STD)
    chain = Chain(betas)
    kl = schedules.tables(betas)["kl"]
    np.testing.assert_allclose(kl[1:], chain.terms(chain.posterior)[1:], rtol=1e-6)
    assert np.isnan(kl[0])


def test_a_chain_of_one_step_has_a_rate_too():
    result = Likelihood({}, np.array([2.0]), 0.5, np.array([0.25]))
    assert rate_distortion.table_4(result) == [{"reverse_steps": 1, "rate": 0.5, "rmse": 63.75}]


def test_table_4_reads_the_curves_where_the_paper_does():
    terms, mse = np.arange(1000) / 1e4, np.arange(1000) / 1e3
    table = rate_distortion.table_4(Likelihood({}, terms, 0.5, mse))
    assert [row["reverse_steps"] for row in table] == list(range(1000, 0, -100))
    for row in table:
        k = row["reverse_steps"]
        np.testing.assert_allclose(row["rate"], 0.5 + terms[1000 - k + 1 :].sum())
        np.testing.assert_allclose(row["rmse"], 127.5 * np.sqrt(mse[1000 - k]))


@pytest.mark.parametrize(
    ("args", "shapes"),
    [
        (
            ["progressive", "--n", "3", "--frames", "4"],
            {"x_0": (11, 3, 8, 8, 1), "x": (11, 3, 8, 8, 1)},
        ),
        (
            ["shared-latent", "--n", "2"],
            {"x_k": (5, 2, 8, 8, 1), "samples": (5, 2, 3, 8, 8, 1), "spread": (5,)},
        ),
        (
            ["interpolate", "--between", "0", "2", "--weights-across", "3"],
            {"images": (9, 3, 8, 8, 1)},
        ),
        (
            ["interpolate", "--slerp", "--steps", "5", "--weights-across", "4"],
            {"images": (2, 4, 8, 8, 1)},
        ),
        (
            ["neighbours", "--n", "3", "--neighbours", "5"],
            {"index": (3, 5), "neighbours": (3, 5, 8, 8, 1)},
        ),
        (["rate-distortion"], {"rate": (10,), "rmse": (10,)}),
    ],
)
def test_every_figure_is_one_command(copy, tmp_path, capsys, args, shapes):
    name, *options = args
    assert main(["figure", name, str(copy), *options, "--out", str(tmp_path / "figure.png")]) == 0
    numbers = np.load(tmp_path / "figure.npz")
    assert {key: numbers[key].shape for key in shapes} == shapes
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("L"))
    assert picture.shape[0] > 100 and picture.std() > 20
    if name == "progressive":
        with Image.open(tmp_path / "figure.webp") as animation:
            assert animation.n_frames == len(numbers["k"])
    if name == "rate-distortion":
        table = json.loads((tmp_path / "figure.json").read_text())["table_4"]
        assert f"{table[0]['rate']:.5f}" in capsys.readouterr().out
    if name == "shared-latent":
        assert numbers["spread"][-1] < 1e-4 < 1 < numbers["spread"][0]


def test_a_figure_goes_into_the_run_and_schedules_need_none(copy, tmp_path, monkeypatch):
    assert main(["figure", "neighbours", str(copy), "--n", "1"]) == 0
    assert {path.name for path in (copy / "figures").iterdir()} >= {
        "neighbours.png",
        "neighbours.npz",
    }
    monkeypatch.chdir(tmp_path)
    assert (
        main(["figure", "schedule", "--schedules", "linear", "jsd", "--num-timesteps", "20"]) == 0
    )
    assert (tmp_path / "schedule.png").exists()
    assert np.load("schedule.npz")["jsd_alphas_bar"][-1] == 0


def test_images_to_interpolate_come_from_files_too(run, tmp_path, pictures):
    Image.fromarray(pictures[3, ..., 0]).save(tmp_path / "three.png")
    model = load_weights(run)
    np.testing.assert_array_equal(
        interpolate.read_image(model, str(tmp_path / "three.png")), pictures[3]
    )
    np.testing.assert_array_equal(interpolate.read_image(model, "3"), pictures[3])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"between: .*float.tif cannot be read"):
        interpolate.read_image(model, str(tmp_path / "float.tif"))


def test_mirrored_copies_are_found(copy, pictures, monkeypatch):
    """This run was trained with flips; a sampler that mirrors a training image is a copier."""
    train = read_split(load_weights(copy), "train").indices
    mirrored = pictures[train[4:5], :, ::-1] / np.float32(127.5) - 1
    monkeypatch.setattr(DDPM, "sample", lambda *args, **options: mirrored)
    figure = neighbours.Neighbours(run=str(copy), n=1, neighbours=2)
    drawn = figure.draw()
    numbers = np.load(drawn.with_suffix(".npz"))
    assert numbers["distance"][0, 0] == 0 and numbers["index"][0, 0] == train[4]
    np.testing.assert_array_equal(numbers["samples"], to_uint8(mirrored))


@pytest.fixture
def drawn_by(monkeypatch):
    """Images that a chain of S steps makes 10 S levels brighter, so that nothing is compiled."""

    def images(chains, sampler, grid, start, count):
        assert start == of_steps.HELD_BACK
        return brighter(count, len(grid))

    def sample(ddpm, params, key, n, *, start, batch_size, sampler):
        assert sampler == Sampler()
        return brighter(n, 10)

    monkeypatch.setattr("ddpm_jax.evaluation.flow.Chains.images", images)
    monkeypatch.setattr("ddpm_jax.ddpm.DDPM.sample", sample)


def brighter(count, steps):
    """Noise [count,8,8,1], made 10 levels brighter for each of `steps`."""
    bits = np.random.default_rng(0).uniform(-1, 0, (count, 8, 8, 1))
    return np.float32(bits + 10 * steps / 127.5)


def test_steps_are_compared_by_distance_alone_where_there_are_no_labels(copy, drawn_by, caplog):
    """The fine solution of 10 steps is that of all of them."""
    assert main(["figure", "steps", str(copy), "--steps", "2", "5", "11", "--samples", "20"]) == 0
    numbers = np.load(copy / "figures" / "steps.npz")
    names = [name for name, method in steps.SAMPLERS.items() if method.deterministic]
    assert numbers["sampler"].tolist() == [name for name in names for _ in range(2)]
    assert numbers["steps"].tolist() == [2, 5] * len(names)
    np.testing.assert_allclose(numbers["distance"], [80, 50] * len(names), rtol=1e-5)
    np.testing.assert_allclose(numbers["distance_error"], 0, atol=1e-4)
    assert np.isnan(numbers["fid"]).all() and np.isnan(numbers["fid_error"]).all()
    assert numbers["images"].shape == (2 * len(names), 10, 8, 8, 1)
    for name in ("steps.png", "steps-images.png"):
        picture = np.asarray(Image.open(copy / "figures" / name).convert("L"))
        assert picture.shape[0] > 300 and picture.std() > 20


def test_steps_are_compared_by_fid_too(copy, drawn_by, monkeypatch, pictures):
    """By features that are the pixels of two corners, against the held-out images."""

    def corners(params, images):
        flat = np.asarray(images, np.float32).reshape(len(images), -1)
        return flat[:, [0, 63]], flat[:, :2]

    real = {
        split: features.Reference(metrics.statistics(rows), rows)
        for split, rows in (
            ("train", np.zeros((9, 2))),
            ("holdout", corners(None, pictures)[0]),
        )
    }
    mesh = make_mesh(1)
    judge = of_steps.FidJudge(features.Extractor("proxy", corners, {}, mesh, "", {}), real)
    monkeypatch.setattr(steps, "fid_judge_of", lambda *args: judge)
    figure = steps.Steps(run=str(copy), samples=30, steps=(2, 5))
    numbers = np.load(figure.draw().with_suffix(".npz"))
    assert numbers["sampler"].tolist()[-1] == "ancestral, all steps"
    assert numbers["steps"].tolist() == [2, 5] * len(steps.SAMPLERS) + [10]
    for S, place in ((2, 0), (5, 1), (10, -1)):
        own = corners(None, to_uint8(brighter(30, S)))[0]
        fid = metrics.frechet_distance(metrics.statistics(own), real["holdout"].statistics)
        error = metrics.fid_error(own, real["holdout"].statistics)
        np.testing.assert_allclose(numbers["fid"][place], fid)
        np.testing.assert_allclose(numbers["fid_error"][place], error)
    draws_noise = np.isin(numbers["sampler"], ["ancestral", "sde-dpm-solver++"])
    draws_noise[-1] = True
    np.testing.assert_array_equal(np.isnan(numbers["distance"]), draws_noise)


def test_distances_are_of_the_first_starts_and_know_their_error(rng):
    fine = np.float32(rng.uniform(-1, 1, (40, 4, 4, 3)))
    images = np.concatenate([fine + rng.normal(0, 0.1, fine.shape), np.ones((9, 4, 4, 3))])
    squares = np.square(np.float64(images[:40]) - fine).reshape(40, -1).mean(axis=1)
    value, error = of_steps.distance(images, fine)
    np.testing.assert_allclose(value, 127.5 * np.sqrt(squares.mean()))
    means = rng.choice(squares, (4000, 40)).mean(axis=1)  # The bootstrap.
    np.testing.assert_allclose(error, 127.5 * np.sqrt(means).std(), rtol=0.1)
    assert of_steps.distance(fine, fine) == (0, 0)


def test_tuned_samplers_are_compared_at_their_numbers_of_steps(tiny):
    tuned = [Sampler("unipc", timesteps=(1, 4, 9)), Sampler("ddim", timesteps=(0, 9))]
    chosen = [Sampler("sde-dpm-solver++", timesteps=(1, 5, 9))]
    ddpm = DDPM(tiny, tuned=Tuned(tuple(tuned), tuple(chosen)))
    rows = of_steps.contestants(ddpm, (3, 5, 99))
    for name in steps.SAMPLERS:
        assert [row.steps for row in rows if row.name == name] == [3, 5]
    of_name = {row.name: row for row in rows}
    assert of_name["unipc, tuned"].sampler == tuned[0] and "ddim, tuned" not in of_name
    assert of_name["tuned choice"].sampler == chosen[0] and of_name["tuned choice"].steps == 3
    assert of_name["unipc, tuned"].deterministic and not of_name["tuned choice"].deterministic
    on_all_grids = of_steps.contestants(ddpm, (3,), all_grids=True)
    assert "unipc, quad" in {row.name for row in on_all_grids}


def test_the_best_variance_is_compared_where_there_is_a_calibration(tiny):
    T = tiny.diffusion.num_timesteps
    mse = np.linspace(0.01, 0.5, T)
    cells = np.float32(np.broadcast_to(mse[:, None, None, None], (T, 8, 8, 1)))
    ddpm = DDPM(tiny, Calibration(mse, 0 * mse, cells, 0 * cells, 9))
    rows = of_steps.contestants(ddpm, (3,), all_grids=True)
    of_name = {row.name: row.sampler for row in rows if "optimal" in row.name}
    assert of_name["ancestral, optimal variance"] == Sampler("ancestral", 3, variance="optimal")
    best = of_name["ancestral, optimal variance, likelihood"].timesteps
    assert len(best) == 3 and best[0] == 0 and best[-1] == T - 1
    assert steps.style_of(rows[0]) != steps.style_of(rows[-1])
    assert not [row for row in of_steps.contestants(DDPM(tiny), (3,)) if "optimal" in row.name]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["figure"], "is not one of rate-distortion, progressive"),
        (["figure", "seven", "RUN"], "figure: 'seven' is not one of rate-distortion"),
        (["figure", "progressive"], "RUN is missing; see ddpm-jax figure progressive --help"),
        (["figure", "progressive", "/nowhere"], "/nowhere: not a run directory"),
        (["figure", "progressive", "RUN", "--n", "0"], "ddpm-jax: n: must be at least 1, got 0"),
        (
            ["figure", "progressive", "RUN", "--out", "x.jpg"],
            "out: must end in .png and not be a folder, got x.jpg",
        ),
        (["figure", "progressive", "RUN", "--out", "/dev/null/x.png"], "/dev/null"),
        (
            ["figure", "schedule", "--num-timesteps", "100000000000"],
            "num_timesteps: must be at least 1 and at most",
        ),
        (["figure", "progressive", "RUN", "--seed", "-1"], "seed: must be at least 0"),
        (
            ["figure", "interpolate", "RUN", "--between", "0", "99"],
            "there is no image 99; choose an index from 0 to",
        ),
        (
            ["figure", "interpolate", "RUN", "--between", "0", "nowhere.png"],
            "between: nowhere.png cannot be read",
        ),
        (["figure", "interpolate", "RUN", "--between", "0", __file__], "cannot be read"),
        (["figure", "interpolate", "RUN", "--steps", "3"], "add --slerp"),
        (
            ["figure", "interpolate", "RUN", "--slerp", "--steps", "11"],
            "steps: must be from 1 to 10, got 11",
        ),
        (["figure", "rate-distortion", "RUN", "--split", "test"], "no test images"),
        (["figure", "steps", "RUN", "--steps", "1"], "steps: must be at least 2, got 1"),
        (["figure", "steps", "RUN", "--steps", "20"], "steps: none is at most 10"),
        (["figure", "steps", "RUN", "--samples", "9"], "samples: must be at least 20, got 9"),
        (["figure", "steps", "RUN", "--data", "npz:no.npz"], "no.npz"),
        (["figure", "schedule", "--schedules", "sine"], "sine"),
        (
            ["figure", "schedule", "--schedules", "cosine", "--beta-end", "0.1"],
            "'cosine' does not use it",
        ),
    ],
)
def test_bad_figures_get_one_clear_line(run, capsys, monkeypatch, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *[run if arg == "RUN" else arg for arg in args])
    assert not list(tmp_path.iterdir())
