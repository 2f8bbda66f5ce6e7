"""InceptionV3 against a loop, torch-fidelity's own module, and files that are not its weights."""

import hashlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fidelity import fidelity

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.models import inception_features, preprocess
from ddpm_jax.models.inception import Inception, inception_shapes

SCRIPT = Path(__file__).parent.parent / "scripts/convert_inception.py"


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 20, 3), (299, 300, 3), (400, 299, 1)])
def test_images_are_resized_as_by_tensorflow_1(rng, shape):
    images = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    out = np.asarray(preprocess(images))
    assert out.shape == (2, 299, 299, 3) and out.dtype == np.float32
    H, W, C = shape
    for i, j in rng.integers(0, 299, (20, 2)).tolist() + [[0, 0], [298, 298]]:
        y, x = i * H / 299, j * W / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
        p = images.astype(float)
        upper = p[:, top, left] * (1 - x + left) + p[:, top, right] * (x - left)
        lower = p[:, bottom, left] * (1 - x + left) + p[:, bottom, right] * (x - left)
        expected = (upper * (1 - y + top) + lower * (y - top) - 128) / 128
        np.testing.assert_allclose(
            out[:, i, j], np.broadcast_to(expected, (2, 3)), atol=1e-4, err_msg=f"{i} {j}"
        )
        assert C == 3 or len(np.unique(out[0, i, j])) == 1


def test_an_image_of_the_networks_own_size_is_left_as_it_is(rng):
    images = rng.integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess(images), (images.astype(np.float32) - 128) / 128)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 2), np.uint8), np.zeros((1, 8, 8, 3), np.float32)]
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        preprocess(images)


def state_dict(shapes):
    """Random tensors of a PyTorch state dict by name, such that activations keep their size."""
    rng, state = np.random.default_rng(0), {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        *path, last = (key.key for key in keys)
        if last == "fc":
            state |= {
                "fc.weight": rng.normal(0, 0.02, leaf.shape[::-1]),
                "fc.bias": rng.normal(size=leaf.shape[1:]),
            }
        elif last == "kernel":
            h, w, before, after = leaf.shape
            he = np.sqrt(2 / (h * w * before))
            state[".".join([*path, "conv.weight"])] = rng.normal(0, he, (after, before, h, w))
        else:
            name = {
                "scale": "weight",
                "bias": "bias",
                "mean": "running_mean",
                "variance": "running_var",
            }[last]
            draw = (
                rng.uniform(0.5, 1.5, leaf.shape)
                if last in ("scale", "variance")
                else rng.normal(0, 0.1, leaf.shape)
            )
            state[".".join([*path, "bn", name])] = draw
    return {name: np.float32(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def shapes():
    return inception_shapes()


@pytest.fixture(scope="module")
def state(shapes):
    return state_dict(shapes)


def test_the_network_has_the_number_of_parameters_it_shall_have(shapes):
    """21,785,568 without the last layer, moments of 17,216 channels, 2048 x 1008 in the last."""
    moments = 2 * sum(
        leaf.size
        for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
        if keys[-1].key == "mean"
    )
    assert moments == 2 * 17_216
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) - moments - 2048 * 1008 == 21_785_568


def test_weights_come_from_npz_and_safetensors(state, tmp_path):
    from safetensors.numpy import save_file

    extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(7)}
    np.savez(tmp_path / "a.npz", **state, **extra)
    save_file(state | extra, tmp_path / "a.safetensors")
    a, b = load_inception(tmp_path / "a.npz"), load_inception(str(tmp_path / "a.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    kernel = a["Mixed_6b"]["branch7x7_2"]["kernel"]
    np.testing.assert_array_equal(
        kernel[0, 5, 3, 2], state["Mixed_6b.branch7x7_2.conv.weight"][2, 3, 0, 5]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("Mixed_7c.branch_pool.bn.running_var"),
            "Mixed_7c.branch_pool.bn.running_var is missing",
        ),
        (
            lambda s: s.update({"AuxLogits.fc.bias": s["fc.bias"], "b": s["fc.bias"]}),
            r"AuxLogits.fc.bias \(and 1 more",
        ),
        (
            lambda s: s.update({"fc.weight": s["fc.weight"][:1000]}),
            r"fc.weight is float32 \[1000, 2048\].*\[1008, 2048",
        ),
        (lambda s: s.update({"fc.weight": s["fc.weight"].astype(int)}), "fc.weight is int64"),
    ],
)
def test_other_networks_weights_are_named(state, tmp_path, monkeypatch, change, words):
    state = dict(state)
    change(state)
    (tmp_path / "a.npz").write_bytes(b"")
    monkeypatch.setitem(
        sys.modules["ddpm_jax.evaluation.inception_weights"]._READERS, ".npz", lambda content: state
    )
    with pytest.raises(UserError, match=words) as caught:
        load_inception(tmp_path / "a.npz")
    assert "\n" not in str(caught.value) and "a.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pth", b"", "convert_inception.py"),
        ("a.pkl", b"", "convert_inception.py"),
        ("a.safetensors", b"no", "is not a .safetensors file"),
        ("a.npz", b"no", "is not a .npz file"),
        ("a.npz", None, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_inception(tmp_path / name)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([None]))
    with pytest.raises(UserError, match="plain arrays"):
        load_inception(tmp_path / "a.npz")


