"""Modes, meshes and numbers of devices: the same losses, the same samples."""

import re
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lines, on_one_device, with_
from jax.sharding import PartitionSpec

from ddpm_jax import DDPM, UserError, fit
from ddpm_jax.config import Config, Model, Optim, Parallel, Train
from ddpm_jax.data import Batches, from_array
from ddpm_jax.devices import mesh as mesh_file
from ddpm_jax.devices.mesh import (
    batch_sharding,
    fetch,
    fsdp_spec,
    local_rows,
    make_mesh,
    mesh_over,
    replicate,
    state_shardings,
)
from ddpm_jax.devices.processes import BOUND, in_cluster, join
from ddpm_jax.training import holdout
from ddpm_jax.training import prepare as prepare_file
from ddpm_jax.training import update as update_file
from ddpm_jax.training.flops import batch_shapes
from ddpm_jax.training.update import Update, init_state


def steps_of(config, pictures, n=3, labels=None):
    """(losses and gradient norms [n,2], state) of n updates as config.parallel says."""
    parallel = config.parallel
    mesh = make_mesh(parallel.devices, parallel.fsdp, parallel.mode)
    ddpm = DDPM(config)
    batches = Batches(
        from_array(pictures, (8, 8, 1), labels),
        np.arange(len(pictures)),
        config.train.batch_size,
        config.seed,
    )
    update = Update(ddpm, mesh, batches)
    shapes = jax.eval_shape(lambda: init_state(ddpm))
    state = jax.jit(lambda: init_state(ddpm), out_shardings=state_shardings(shapes, mesh))()
    metrics = []
    for step in range(n):
        state, of_step = update(state, step)
        metrics.append([float(of_step["loss"]), float(of_step["grad_norm"])])
    return np.array(metrics), update.settled(state)


@pytest.fixture(scope="module")
def plain(tiny, pictures):
    """On one device."""
    return steps_of(on_one_device(tiny), pictures)


WAYS = {
    "pmap 1": {"parallel": {"mode": "pmap", "devices": 1}},
    "jit 2": {"parallel": {"devices": 2}},
    "pmap 4": {"parallel": {"mode": "pmap"}},
    "jit 4, on_device": {"data": {"on_device": True}},
    "pmap 2, on_device": {"parallel": {"mode": "pmap", "devices": 2}, "data": {"on_device": True}},
    "fsdp 4": {"parallel": {"fsdp": 4}},
    "fsdp 2, accumulate 2": {"parallel": {"fsdp": 2}, "train": {"accumulate": 2}},
    "accumulate 4": {"parallel": {"devices": 1}, "train": {"accumulate": 4}},
    "pmap 2, accumulate 2": {
        "parallel": {"mode": "pmap", "devices": 2},
        "train": {"accumulate": 2},
    },
    "remat": {"parallel": {"devices": 1}, "model": {"remat": (0,)}},
}
QUICK = {"pmap 2, on_device", "fsdp 2, accumulate 2", "remat"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WAYS]
)
def test_every_way_of_dividing_the_work_learns_the_same(tiny, pictures, plain, monkeypatch, name):
    """With dropout and flips: loss and gradient norm of each step, and the final parameters."""
    monkeypatch.setattr(mesh_file, "SMALL", 64)
    metrics, state = steps_of(with_(tiny, **WAYS[name]), pictures)
    np.testing.assert_allclose(metrics, plain[0], rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(plain[1].params), strict=True
    ):
        # Adam divides by the gradient's size: where that is all but 0, rounding decides the sign.
        assert np.mean(np.abs(np.asarray(ours) - np.asarray(theirs)) > 1e-5) < 0.01
    divided = {leaf.sharding.spec for leaf in jax.tree.leaves(state)} - {PartitionSpec()}
    assert bool(divided) == ("fsdp" in name)
    assert state.params["stem"]["kernel"].sharding.mesh.axis_names == ("data", "fsdp")


def reduced_in_loops(config, mesh):
    """The elements that the compiled step all-reduces within loops."""
    ddpm = DDPM(config)
    shapes = jax.eval_shape(lambda: init_state(ddpm))
    state = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), shapes, state_shardings(shapes, mesh)
    )
    batch = batch_shapes(config, batch_sharding(mesh))
    program = update_file._step.lower(ddpm, state, batch, mesh=mesh).compile().as_text()
    before_entry = program.partition("\nENTRY ")[0]
    assert " all-reduce(" in program
    results = re.findall(r"= (.*) all-reduce\(", before_entry)
    sizes = re.findall(r"f32\[([\d,]*)\]", " ".join(results))
    return sum(np.prod([int(n) for n in size.split(",") if n], dtype=int) for size in sizes)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_parts_of_a_batch_are_summed_before_the_devices_are(tiny, monkeypatch, fsdp):
    monkeypatch.setattr(mesh_file, "SMALL", 64)
    config = with_(tiny, train={"accumulate": 2})
    assert reduced_in_loops(config, make_mesh(fsdp=fsdp)) == 0


