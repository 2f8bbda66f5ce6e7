"""The codec with the model of clothes in examples/: perturbed, in another process, every prefix."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import load
from ddpm_jax.compression import Asked, compressed, decompress, network
from ddpm_jax.compression.plan import rmse_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples/fashion_mnist.safetensors"
IMAGES = ROOT.parent / "shared/data/fashion_mnist/t10k-images-idx3-ubyte.gz"
QUICK = {"group_bits": 6}

IN_ANOTHER = """
import sys, numpy
from pathlib import Path
from ddpm_jax import load
from ddpm_jax.compression import decompress
ddpm, params = load(sys.argv[1])[:2]
numpy.save(sys.argv[3], decompress(ddpm, params, Path(sys.argv[2]).read_bytes(), batch_size=3))
"""


@pytest.fixture(scope="module")
def clothes():
    return load(str(MODEL))[:2]


@pytest.fixture(scope="module")
def held_out():
    """The first 64 images of the test set."""
    if not IMAGES.exists():
        pytest.skip("Fashion-MNIST is not here")
    raw = gzip.decompress(IMAGES.read_bytes())
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28, 1)[:64]


@pytest.fixture(scope="module")
def exact(clothes, held_out):
    return compressed(*clothes, held_out[:8], Asked(**QUICK, lossless=True))


def off_by(monkeypatch, of_x):
    """All outputs of the network are off by 1e-5 times of_x(x_t)."""
    unchanged = network.chain_of

    def chain_of(*args):
        schedule, denoise_fn, options = unchanged(*args)

        def other(x_t, t):
            return denoise_fn(x_t, t) + jnp.float32(1e-5) * of_x(x_t)

        return schedule, other, options

    monkeypatch.setattr(network, "chain_of", chain_of)
    network._predicted.clear_cache()


@pytest.mark.parametrize("of_x", [jnp.ones_like, jnp.sign], ids=["up", "away"])
def test_a_network_that_is_off_a_little_gives_the_same(monkeypatch, clothes, held_out, exact, of_x):
    lossy = exact.data[: exact.ends[-2]]
    shown = decompress(*clothes, lossy)
    try:
        off_by(monkeypatch, of_x)
        np.testing.assert_array_equal(decompress(*clothes, exact.data), held_out[:8])
        found = decompress(*clothes, lossy)
        assert np.abs(found.astype(int) - shown).max() <= 1
    finally:
        network._predicted.clear_cache()


def test_another_process_gives_the_same_in_another_batch(clothes, held_out, exact, tmp_path):
    (tmp_path / "a.ddpm").write_bytes(exact.data)
    # One device and all of XLA's optimisations, which change the last digits.
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER, MODEL, tmp_path / "a.ddpm", tmp_path / "a.npy"],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), held_out[:8])


def test_the_error_never_rises_and_rmse_and_bits_are_kept(clothes, held_out):
    found = compressed(*clothes, held_out, Asked(**QUICK, rmse=20))
    means = found.rmse.mean(axis=1)
    assert (means[1:] <= 1.02 * np.minimum.accumulate(means)[:-1]).all()
    last = np.sqrt(np.square(found.rmse[-1]).mean())
    np.testing.assert_allclose(last, 20, rtol=0.08)
    # What the sender says of a prefix is what a receiver finds.
    end = found.ends[len(found.ends) // 2]
    shown = decompress(*clothes, found.data[: end + 1])
    np.testing.assert_allclose(
        rmse_of(shown, held_out), found.rmse[len(found.ends) // 2], atol=0.02
    )
    goal = 0.2
    few = compressed(*clothes, held_out[:16], Asked(**QUICK, bits_per_dim=goal))
    most = goal * held_out[:16].size
    assert 0.8 * most < 8 * len(few.data) <= most
