"""Weights in and out against the diffusers library itself: its networks, schedulers and pipeline.

Its tables are float32, and its betas of a step come from ratios of them; ours are float64. Where
trajectories are compared, its alphas_cumprod is replaced by ours in float64, so that only float32
rounding within networks and steps is left; one test keeps its tables and states what they cost.
"""

import dataclasses
import importlib.util
import inspect
import json
import runpy
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax import DDPM, UserError, load, load_config, samplers, to_uint8
from ddpm_jax.config import Config, Data, Diffusion, Model
from ddpm_jax.schedule import strided
from ddpm_jax.weights import architecture
from ddpm_jax.weights.architecture import SCHEDULERS, UNET
from ddpm_jax.weights.diffusers import read_diffusers, write_diffusers

ABSENT = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed: scripts/test_interop.sh does that"
    ),
]

# What all the paper's published networks have in common.
PAPER = architecture.PAPER | {"attention_head_dim": None, "layers_per_block": 2}
NETWORKS = {
    "CIFAR10": {"sample_size": 32, "block_out_channels": [128, 256, 256, 256], "attention": [1]},
    # A quarter of the published width.
    "256x256": {
        "sample_size": 256,
        "block_out_channels": [32, 32, 64, 64, 128, 128],
        "attention": [4],
    },
    "attention everywhere": {
        "sample_size": [8, 16],
        "block_out_channels": [16, 32],
        "attention": [0, 1],
    },
    "one level": {
        "sample_size": 8,
        "block_out_channels": [24],
        "attention": [],
        "in_channels": 1,
        "out_channels": 1,
    },
    "three blocks": {
        "sample_size": 16,
        "block_out_channels": [8, 24, 8],
        "attention": [],
        "layers_per_block": 3,
    },
}
GROUPS = {"attention everywhere": 8, "one level": 4, "three blocks": 4}


@pytest.fixture(scope="module")
def library():
    """torch and diffusers, imported only when a test runs."""
    import diffusers
    import torch

    torch.set_num_threads(1)  # Its threads wait by spinning: on busy cores that takes minutes.
    return types.SimpleNamespace(torch=torch, diffusers=diffusers)


def make_unet(library, attention, **fields):
    """A UNet2DModel with random weights, norms included; levels `attention` have attention."""
    levels = range(len(fields["block_out_channels"]))
    fields["down_block_types"] = [
        "AttnDownBlock2D" if level in attention else "DownBlock2D" for level in levels
    ]
    fields["up_block_types"] = [
        "AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(levels)
    ]
    library.torch.manual_seed(0)
    unet = library.diffusers.UNet2DModel(**(PAPER | fields)).eval()
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * library.torch.randn_like(parameter)
    return unet


def of_torch(tensor):
    """[B,C,H,W] as an array [B,H,W,C]."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def to_torch(library, array):
    """[B,H,W,C] as a tensor [B,C,H,W]."""
    return library.torch.from_numpy(np.array(array).transpose(0, 3, 1, 2))


def error(found, expected):
    """The largest difference, in units of the largest expected number."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_librarys(library, tmp_path, name):
    unet = make_unet(library, norm_num_groups=GROUPS.get(name, 32), **NETWORKS[name])
    unet.save_pretrained(tmp_path)
    library.diffusers.DDPMScheduler(variance_type="fixed_large").save_pretrained(tmp_path)
    config, params = read_diffusers(tmp_path)
    if name == "CIFAR10":
        ours = load_config("cifar10")
        assert config.model == dataclasses.replace(ours.model, dropout=0.0)
        assert config.diffusion == ours.diffusion
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    ddpm = DDPM(config)
    t = np.array([999] if name == "256x256" else [0, 1, 500, 999], np.int32)
    x = np.random.default_rng(0).standard_normal((len(t), *ddpm.image_shape), np.float32)
    found = jax.jit(ddpm.denoise)(params, x, t)
    with library.torch.no_grad():
        expected = of_torch(unet(to_torch(library, x), library.torch.from_numpy(t)).sample)
        exact = of_torch(
            unet.double()(to_torch(library, x).double(), library.torch.from_numpy(t)).sample
        )
    print(
        f"{name}: {error(found, expected):.2g}, from float64 {error(found, exact):.2g} (theirs",
        end=" ",
    )
    print(f"{error(expected, exact):.2g})")
    # At 256x256 the sums over pixels within its float32 norms are most of the difference.
    assert error(found, exact) < 5e-6 and error(found, expected) < max(
        1e-5, 2 * error(expected, exact)
    )