def test_pmap_relabels_the_state_only_where_somebody_looks(tiny, pictures, tmp_path, monkeypatch):
    """Of 6 updates two are saved; the lines of the log in between need no state."""
    meshes = []
    traced = []

    def train_step(*args, step=update_file.train_step, **options):
        traced.append(step)
        return step(*args, **options)

    def counted(tree, mesh, relabel=update_file.on_mesh):
        meshes.append(mesh.axis_names)
        return relabel(tree, mesh)

    monkeypatch.setattr(update_file, "on_mesh", counted)
    monkeypatch.setattr(update_file, "train_step", train_step)
    update_file._pmap_step.cache_clear()  # It holds the step that is not counted.
    config = with_(
        tiny,
        parallel={"mode": "pmap", "devices": 2},
        train={"steps": 6, "log_every": 1, "eval_every": 0},
        checkpoint={"every": 3},
    )
    state = fit(config, tmp_path / "run", pictures)
    update_file._pmap_step.cache_clear()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    # In at the start, out and in again for step 3, out for step 6.
    assert meshes == [("data",), ("data", "fsdp")] * 2
    assert state.step.sharding.mesh.axis_names == ("data", "fsdp")
    assert len(traced) == 1, "the state comes back on another mesh, and the step is compiled anew"


def test_bfloat16_steps_stay_close(tiny, pictures, plain):
    metrics, _ = steps_of(on_one_device(tiny, model={"dtype": "bfloat16"}), pictures)
    np.testing.assert_allclose(metrics, plain[0], rtol=0.05)
    assert not np.array_equal(metrics, plain[0])


def test_each_device_clips_its_own_gradient_before_the_mean(tiny, pictures):
    """Against the gradients of the two halves of the batch, clipped and averaged by hand."""
    config = with_(
        tiny,
        parallel={"mode": "pmap", "devices": 2},
        optim={"clip": "device", "clip_norm": 0.05},
        data={"flip": False},
    )
    ddpm = DDPM(config)
    metrics, _ = steps_of(config, pictures, n=1)
    rng = jax.random.fold_in(jax.random.key(0), 0)
    params = jax.jit(lambda: init_state(ddpm).params)()
    batches = Batches(from_array(pictures, (8, 8, 1)), np.arange(len(pictures)), 8, 0)
    x_0 = jnp.asarray(batches.batch_at(0).image.astype(np.float32) / 127.5 - 1)

    @jax.jit
    def gradient(rows):
        return jax.grad(
            lambda params: ddpm.loss(params, rng, x_0[rows], rows=rows, train=True).mean()
        )(params)

    total = 0
    for rows in (np.arange(4, dtype=np.uint32), np.arange(4, 8, dtype=np.uint32)):
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(rows))])
        assert np.linalg.norm(flat) > 0.05
        total = total + flat * 0.05 / np.linalg.norm(flat) / 2
    np.testing.assert_allclose(metrics[0, 1], np.linalg.norm(total), rtol=1e-4)
    assert metrics[0, 1] < 0.05


def test_the_largest_divisible_axis_is_divided_and_small_arrays_are_not():
    assert fsdp_spec((3, 3, 256, 512), 8) == PartitionSpec(None, None, None, "fsdp")
    assert fsdp_spec((3, 3, 512, 256), 8) == PartitionSpec(None, None, "fsdp")
    for shape in ((512, 131), (512, 1031)):
        assert fsdp_spec(shape, 8) == PartitionSpec("fsdp"), shape
    for shape in ((512, 127), (512,), (511, 1031)):
        assert fsdp_spec(shape, 8) == PartitionSpec(), shape
    assert fsdp_spec((512, 512), 1) == PartitionSpec()


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="fsdp: 3 does not divide the 4 devices"):
        make_mesh(fsdp=3)
    for make, message in [
        (
            lambda: Config(parallel=Parallel(mode="pmap", fsdp=2)),
            "parallel.fsdp: parallel.mode pmap keeps a whole copy",
        ),
        (
            lambda: Config(optim=Optim(clip="device")),
            "optim.clip: device needs one gradient per device; choose parallel.mode pmap",
        ),
        (
            lambda: Config(train=Train(accumulate=3)),
            "accumulate: 3 does not divide train.batch_size 128; choose a divisor",
        ),
        (
            lambda: Config(model=Model(remat=(4,))),
            "model.remat: there is no level 4; choose from 0 to 3",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            make()


def test_rows_of_all_devices_are_the_batch():
    mesh = make_mesh()
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))
    rows = np.arange(8.0).reshape(8, 1)
    np.testing.assert_array_equal(fetch(mesh_file.place_rows(rows, mesh, 8)), rows)
    assert replicate({"a": jnp.ones(3)}, mesh)["a"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ("localhost:1", None, None),
            "--num-processes, --process-id: missing; several processes need all of",
        ),
        (("localhost", 2, 0), "--coordinator: must be HOST:PORT, got 'localhost'"),
        (
            ("localhost:1", 2, 2),
            "--process-id: must be from 0 to --num-processes - 1, got 2 with --num-processes 2",
        ),
    ],
)
def test_processes_that_cannot_be_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        join(*given)


