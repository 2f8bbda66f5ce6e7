"""Randomness: every number that a key is folded with, and the draws of one example.

Keys are threefry keys and come from `fold_in` alone, never from a split that is carried along.
Numbers of one family are folded into the same key, so they must differ; counters that share the
key are named beside them.

Every draw states its dtype: it is the same with and without jax's 64-bit mode.
"""

import jax
import jax.numpy as jnp

from ddpm_jax.errors import UserError
from ddpm_jax.shapes import AnyKey, AnyKeys, Array, Bool, Float32, Int32, Integer, Shaped

MAKE_KEY = 'jax.random.key(seed, impl="threefry2x32")'
"""How users make a key that every method takes, whatever jax's default is."""

# Folded into the key of a run's seed, beside the numbers of its updates 0, 1, ...
INIT = 2**32 - 1
"""Fresh parameters."""
SAMPLES = 2**32 - 2
"""The sample grids of training."""
HOLDOUT = 2**32 - 3
"""The noise of the held-out loss."""
WATCHED_SAMPLES = 2**32 - 4
"""The samples that a run is evaluated by as it trains."""
WATCHED_BOUND = 2**32 - 5
"""The noise of the bits/dim that it measures then."""

# Folded into the key of one example of an update.
TIME = 0
NOISE = 1
DROPOUT = 2
FLIP = 3
LABEL = 4

# Folded into the key of one image, beside the original steps t = 0, 1, ...
START = 2**32 - 1
"""x_T, or the noise that an image is diffused with before a chain starts from it."""
INPAINT = 2**32 - 2
"""The key of an inpainted image, whose numbers are two for each position of its walk."""

CODEC = 2**32 - 3
"""The key of a compressed image, whose numbers are the steps t; and of what all images share."""

# Folded into the key of a step that compressed images share.
CANDIDATES = 0
"""The row of normals whose windows are the candidates."""
ARRIVALS = 1
"""The arrival times of the candidates."""
ORDER = 2
"""The order of an image's dimensions."""

# Folded into the key of a figure's seed, beside its images 0, 1, ...
WAY_BACK = 2
"""Interpolation, which has two images: the noise of the way back."""
SHARED = 2**31
"""Samples that share a latent."""

# Folded into the key of a seed, whose images 0, 1, ... `sample` draws; CODEC is another.
TUNING = 2**32 - 1
"""The key of the starts that `tune` compares grids on."""

# Beside the epochs 0, 1, ... in a Philox generator of a seed: orders of images are drawn by NumPy.
PROXY_SPLIT = 2**32 - 1
"""The images that the proxy holds out."""

FAMILIES = {
    "run": (INIT, SAMPLES, HOLDOUT, WATCHED_SAMPLES, WATCHED_BOUND),
    "example": (TIME, NOISE, DROPOUT, FLIP, LABEL),
    "image": (START, INPAINT, CODEC),
    "step": (CANDIDATES, ARRIVALS, ORDER),
    "figure": (WAY_BACK, SHARED),
    "tune": (TUNING, CODEC),
    "order": (PROXY_SPLIT,),
}
"""The numbers by the key that they are folded into."""


def seed_key(seed: int) -> AnyKey:
    """The key of `seed`, threefry2x32 whatever jax's default implementation is.

    Raises UserError unless 0 <= seed < 2**32, or where `check_threefry` does.
    """
    check_threefry()
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be at least 0 and below 2**32, got {seed}")
    return jax.random.key(seed, impl="threefry2x32")


def check_threefry() -> None:
    """Raises UserError where jax is set to draw other numbers from a key."""
    # jax adds its options as attributes at run time. A program is traced anew when this changes.
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        raise UserError(
            "jax_threefry_partitionable: it is off, and a key would give other images; turn it on, "
            "or leave JAX_THREEFRY_PARTITIONABLE unset"
        )


def example_keys(rng: AnyKey, indices: Integer[Array, " b"]) -> AnyKeys:
    """fold_in(rng, i) for each of `indices`.

    Raises ValueError if `rng` is not a threefry key: draws of the others depend on the batch; and
    UserError where `check_threefry` does.
    """
    check_threefry()
    implementation = jax.random.key_impl(rng)
    if "threefry" not in str(implementation):
        raise ValueError(f"rng: must be a threefry key, got {implementation}; use {MAKE_KEY}")
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(indices)


def fold(keys: AnyKeys, number: int) -> AnyKeys:
    """fold_in(key, number) for each of `keys`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def gaussian_noise(
    keys: AnyKeys, number: int | Integer[Array, ""], shape: tuple[int, ...]
) -> Float32[jax.Array, "b *shape"]:
    """N(0, I) of `shape` for each of `keys`: each example's from its own fold_in(key, number)."""
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
    )(keys)


def random_times(keys: AnyKeys, num_timesteps: int) -> Int32[jax.Array, " b"]:
    """t, uniform in 0, ..., T - 1, from `keys` of examples."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps, jnp.int32))(
        fold(keys, TIME)
    )


def happens(
    keys: AnyKeys, probability: float, shape: tuple[int, ...]
) -> Bool[jax.Array, "b *shape"]:
    """True with `probability`, of `shape` for each of `keys`."""
    p = jnp.float32(probability)
    return jax.vmap(lambda key: jax.random.bernoulli(key, p, shape))(keys)


def random_flip(keys: AnyKeys, images: Shaped[Array, "b h w c"]) -> Shaped[jax.Array, "b h w c"]:
    """Images, each mirrored left to right with probability 1/2 by its own key."""
    flip = happens(fold(keys, FLIP), 0.5, ())
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