def make_chain(library, tmp_path, scheduler, **fields):
    """(unet, ddpm, params, keys, x_T) of a small network beside `scheduler`, for three images."""
    small = {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "attention": [1],
        "norm_num_groups": 8,
    }
    unet = make_unet(library, **(small | {"layers_per_block": 1} | fields))
    library.diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    config, params = read_diffusers(tmp_path)
    ddpm = DDPM(config)
    keys = samplers.example_keys(jax.random.key(0), np.arange(3, dtype=np.uint32))
    return unet, ddpm, params, keys, samplers.gaussian_noise(keys, samplers.START, ddpm.image_shape)


def walk(library, unet, scheduler, x_T, steps, noise_at, options=lambda noise: {}):
    """x [S,B,H,W,C] after each of the library's `steps`, with the noise `noise_at(t)` [B,H,W,C]."""
    scheduler.set_timesteps(steps)
    x, xs = to_torch(library, x_T), []
    with library.torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for t in scheduler.timesteps:
            noise = to_torch(library, noise_at(int(t)))
            # DDPMScheduler takes no noise as an argument: this is what it draws.
            patch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor",
                lambda *_, noise=noise, **__: noise,
            )
            x = scheduler.step(unet(x, t).sample, t, x, **options(noise)).prev_sample
            xs.append(of_torch(x))
    return np.stack(xs)


def use_our_table(library, scheduler, ddpm):
    """alphas_cumprod in float64, as this package computes it."""
    diffusion = ddpm.config.diffusion
    betas = np.linspace(
        diffusion.beta_start or 1e-4, diffusion.beta_end or 0.02, diffusion.num_timesteps
    )
    scheduler.alphas_cumprod = library.torch.from_numpy(np.cumprod(1 - betas))
    np.testing.assert_array_equal(np.float32(scheduler.alphas_cumprod), ddpm.schedule.alphas_bar)


def noises(keys, ddpm):
    draw = jax.jit(lambda t: samplers.gaussian_noise(keys, t, ddpm.image_shape))
    return lambda t: np.asarray(draw(np.uint32(t)))


def errors(found, expected):
    """The largest difference after each step, in units of the largest number there."""
    return np.abs(found - expected).max(axis=(1, 2, 3, 4)) / np.abs(expected).max(axis=(1, 2, 3, 4))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_ddim_trajectory_is_the_librarys(library, tmp_path, eta):
    scheduler = library.diffusers.DDIMScheduler()
    unet, ddpm, params, keys, x_T = make_chain(library, tmp_path, scheduler)
    assert ddpm.config.diffusion == Diffusion(variance="fixed_small")
    use_our_table(library, scheduler, ddpm)

    def options(noise):
        return {"eta": eta, "use_clipped_model_output": True} | (
            {"variance_noise": noise} if eta else {}
        )

    expected = walk(library, unet, scheduler, x_T, 50, noises(keys, ddpm), options)
    chain = strided(ddpm.schedule, samplers.time_grid(1000, 50, "leading"))

    @jax.jit
    def ours(params, x_T):
        return samplers.ddim(
            *(chain, lambda x, t: ddpm.denoise(params, x, t), keys, ddpm.image_shape),
            prediction="eps",
            variance="fixed_small",
            eta=eta,
            x_T=x_T,
            trajectory=True,
        )

    x_0, xs = ours(params, x_T)
    worst = errors(xs, expected).max()
    print(f"DDIM, eta {eta}: {worst:.2g}, the image {error(x_0, expected[-1]):.2g}")
    assert errors(xs, expected).max() < 2e-5
    images = ddpm.sample(
        params, jax.random.key(0), 3, sampler="ddim", steps=50, eta=eta, grid="leading"
    )
    np.testing.assert_allclose(images, np.clip(expected[-1], -1, 1), atol=1e-4)