def test_processes_hear_in_time_of_one_that_has_died(monkeypatch):
    """In test_slow_processes.py one dies; benchmarks/death.py measures how long the other lives."""
    given = {}
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda *where, heartbeat_timeout_seconds: given.update(
            where=where, seconds=heartbeat_timeout_seconds
        ),
    )
    monkeypatch.setattr(jax.config, "update", given.__setitem__)
    join("localhost:1", 2, 1)
    assert given == {
        "where": ("localhost:1", 2, 1),
        "seconds": BOUND - 10,
        "jax_cpu_collectives_implementation": "gloo",
        "jax_cpu_enable_async_dispatch": False,
    }


def test_clusters_are_known_by_their_environment():
    srun = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "a[1-2]",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    assert in_cluster({**srun, "SLURM_NTASKS": "2"}) and not in_cluster(
        {**srun, "SLURM_NTASKS": "1"}
    )
    with pytest.raises(UserError, match="SLURM_NTASKS: 'two' is not a number"):
        in_cluster({**srun, "SLURM_NTASKS": "two"})
    assert in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    assert not in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) and not in_cluster(
        {"JAX_PLATFORMS": "cpu"}
    )


def test_the_whole_average_of_an_evaluation_is_freed(tiny, pictures, tmp_path, monkeypatch):
    """With fsdp each device has a part of it. What is whole is counted before every update."""
    monkeypatch.setattr(mesh_file, "SMALL", 64)

    def whole():
        return sum(
            array.size >= 64 and array.is_fully_replicated and len(array.devices()) == 4
            for array in jax.live_arrays()
        )

    around, within = [], []

    def counted(self, *args, call=Update.__call__):
        around.append(whole())
        return call(self, *args)

    def compared(*args, compare=holdout.compare):
        within.append(whole())
        return compare(*args)

    monkeypatch.setattr(Update, "__call__", counted)
    monkeypatch.setattr(holdout, "compare", compared)
    others = whole()
    config = with_(tiny, parallel={"fsdp": 4}, train={"eval_every": 1, "sample_every": 2})
    fit(config, tmp_path / "run", pictures)
    assert min(within) > others
    assert around == [others] * 4


class FakeTPU:
    """A chip of a slice, as far as a mesh looks at it."""

    platform = "tpu"
    slice_index = 0
    core_on_chip = 0

    def __init__(self, number, kind, coords, process_index):
        self.id = number
        self.device_kind = kind
        self.coords = coords
        self.process_index = process_index

    def __repr__(self):
        return f"{self.coords} of process {self.process_index}"


def slice_of(kind, X, Y, Z):
    """X x Y x Z chips, in jax's order; each host has 2x2x1 of them."""
    hosts = {}
    chips = []
    for z, y, x in np.ndindex(Z, Y, X):
        process = hosts.setdefault((z, y // 2, x // 2), len(hosts))
        chips.append(FakeTPU(len(chips), kind, (x, y, z), process))
    return chips


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("TPU v4", (2, 2, 4)),
        ("TPU v4", (4, 4, 2)),
        ("TPU v5 lite", (4, 4, 1)),
        ("TPU v5 lite", (4, 8, 1)),
        ("TPU v6 lite", (4, 4, 1)),
    ],
)
def test_pmap_gets_each_hosts_devices_together(kind, shape):
    """On slices whose hosts jax interleaves."""
    devices = slice_of(kind, *shape)
    given = mesh_over(devices, 1, "jit")
    with pytest.raises(ValueError, match="must form a contiguous"):
        _ = given.local_mesh  # Of process 0, as pmap makes it of its devices.
    mesh = mesh_over(devices, 1, "pmap")
    assert mesh.local_mesh.devices.size == 4
    blocks = [process for process, _ in groupby(mesh.devices.flat, lambda chip: chip.process_index)]
    assert blocks == list(range(len(devices) // 4))
    for process in blocks:  # A host's chips stay in the order that suits the network.
        in_both = [
            [chip for chip in each.devices.flat if chip.process_index == process]
            for each in (given, mesh)
        ]
        assert in_both[0] == in_both[1] and len(in_both[0]) == 4
    assert mesh.shape == given.shape and mesh.axis_types == given.axis_types


def test_a_run_asks_for_the_mesh_of_its_mode(tiny, pictures, tmp_path, monkeypatch):
    asked = []

    def noted(*args):
        asked.append(args)
        return make_mesh(*args)

    monkeypatch.setattr(prepare_file, "make_mesh", noted)
    for mode in ("pmap", "jit"):
        config = with_(tiny, parallel={"mode": mode, "devices": 2})
        prepare_file.prepare(config, tmp_path / mode, pictures)
    assert asked == [(2, 1, "pmap"), (2, 1, "jit")]
