"""Chains in segments: the same bits wherever they are cut, a bar that moves, Ctrl-C, NaNs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_
from tqdm import tqdm

from ddpm_jax import DDPM
from ddpm_jax.calls import bounds, programs, samples
from ddpm_jax.calls.conditions import FREE
from ddpm_jax.calls.programs import advance, sample_batch
from ddpm_jax.config import Diffusion
from ddpm_jax.data.images import to_uint8
from ddpm_jax.devices import progress, segments
from ddpm_jax.devices.mesh import fetch, make_mesh, replicated
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import sample
from ddpm_jax.evaluation.sample import destination, sample_to
from ddpm_jax.keys import example_keys
from ddpm_jax.sampler import Sampler
from ddpm_jax.weights.load import load_weights

KEY = jax.random.key(0)
T = 10
ONE_BY_ONE = [(i, i + 1) for i in range(T)]
UNEVEN = [(0, 1), (1, 8), (8, 10)]
IN_ONE = [(0, T)]


@pytest.fixture(scope="module")
def model(tiny):
    ddpm = DDPM(tiny)
    params = ddpm.init(jax.random.key(0))
    kernel = params["out_conv"]["kernel"]
    params["out_conv"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    return ddpm, params


class Bar(tqdm):
    """A hidden bar that keeps what it was moved by, and is interrupted at `stop` steps."""

    def __init__(self, stop=None):
        super().__init__(disable=True)
        self.moves = []
        self.stop = stop

    def update(self, n=1):
        self.moves.append(n)
        if self.stop is not None and sum(self.moves) >= self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def cut(monkeypatch):
    """A function that sets where chains of T steps are cut."""

    def at(cuts):
        monkeypatch.setattr(segments, "segments", lambda steps: iter(cuts))

    return at


def test_segments_cover_all_steps_whatever_the_time_they_take(monkeypatch):
    rng = np.random.default_rng(0)
    for steps in (0, 1, 2, 7, 1000):
        clock = iter(np.cumsum(10 ** rng.uniform(-5, 2, 4 * steps + 4)))
        monkeypatch.setattr(segments.time, "perf_counter", lambda clock=clock: next(clock))
        cuts = list(segments.segments(steps))
        assert [i for first, last in cuts for i in range(first, last)] == list(range(steps))


def test_a_segment_takes_about_half_a_second_or_one_step():
    assert segments.next_length(1, 4.0) == 1
    assert segments.next_length(1, 0.1) == 5
    assert segments.next_length(40, 2.0) == 10
    assert segments.next_length(1, 1e-3) == 8
    assert segments.next_length(64, 0.0) == 512


SAMPLERS = [
    {},
    {"steps": 4},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "unipc", "steps": 6},
    {"sampler": "sde-dpm-solver++", "steps": 6},
    {"sampler": "heun", "steps": 4},
]


@pytest.mark.parametrize("options", SAMPLERS)
def test_an_image_is_the_same_bits_as_by_one_scan(model, options):
    ddpm, params = model
    whole = sample_batch(ddpm, Sampler(**options), params, FREE, KEY, np.arange(4, dtype=np.uint32))
    x = ddpm.sample(params, KEY, 4, **options)
    # A short scan is unrolled, and the compiler then adds the terms of a multistep method in an
    # order of its own.
    atol = 1e-6 if Sampler(**options).method.tables else 0
    np.testing.assert_allclose(x, whole, rtol=0, atol=atol)


def test_the_cuts_change_no_bits(model, cut):
    ddpm, params = model
    x_0 = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 8, 8, 1)
    keys = example_keys(KEY, np.arange(2, dtype=np.uint32))
    results = []
    for cuts in (ONE_BY_ONE, UNEVEN, IN_ONE):
        cut(cuts)
        results.append(
            [
                ddpm.sample(params, KEY, 2),
                *ddpm.reverse(params, keys, x_0, T),
                ddpm.encode(params, x_0),
                ddpm.decode(params, x_0),
                *ddpm.bits_per_dim(params, KEY, x_0),
            ]
        )
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])


def test_one_program_for_all_segments_on_devices_too(model, cut):
    ddpm, params = model
    spread = jax.device_put(params, replicated(make_mesh(4)))
    advance.clear_cache()
    cut(UNEVEN)
    ddpm.sample(spread, KEY, 4)
    assert advance._cache_size() == 1


def test_a_bar_counts_the_steps_of_all_batches(model, cut, capsys):
    ddpm, params = model
    cut(UNEVEN)
    bar = Bar()
    ddpm.sample(params, KEY, 3, batch_size=2, progress=bar)
    assert bar.moves == [1, 7, 2] * 2
    bar = Bar()
    ddpm.bits_per_dim(params, KEY, np.zeros((3, 8, 8, 1), np.float32), batch_size=2, progress=bar)
    assert bar.moves == [1, 7, 2] * 2
    assert capsys.readouterr().err == ""
    ddpm.sample(params, KEY, 1, progress=True)
    assert "| 0/10 [" in capsys.readouterr().err


@pytest.fixture
def events(monkeypatch):
    """What the host does, in its order: "run 0:1" dispatches a part of a chain, "get" waits."""
    happened = []

    def noted(program):
        def run(*args):
            happened.append(f"run {args[-2]}:{args[-1]}")
            return program(*args)

        return run

    def fetched(tree, fetch=fetch):
        first = jax.tree.leaves(tree)[0]
        happened.append("get finite" if first.dtype == bool else "get")
        return fetch(tree)

    for name in ("advance", "bounds"):
        monkeypatch.setattr(programs, name, noted(getattr(programs, name)))
    for place in (segments, samples, bounds):
        monkeypatch.setattr(place, "fetch", fetched)
    return happened


def test_the_next_batch_is_dispatched_before_the_last_is_waited_for(model, cut, events):
    ddpm, params = model
    whole = ddpm.sample(params, KEY, 5)
    events.clear()
    cut([(0, 1), (1, 10)])
    x = ddpm.sample(params, KEY, 5, batch_size=2)
    begin, end, wait = "run 0:1", "run 1:10", "get finite"
    ahead = [begin, wait, "get", wait, end]  # Of the next batch, and then the last one's result.
    assert events == [begin, wait, end, *ahead, *ahead, wait, "get"]
    np.testing.assert_allclose(x, whole, atol=1e-6)
    x_0 = np.linspace(-1, 1, 5 * 64, dtype=np.float32).reshape(5, 8, 8, 1)
    cut(IN_ONE)  # Where the first segment is the last.
    whole = ddpm.bits_per_dim(params, KEY, x_0)
    events.clear()
    bits = ddpm.bits_per_dim(params, KEY, x_0, batch_size=2)
    assert events == ["run 0:10", *(["run 0:10", wait, "get"] * 2), wait, "get"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), bits, whole)


def test_an_interrupt_ends_after_the_segment(model, cut):
    ddpm, params = model
    cut(ONE_BY_ONE)
    bar = Bar(stop=3)
    with pytest.raises(KeyboardInterrupt):
        ddpm.sample(params, KEY, 4, batch_size=2, progress=bar)
    assert bar.moves == [1, 1, 1]


def test_within_jit_and_grad_a_chain_is_one_differentiable_loop(model):
    ddpm, params = model
    x_0 = np.linspace(-0.9, 0.9, 64, dtype=np.float32).reshape(1, 8, 8, 1)

    def total(x_T):
        return ddpm.decode(params, x_T, steps=3).sum()

    gradient = jax.jit(jax.grad(total))(x_0)
    direction = np.random.default_rng(0).standard_normal(x_0.shape).astype(np.float32)
    slope = (total(x_0 + 0.01 * direction) - total(x_0 - 0.01 * direction)) / 0.02
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=2e-2)


def broken_below(t_broken, monkeypatch, tiny):
    """A model whose network says NaN for image 1 from step t_broken on."""

    def denoise(self, params, x_t, t):
        bad = (t <= t_broken) & (jnp.arange(len(t)) == 1)
        return jnp.where(bad[:, None, None, None], jnp.nan, 0.1 * x_t)

    monkeypatch.setattr(DDPM, "denoise", denoise)
    # A seed of its own: programs are kept by the config.
    return DDPM(with_(tiny, seed=1234 + t_broken))


@pytest.mark.parametrize("cuts", [UNEVEN, IN_ONE])
def test_samples_that_are_not_finite_stop_with_the_step(monkeypatch, tiny, cut, cuts):
    ddpm = broken_below(6, monkeypatch, tiny)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), ddpm.shapes)
    cut(cuts)
    words = r"samples: 1 of 4 images are not finite from step t = 6 on, the chain's step 4 of 10"
    with pytest.raises(UserError, match=words):
        ddpm.sample(params, KEY, 4)
    x = jnp.zeros((4, 8, 8, 1))
    with pytest.raises(UserError, match=words):
        ddpm.reverse(params, example_keys(KEY, np.arange(4, dtype=np.uint32)), x, T)
    cut([(0, 2), (2, 5)])
    with pytest.raises(UserError, match=r"from step t = 6 on, the chain's step 2 of 5"):
        ddpm.sample(params, KEY, 4, sampler="ddim", steps=5, grid="leading")
    cut(cuts)
    with pytest.raises(UserError, match="from step t = 0 on"):
        ddpm.bits_per_dim(params, KEY, x)


def test_bytes_are_not_made_of_nan():
    with pytest.raises(UserError, match="not finite"):
        to_uint8(np.array([0.0, np.nan], np.float32))


def test_the_batches_finished_before_an_interrupt_are_kept(run, tmp_path, monkeypatch, caplog):
    model = load_weights(run)
    whole = to_uint8(model.ddpm.sample(model.params, KEY, 4))
    monkeypatch.setattr(sample, "progress_bar", lambda **_: Bar(stop=T + 1))
    for name in ("x.npz", "x.png", "folder/"):
        with pytest.raises(KeyboardInterrupt):
            sample_to(destination(f"{tmp_path}/{name}"), model, 4, seed=0, batch_size=2)
    assert not (tmp_path / "x.npz").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "x-first-2.npz")["images"], whole[:2])
    assert (tmp_path / "x-first-2.png").exists()
    assert "folder holds 2 of 4 images" in caplog.text
    monkeypatch.undo()
    sample_to(destination(f"{tmp_path}/folder/"), model, 4, seed=0)
    assert len(list((tmp_path / "folder").glob("*.png"))) == 4


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n", "cut", "flip", "size"])
def test_a_damaged_file_among_samples_is_named_and_drawn_again(run, tmp_path, caplog, damage):
    model = load_weights(run)
    out = destination(f"{tmp_path}/samples/")
    sample_to(out, model, 2, seed=0)
    file = out.path / "000001.png"
    whole = file.read_bytes()
    if damage == "cut":
        damage = whole[:-20]
    elif damage == "flip":
        damage = whole[:45] + bytes([whole[45] ^ 255]) + whole[46:]
    elif damage == "size":
        damage = sample.png(np.zeros((4, 8, 1), np.uint8))
    file.write_bytes(damage)
    sample_to(out, model, 2, seed=0)
    assert file.read_bytes() == whole
    assert "000001.png: not a whole image of this model; drawn again" in caplog.text


def test_a_folder_in_the_place_of_an_image_is_named(run, tmp_path):
    (tmp_path / "samples/000001.png").mkdir(parents=True)
    (tmp_path / "samples/samples.json").write_text("{}")
    with pytest.raises(UserError, match=r"000001.png: is a folder in the place of an image"):
        sample_to(destination(f"{tmp_path}/samples/"), load_weights(run), 2, seed=0)


def test_the_same_sampler_in_other_words_is_the_same_folder(run, tmp_path):
    model = load_weights(run)
    out = destination(f"{tmp_path}/samples/")
    ddim = Sampler("ddim")
    sample_to(out, model, 1, seed=0, sampler=ddim)
    label = (out.path / "samples.json").read_text()
    for same in (
        Sampler("ddim", eta=0.0),
        Sampler("ddim", steps=T),
        Sampler("ddim", steps=T, grid="leading", eta=0.0),
    ):
        assert same.simplest(Diffusion(num_timesteps=T)) == ddim
        sample_to(out, model, 1, seed=0, sampler=same)
        assert (out.path / "samples.json").read_text() == label
    # A folder that was begun with the longer words, before they were put in short.
    (out.path / "samples.json").write_text(label.replace('"eta": null', '"eta": 0.0'))
    sample_to(out, model, 1, seed=0, sampler=ddim)
    with pytest.raises(UserError, match="eta"):
        sample_to(out, model, 1, seed=0, sampler=Sampler("ddim", eta=1.0))


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, caplog, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level("INFO")
    with progress.progress_bar(total=1000, desc="sampling", unit="step") as bar:
        for _ in range(100):
            clock[0] += 1.0
            bar.update(10)
    assert caplog.messages == [f"sampling: {done} of 1000 steps" for done in (300, 600, 900)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("on_mesh", [True, False])
def test_a_chain_makes_one_program(tiny, on_mesh):
    """The state of the first segment is placed as those that the program returns."""
    ddpm = DDPM(with_(tiny, diffusion={"num_timesteps": 13 + on_mesh}))
    params = ddpm.init(jax.random.key(0))
    if on_mesh:
        params = jax.device_put(params, replicated(make_mesh(1)))
    before = advance._cache_size()
    ddpm.sample(params, jax.random.key(1), 2)
    assert advance._cache_size() == before + 1