@pytest.mark.parametrize(
    "variance", ["fixed_small", "fixed_large", "fixed_small_log", "learned_range"]
)
def test_an_ancestral_trajectory_is_the_librarys(library, tmp_path, variance):
    fields = {"variance_type": variance, "clip_sample": variance != "fixed_large"}
    scheduler = library.diffusers.DDPMScheduler(100, beta_start=0.001, beta_end=0.2, **fields)
    outputs = 6 if variance == "learned_range" else 3
    unet, ddpm, params, keys, x_T = make_chain(library, tmp_path, scheduler, out_channels=outputs)
    diffusion = ddpm.config.diffusion
    assert diffusion.variance == variance.removesuffix("_log") and diffusion.clip == (
        variance != "fixed_large"
    )
    use_our_table(library, scheduler, ddpm)
    expected = walk(library, unet, scheduler, x_T, 100, noises(keys, ddpm))

    @jax.jit
    def ours(params, x_T):
        return samplers.ancestral(
            *(ddpm.schedule, lambda x, t: ddpm.denoise(params, x, t), keys, ddpm.image_shape),
            prediction="eps",
            variance=diffusion.variance,
            clip=diffusion.clip,
            x_T=x_T,
            trajectory=True,
        )

    _, xs = ours(params, x_T)
    every = errors(xs, expected)
    print(f"ancestral, {variance}: {every.max():.2g}, the image {every[-1]:.2g}")
    assert errors(xs, expected).max() < 2e-5


def test_what_the_librarys_own_tables_cost(library, tmp_path):
    """Its float32 betas and their product: about 4e-5 of the image's range over T = 1000."""
    scheduler = library.diffusers.DDPMScheduler()
    unet, ddpm, params, keys, x_T = make_chain(
        library, tmp_path, scheduler, block_out_channels=[8], attention=[], norm_num_groups=4
    )
    expected = walk(library, unet, scheduler, x_T, 1000, noises(keys, ddpm))[-1]
    images = ddpm.sample(params, jax.random.key(0), 3)
    print(f"its own tables: {error(images, np.clip(expected, -1, 1)):.2g}")
    assert error(images, np.clip(expected, -1, 1)) < 2e-4


def test_its_pipeline_draws_the_same_picture_from_what_is_written(library, tmp_path, monkeypatch):
    config = Config(
        model=Model(8, (1, 2), 1, (4,), 0.1, 4),
        diffusion=Diffusion(
            num_timesteps=20, beta_start=0.005, beta_end=0.5, prediction="v", schedule="quad"
        ),
        data=Data(source="array", image_shape=(8, 8, 3)),
    )
    ddpm = DDPM(config)
    shapes, rng = jax.eval_shape(ddpm.init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    write_diffusers(tmp_path, config, params)
    pipeline = library.diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)

    keys = samplers.example_keys(jax.random.key(7), np.arange(2, dtype=np.uint32))
    draws = [samplers.START, *range(19, 0, -1)]
    noise = iter(
        [to_torch(library, samplers.gaussian_noise(keys, t, ddpm.image_shape)) for t in draws]
    )
    for module in ("schedulers.scheduling_ddpm", "pipelines.ddpm.pipeline_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(noise))
    expected = pipeline(batch_size=2, num_inference_steps=20, output_type="np").images
    assert next(noise, None) is None
    images = ddpm.sample(params, jax.random.key(7), 2)
    print(f"the pipeline: {np.abs((images + 1) / 2 - expected).max():.2g}")
    np.testing.assert_allclose((images + 1) / 2, expected, atol=1e-4)
    levels = np.int32(to_uint8(images)) - np.rint(expected * 255).astype(np.int32)
    assert np.abs(levels).max() <= 1 and expected.std() > 0.1

    # And what the library then saves is again what we had, to the bit: whole or in shards.
    for size in ("5GB", "20KB"):
        pipeline.unet.save_pretrained(tmp_path / size / "unet", max_shard_size=size)
        pipeline.scheduler.save_pretrained(tmp_path / size / "scheduler")
        again, found = read_diffusers(tmp_path / size)
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, found, params)
    assert len(list((tmp_path / "20KB/unet").glob("*-of-*.safetensors"))) > 2


