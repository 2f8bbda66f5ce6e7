"""The plan: FLOPs against a count by hand and XLA's, bytes against real arrays, traffic, hours."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, with_
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from ddpm_jax import DDPM, UserError
from ddpm_jax.cli import main
from ddpm_jax.config import Config, Model, load_config
from ddpm_jax.data import Batch
from ddpm_jax.devices.mesh import fsdp_spec, make_mesh
from ddpm_jax.training import plan, update
from ddpm_jax.training.flops import PEAKS, count_flops, model_flops_rate
from ddpm_jax.training.peak import live_bytes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def flops_of(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args).jaxpr)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(config, batch_size):
    """(denoise, its arguments in the abstract)."""
    ddpm = DDPM(config)
    params = jax.eval_shape(ddpm.init, jax.random.key(0))
    return ddpm.denoise, (
        params,
        array(batch_size, *ddpm.image_shape),
        array(batch_size, dtype=jnp.int32),
    )


@pytest.fixture(scope="module")
def config(tiny):
    """One level of 64 channels: it has kernels above and below the size that is divided."""
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, base_channels=64))


@pytest.fixture(scope="module")
def planned(config):
    """Its plan for four devices, two of which share the state."""
    return plan.plan(config, 4, fsdp=2)


@pytest.fixture(scope="module")
def state(config):
    """Its state in the abstract."""
    return jax.eval_shape(functools.partial(update.init_state, DDPM(config)))


def test_the_cifar10_networks_forward_pass_costs_what_a_count_by_hand_says():
    """Appendix B layer by layer, multiplications only, at 32^2, 16^2, 8^2 and 4^2 pixels."""

    def conv(pixels, c_in, c_out):
        return 9 * pixels * c_in * c_out

    def block(pixels, c_in, c_out):
        shortcut = pixels * c_in * c_out if c_in != c_out else 0
        return conv(pixels, c_in, c_out) + 512 * c_out + conv(pixels, c_out, c_out) + shortcut

    def attention(pixels, c):
        return 4 * pixels * c * c + 2 * pixels * pixels * c

    p32, p16, p8, p4 = 32**2, 16**2, 8**2, 4**2
    count = 128 * 512 + 512 * 512 + conv(p32, 3, 128)
    # Down: two blocks a level, attention at 16x16, and a strided convolution but after the last.
    count += 2 * block(p32, 128, 128) + conv(p16, 128, 128)
    count += (
        block(p16, 128, 256) + block(p16, 256, 256) + 2 * attention(p16, 256) + conv(p8, 256, 256)
    )
    count += 2 * block(p8, 256, 256) + conv(p4, 256, 256)
    count += 2 * block(p4, 256, 256)
    count += 2 * block(p4, 256, 256) + attention(p4, 256)
    # Up: three blocks a level, each with a skip: 256 channels until the two from 32x32, and the
    # strided one's 128.
    count += 3 * block(p4, 512, 256) + conv(p8, 256, 256)
    count += 3 * block(p8, 512, 256) + conv(p16, 256, 256)
    count += (
        2 * block(p16, 512, 256)
        + block(p16, 384, 256)
        + 3 * attention(p16, 256)
        + conv(p32, 256, 256)
    )
    count += block(p32, 384, 128) + 2 * block(p32, 256, 128)
    count += conv(p32, 128, 3)

    denoise, args = forward(load_config("cifar10"), 2)
    assert flops_of(denoise, *args) == 2 * (2 * count)
    assert 2 * count == pytest.approx(12.4e9, rel=0.005)


def test_a_step_costs_three_forward_passes(config, planned):
    """But for the gradients of what the network is given: the image and the sinusoids."""
    denoise, args = forward(config, 8)
    unneeded = 2 * 8 * (9 * 64 * 1 * 64 + 64 * 256)
    assert planned.flops == 3 * flops_of(denoise, *args) - unneeded


def test_flops_are_close_to_those_that_xla_counts():
    """XLA omits taps on padding, here 4% of a 3x3 kernel's, and adds elementwise operations."""
    model = Model(
        base_channels=64, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(16,)
    )
    denoise, args = forward(dataclasses.replace(load_config("cifar10"), model=model), 2)
    traced = jax.jit(denoise).trace(*args)
    assert count_flops(traced.jaxpr.jaxpr) == pytest.approx(
        traced.lower().cost_analysis()["flops"], rel=0.06
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(stride):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = array(2, 8, 8, 3), array(3, 3, 3, 5)
    expected = 2 * 2 * (8 // stride) ** 2 * 9 * 3 * 5
    assert flops_of(conv, x, kernel) == expected
    for i in (0, 1):
        gradient = jax.grad(lambda *args: conv(*args).sum(), i)
        assert flops_of(gradient, x, kernel) == 2 * expected, i


def test_flops_inside_of_loops_branches_and_checkpoints():
    a = array(4, 4)
    product = 2 * 4**3

    def scanned(a):
        return jax.lax.scan(lambda carry, _: (carry @ a, None), a, length=5)[0]

    def branched(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a)

    def looped(a):
        return jax.lax.while_loop(lambda a: a[0, 0] > 0, lambda a: a @ a, a)

    assert flops_of(scanned, a) == flops_of(jax.jit(scanned), a) == 5 * product
    assert flops_of(branched, a) == 2 * product
    # The second product is made again: three forward, and two of each backward.
    recomputed = jax.grad(lambda a: jax.checkpoint(lambda a: jnp.sin(a @ a))(a).sum())
    assert flops_of(recomputed, a) == 4 * product
    assert flops_of(lambda a: jnp.einsum("bij,bjk->bik", a, a), array(3, 4, 4)) == 3 * product
    with pytest.raises(ValueError, match="while"):
        flops_of(looped, a)


def test_bytes_are_those_of_real_arrays_on_a_mesh_of_their_shardings(planned, state):
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def held(tree):
        """Bytes of zeros of that tree's shapes on the first device."""
        size = 0
        for leaf in jax.tree.leaves(tree):
            sharding = NamedSharding(mesh, fsdp_spec(leaf.shape, 2))
            zeros = jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)
            size += zeros.addressable_shards[0].data.nbytes
        return size

    assert planned.params == planned.ema_params == planned.gradient == held(state.params)
    assert planned.opt_state == held(state.opt_state)
    assert planned.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 2 * planned.parameters < planned.params < 4 * planned.parameters


def test_activations_are_what_the_backward_pass_keeps():
    """Of (sin(x v) w)^2: x, the cosine and the sine of x v, and sin(x v) w.

    The parameters are not counted.
    """

    class Model:
        image_shape = (4, 4, 1)
        config = Config()

        def loss(self, params, rng, x_0, labels, train):
            assert train and labels is None
            v, w = params
            return jnp.square(jnp.sin(x_0.reshape(-1, 16) @ v) @ w).sum(axis=1)

    class Recomputed(Model):
        def loss(self, *args, **options):
            return jax.checkpoint(functools.partial(super().loss, **options))(*args)

    params = array(16, 5), array(5, 2)
    assert plan.activation_bytes(Model(), params, 3) == 4 * 3 * (16 + 5 + 5 + 2)
    assert plan.activation_bytes(Recomputed(), params, 3) == 4 * 3 * 16


def test_memory_at_once_is_what_lives_from_its_making_to_its_last_use():
    """In arrays of 4 numbers, by hand."""

    def chain(x):  # x is an argument; never more than one value and the one made of it.
        return jnp.cos(jnp.sin(jnp.cos(x)))

    def skip(x):  # The first lives until it is added.
        first = jnp.cos(x)
        return first + jnp.sin(jnp.cos(jnp.sin(first)))

    def inside(x):  # Within the call three live, beside the first.
        first = jnp.cos(x)
        return first + jax.jit(skip)(first)

    x = array(4)
    for function, most in ((chain, 2), (skip, 3), (inside, 4), (jnp.cos, 1), (lambda x: x, 0)):
        assert live_bytes(jax.make_jaxpr(function)(x).jaxpr) == most * 16, function


def test_evaluations_take_the_state_a_whole_average_and_a_forward_pass(config, planned, state):
    """The images at once: 2 on each device in held-out losses, 16 in samples."""
    whole = sum(
        4 * leaf.size for leaf in jax.tree.leaves(state.params) if any(fsdp_spec(leaf.shape, 2))
    )
    params = planned.params + planned.ema_params + planned.opt_state
    ddpm = DDPM(config)
    assert planned.in_evaluations == params + whole + plan.forward_bytes(ddpm, state.params, 2)
    changed = with_(config, train={"num_samples": 64})
    samples = plan.plan(changed, 4, fsdp=2).in_evaluations
    assert samples == params + whole + plan.forward_bytes(ddpm, state.params, 16)
    nothing = with_(config, train={"num_samples": 0, "eval_every": 0})
    assert plan.plan(nothing, 4, fsdp=2).in_evaluations == params + whole
    # Parts make the gradient's memory small, and not that of held-out losses.
    parts = plan.plan(with_(config, train={"batch_size": 512, "accumulate": 64}), 4, fsdp=2)
    assert parts.in_evaluations > parts.memory


def test_traffic_is_that_of_a_ring_of_which_every_device_sends_its_part_round(planned, state):
    """Passes of n - 1 rounds, each sending an n-th to the next device: one reduces, one gathers."""

    def sent(size, n, passes):
        return sum(size / n for _ in range(passes) for _ in range(n - 1))

    def traffic_on(data, fsdp):
        mesh = AbstractMesh((data, fsdp), ("data", "fsdp"))
        return plan.ring_traffic(
            jax.tree.map(
                lambda leaf: leaf.update(sharding=NamedSharding(mesh, fsdp_spec(leaf.shape, fsdp))),
                state.params,
            )
        )

    leaves = jax.tree.leaves(state.params)
    divided = 4 * sum(leaf.size for leaf in leaves if fsdp_spec(leaf.shape, 2))
    whole = 4 * planned.parameters - divided
    reduced, scattered, gathered = planned.traffic
    assert 0 < divided < whole
    assert reduced == (
        "all-reduced",
        whole + divided / 2,
        sent(whole, 4, 2) + sent(divided / 2, 2, 2),
    )
    assert scattered == ("reduce-scattered", divided, sent(divided, 2, 1))
    assert gathered == ("all-gathered", 2 * divided, sent(2 * divided, 2, 1))
    # Where nothing is left over to all-reduce, and where nothing is sent at all.
    assert traffic_on(1, 2)[0] == ("all-reduced", whole, sent(whole, 2, 2))
    assert traffic_on(1, 1) == []


def test_the_command_prints_it_all(capsys):
    args = ["--devices", "4", "--flops-per-s", "1e9", "--utilisation", "0.5", "--memory-gib", "1"]
    assert (
        main(
            [
                "plan",
                "digits",
                *args,
                "--model.channel-multipliers",
                "1",
                "--train.batch-size",
                "64",
            ]
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    # All that is held in float32: 162,177 numbers.
    assert "parameters 162,177 mesh data 4 x fsdp 1 batch 64 images, 16 per device" in printed
    assert "parameters 0.6 MiB their average 0.6 MiB optimiser 1.2 MiB gradient 0.6 MiB" in printed
    assert "MiB an estimate total" in printed and "MiB fits in 1 GiB" in printed
    assert re.search("in evaluations [0-9.]+ MiB an estimate fits in 1 GiB", printed)
    assert "all-reduced 0.6 MiB each device sends 0.9 MiB" in printed and "scattered" not in printed
    hours = float(re.search("takes (.*) hours at 0.5 of 1 GFLOP/s per device$", printed)[1])
    computed = float(re.search("computes (.*) GFLOP,", printed)[1])
    assert hours == pytest.approx(computed * 4500 / (4 * 0.5 * 3600), rel=0.005)


def test_of_a_bfloat16_network_the_traffic_is_at_most(config):
    """XLA sends some of it in bfloat16."""
    half = plan.table(plan.plan(with_(config, model={"dtype": "bfloat16"}), 2))
    whole = plan.table(plan.plan(config, 2))
    sent = re.search("each device sends (.* MiB)", whole)[1]
    assert f"each device sends at most {sent}" in half


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "plan: CONFIG is missing"),
        (["digits", "--devices", "-1"], "devices: must be at least 1, got -1"),
        (
            ["digits", "--devices", "3"],
            "train.batch_size: 32 is not divisible by the 3 devices; choose a multiple",
        ),
        (["digits", "--devices", "4", "--fsdp", "3"], "fsdp: 3 does not divide the 4 devices"),
        (["digits", "--flops-per-s", "-1e12"], "flops_per_s: must be above 0"),
        (["digits", "--utilisation", "30"], "utilisation: must be at most 1"),
        (["digits", "--memory-gib", "0"], "memory_gib: must be above 0"),
        (
            ["digits", "--optim.learning-rate", "-1"],
            "optim.learning_rate: must be above 0, got -1.0",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, args, says):
    assert says in refused(capsys, "plan", *args)


def test_compiling_without_libtpu_says_what_to_install(config, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu is not installed; pip install 'ddpm-jax\[tpu\]'"):
        plan.compile_for(config, "v5e:2x2", 4)


@needs_libtpu
@pytest.mark.slow
def test_the_step_compiles_for_tpus_that_are_not_here(tiny):
    """The state of 4,000 parameters is in the arguments, which the compiler pads."""
    compiled = plan.compile_for(tiny, "v5e:2x2", 4)
    state = jax.eval_shape(functools.partial(update.init_state, DDPM(tiny)))
    assert compiled.kind == "TPU v5 lite" and not compiled.failure
    assert compiled.arguments > sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    assert compiled.memory > compiled.arguments + compiled.temporaries > compiled.arguments
    for topology, devices, says in [
        ("v5e:2x2", 8, "has 4 devices, not 8; pass --devices 4"),
        ("v99:2x2", 4, "v99"),
    ]:
        with pytest.raises(UserError, match=says):
            plan.compile_for(tiny, topology, devices)


def test_the_compilers_verdict_is_printed(planned):
    printed = plan.table(
        planned,
        memory_gib=16,
        compiled=plan.Compiled("v5e:2x2", "TPU v5 lite", 2**34, 2**20, 2**20),
    )
    assert printed.endswith("total                 16,386.0 MiB  does not fit in 16 GiB")
    failed = plan.Compiled(
        "v5e:2x2", "TPU v5 lite", failure="RESOURCE_EXHAUSTED: Ran out of memory"
    )
    assert plan.table(planned, compiled=failed).endswith(
        "fits              no: RESOURCE_EXHAUSTED: Ran out of memory"
    )


@pytest.mark.slow
def test_memory_is_about_what_the_compiler_takes(config):
    """The state to the byte, with its step; the rest as XLA lays it out for the CPU."""
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, image_shape=(32, 32, 3))
    )
    planned, ddpm = plan.plan(config, 1), DDPM(config)
    state = jax.eval_shape(functools.partial(update.init_state, ddpm))
    step = jax.jit(update.train_step, static_argnums=0, donate_argnums=1)
    memory = (
        step.lower(ddpm, state, Batch(array(8, 32, 32, 3, dtype=jnp.uint8)))
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == planned.params + planned.ema_params + planned.opt_state + 4
    ratio = (planned.activations + planned.gradient) / memory.temp_size_in_bytes
    print(f"activations and gradient are estimated at {ratio:.2f} of the compiler's temporaries")
    assert 0.7 < ratio < 1.4
    args = state.params, jax.random.key(0), array(8, 32, 32, 3)
    forward = jax.jit(ddpm.loss).lower(*args).compile().memory_analysis()
    ratio = plan.forward_bytes(ddpm, state.params, 8) / forward.temp_size_in_bytes
    print(f"a forward pass is estimated at {ratio:.2f} of the compiler's temporaries")
    assert 0.5 < ratio < 2


def test_utilisation_is_of_the_devices_at_hand(tiny, monkeypatch):
    """Two devices of known peak: their FLOP/s over those of an update, recomputation aside."""
    state = jax.eval_shape(functools.partial(update.init_state, DDPM(tiny)))
    mesh = make_mesh(2)
    assert model_flops_rate(DDPM(tiny), state, mesh) is None  # A CPU's peak is not known.
    monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, (1e9, 3e9))
    flops = plan.plan(tiny, 2).flops
    assert model_flops_rate(DDPM(tiny), state, mesh) == pytest.approx(2 * 1e9 / flops)
    again = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, remat=(0,), dtype="bfloat16")
    )
    assert plan.plan(again, 2).flops > flops
    assert model_flops_rate(DDPM(again), state, mesh) == pytest.approx(2 * 3e9 / flops)