def convert(source, target):
    return subprocess.run([sys.executable, SCRIPT, source, target], capture_output=True, text=True)


def refusal(source, target):
    """What the script raises, without the seconds of starting it."""
    with pytest.raises(UserError) as caught:
        runpy.run_path(str(SCRIPT))["main"](source, target)
    return str(caught.value)


@pytest.fixture(scope="module")
def pth(state, tmp_path_factory):
    """A PyTorch file of the random weights, with what torch adds to it."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    tensors = {name: torch.from_numpy(tensor) for name, tensor in state.items()}
    torch.save(tensors | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(3)}, path)
    return path


@pytest.mark.interop
def test_every_layer_is_torch_fidelitys(pth, tmp_path, rng):
    """From the .pth file through the script and `load_inception`, to 1e-4 of each layer's size."""
    module = fidelity("feature_extractor_inceptionv3")
    import torch

    target = tmp_path / "inception.safetensors"
    done = convert(pth, target)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(target.read_bytes()).hexdigest() in done.stdout
    params = load_inception(target)

    wanted = ["2048", "logits_unbiased"]
    network = module.FeatureExtractorInceptionV3(
        "inception", wanted, feature_extractor_weights_path=str(pth)
    )
    theirs = {}
    for name, child in network.named_children():
        child.register_forward_hook(
            lambda _, __, out, name=name: theirs.update({name: out.numpy()})
        )
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        features, logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))

    apply = jax.jit(
        lambda p, x: Inception().apply({"params": p}, preprocess(x), capture_intermediates=True)
    )
    ours, found = apply(params, images)
    found = {
        name: out["__call__"][0]
        for name, out in found["intermediates"].items()
        if name != "__call__"
    }
    assert len(found) == 16 and set(theirs) - set(found) == {"MaxPool_1", "MaxPool_2", "AvgPool"}
    for name, out in found.items():
        close(out, theirs[name].transpose(0, 2, 3, 1), name)
    close(ours[0], features.numpy(), "features")
    close(ours[1], logits.numpy(), "logits")
    again = inception_features(params, images)
    close(again[0], features.numpy(), "features of the whole")
    close(again[1], logits.numpy(), "logits of the whole")


def close(ours, theirs, name):
    """Largest difference below 1e-4 of the root mean square."""
    error = np.abs(np.asarray(ours) - theirs).max() / np.sqrt(np.square(theirs).mean())
    print(f"{name}: {error:.1e}")
    assert error < 1e-4, name


@pytest.mark.interop
def test_the_resize_is_torch_fidelitys(rng):
    other = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    import torch

    for shape in ((32, 32), (400, 77)):
        images = rng.integers(0, 256, (1, *shape, 3), dtype=np.uint8)
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
        theirs = (
            other(x, (299, 299), align_corners=False).numpy().transpose(0, 2, 3, 1) - 128
        ) / 128
        np.testing.assert_allclose(preprocess(images), theirs, atol=1e-6)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # Old files have it.
def test_the_converter_refuses_in_one_line(state, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    torch.save(
        {name: torch.from_numpy(tensor) for name, tensor in list(state.items())[:4]},
        tmp_path / "part.pth",
    )
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pkl")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    for name, words in {
        "script.pt": "TorchScript",
        "part.pth": "is missing",
        "list.pth": "not a state dict",
        "module.pkl": "cannot read it as plain weights",
        "noise.pth": "cannot read it as plain weights",
        "absent.pth": "no such file",
    }.items():
        line = refusal(tmp_path / name, tmp_path / "out.safetensors")
        assert "\n" not in line and re.search(words, line), (name, line)
    assert "name it OUT.safetensors" in refusal(tmp_path / "part.pth", tmp_path / "out.npz")
    done = convert(tmp_path / "script.pt", tmp_path / "out.safetensors")
    # Libraries may write lines of their own before.
    assert done.returncode == 2 and "TorchScript" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