CLASSED = {"sample_size": 8, "block_out_channels": [16, 32], "attention": [1]}
CLASSED |= {"norm_num_groups": 8, "layers_per_block": 1, "num_class_embeds": 5}


def outputs_of(library, unet, x, t, rows):
    """The library's output for rows of its class embedding, and that in float64."""
    images, labels = to_torch(library, x), library.torch.from_numpy(np.array(rows, np.int64))
    steps = library.torch.from_numpy(t)
    with library.torch.no_grad():
        expected = of_torch(unet(images, steps, labels).sample)
        exact = of_torch(unet.double()(images.double(), steps, labels).sample)
    unet.float()
    return expected, exact


def mark(folder):
    """Says that the last row of the pipeline's class embedding is that of no class."""
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"no_class_row": True}))


@pytest.mark.parametrize("marked", [False, True])
def test_outputs_with_classes_are_the_librarys(library, tmp_path, marked):
    """Read, and what is written of that read again by the library."""
    unet = make_unet(library, **CLASSED)
    pipeline = library.diffusers.DDPMPipeline(unet, library.diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    if marked:
        mark(tmp_path)
    ddpm, params = load(tmp_path)
    model = ddpm.config.model
    assert (model.num_classes, model.no_class) == (5 - marked, marked)

    labels, rows = np.int32([3, 0, 1, 2]), [3, 0, 1, 2]
    if marked:
        labels, rows = np.int32([3, -1, 0, -1]), [3, 4, 0, 4]
    t = np.array([0, 1, 500, 999], np.int32)
    x = np.random.default_rng(0).standard_normal((4, *ddpm.image_shape), np.float32)
    found = jax.jit(ddpm.denoise)(params, x, t, labels)
    expected, exact = outputs_of(library, unet, x, t, rows)
    print(f"classes: {error(found, expected):.2g}, from float64 {error(found, exact):.2g}")
    assert error(found, exact) < 5e-6 and error(found, expected) < 1e-5
    other, _ = outputs_of(library, unet, x, t, np.roll(rows, 1))
    assert error(other, expected) > 0.01  # The classes are seen.

    write_diffusers(tmp_path / "ours", ddpm.config, params)
    theirs = library.diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").unet.eval()
    again, _ = outputs_of(library, theirs, x, t, rows)
    np.testing.assert_array_equal(again, expected)
    # The library keeps our marker in what it saves.
    theirs.save_pretrained(tmp_path / "saved")
    config, kept = read_diffusers(tmp_path / "saved")
    assert config.model == model
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, params))


def test_its_pipeline_gives_no_labels(library, tmp_path):
    """This is why a warning is logged where a model with classes is written."""
    unet = make_unet(library, **CLASSED)
    pipeline = library.diffusers.DDPMPipeline(unet, library.diffusers.DDPMScheduler(10))
    with pytest.raises(ValueError, match="class_labels should be provided"):
        pipeline(num_inference_steps=1)


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_its_other_embeddings_of_classes_are_refused(library, tmp_path, kind):
    unet = make_unet(library, **(CLASSED | {"class_embed_type": kind}))
    unet.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f'class_embed_type is "{kind}"; it must be null'):
        read_diffusers(tmp_path)


def test_a_guided_chain_is_that_of_the_librarys_network(library, tmp_path):
    """Two calls of its U-Net, put together here, with its scheduler."""
    scheduler = library.diffusers.DDIMScheduler()
    unet, _, _, keys, x_T = make_chain(library, tmp_path, scheduler, num_class_embeds=5)
    mark(tmp_path)
    ddpm, params = load(tmp_path)
    use_our_table(library, scheduler, ddpm)

    def guided(x, t):
        of_label, of_none = (
            unet(x, t, library.torch.tensor(rows)).sample for rows in ([2, 0, 3], [4, 4, 4])
        )
        return types.SimpleNamespace(sample=of_none + 3 * (of_label - of_none))

    options = {"eta": 0.0, "use_clipped_model_output": True}
    noise_at = noises(keys, ddpm)
    expected = walk(library, guided, scheduler, x_T, 20, noise_at, lambda noise: options)[-1]
    images = ddpm.sample(
        params,
        jax.random.key(0),
        3,
        labels=[2, 0, 3],
        guidance=3,
        sampler="ddim",
        steps=20,
        grid="leading",
    )
    print(f"guided: {error(images, np.clip(expected, -1, 1)):.2g}")
    np.testing.assert_allclose(images, np.clip(expected, -1, 1), atol=1e-4)


def test_its_old_attention_names_are_read(library, tmp_path):
    unet = make_unet(library, [0], sample_size=8, block_out_channels=[8], norm_num_groups=4)
    unet.save_pretrained(tmp_path / "new")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = unet.state_dict()
    for name in [name for name in tensors if ".attentions." in name]:
        for new_layer, old_layer in old.items():
            if new_layer in name:
                tensors[name.replace(new_layer, old_layer)] = tensors.pop(name)
    unet.save_config(tmp_path / "old")
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "old/diffusion_pytorch_model.safetensors")
    theirs = library.diffusers.UNet2DModel.from_pretrained(
        tmp_path / "old"
    )  # The library knows them too.
    for name, tensor in theirs.state_dict().items():
        assert library.torch.equal(tensor, unet.state_dict()[name])
    jax.tree.map(
        np.testing.assert_array_equal,
        read_diffusers(tmp_path / "old")[1],
        read_diffusers(tmp_path / "new")[1],
    )


@pytest.mark.parametrize("name", ["UNet2DModel", *SCHEDULERS])
def test_the_defaults_of_absent_fields_are_the_librarys(library, name):
    signature = inspect.signature(getattr(library.diffusers, name).__init__)
    defaults = {
        field: value.default for field, value in signature.parameters.items() if field != "self"
    }
    assert json.loads(json.dumps(defaults)) == (UNET if name == "UNet2DModel" else SCHEDULERS[name])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Its own.
@pytest.mark.parametrize(
    "name",
    ["PNDMScheduler", "LMSDiscreteScheduler", "ScoreSdeVeScheduler", "UniPCMultistepScheduler"],
)
def test_its_other_schedulers_are_refused(library, tmp_path, name):
    unet = make_unet(library, [], sample_size=8, block_out_channels=[8], norm_num_groups=4)
    unet.save_pretrained(tmp_path)
    getattr(library.diffusers, name)().save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=f'scheduler_config.json: _class_name is "{name}"; it must be DDPMScheduler or',
    ):
        read_diffusers(tmp_path)


def test_why_two_of_its_variances_are_refused(library):
    scheduler = library.diffusers.DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(1000)
    assert (scheduler._get_variance(500) ** 0.5).isnan()
    scheduler = library.diffusers.DDPMScheduler(variance_type="learned")
    scheduler.set_timesteps(1000)
    output = library.torch.full((1, 3, 2, 2), 0.25)
    assert scheduler._get_variance(500, output) is output  # The variance, and not its logarithm.


def test_its_pickle_is_converted_to_the_same_weights(library, tmp_path):
    unet = make_unet(library, norm_num_groups=4, **NETWORKS["one level"])
    unet.save_pretrained(tmp_path / "safe")
    unet.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match=r"convert_bin\.py"):
        read_diffusers(tmp_path / "pickled")
    script = Path(__file__).parent.parent / "scripts/convert_bin.py"
    runpy.run_path(str(script))["main"](tmp_path / "pickled")
    one, other = (read_diffusers(tmp_path / name)[1] for name in ("safe", "pickled"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(library, tmp_path):
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return ran.touch, ()

    library.torch.save({"a": Code()}, tmp_path / "diffusion_pytorch_model.bin")
    script = Path(__file__).parent.parent / "scripts/convert_bin.py"
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        runpy.run_path(str(script))["main"](tmp_path)
    assert not ran.exists()
