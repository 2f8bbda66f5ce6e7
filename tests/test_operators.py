"""The operators against NumPy: by hand, and as dense matrices in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.operators import Operator, blur, downscale, grey, mask

KERNEL = np.array([[0.5, 0.2, 0.1], [0.1, 0.05, 0.05]])  # No symmetry, an even side.
SHAPE = (4, 4, 3)
KNOWN = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
SMALL = np.array([[1, 0], [1, 1]])
OPERATORS = {
    "downscale": downscale(2),
    "grey": grey(),
    "mask": mask(KNOWN),
    "blur": blur(KERNEL),
    # Of period 4, its second frequency is lost.
    "lossy blur": blur(np.array([[0.25, 0.5, 0.25]])),
    "nothing": downscale(1),
    "twice downscaled": downscale(2) @ downscale(2),
    "grey after downscale": grey() @ downscale(2),
    "downscale after grey": downscale(2) @ grey(),
    "mask after downscale": mask(SMALL) @ downscale(2),
    "blur after downscale": blur(np.array([[0.7, 0.3]])) @ downscale(2),
    "mask after grey": mask(KNOWN) @ grey(),
    "grey after mask": grey() @ mask(KNOWN),
    "blur after grey": blur(KERNEL) @ grey(),
    "grey after blur": grey() @ blur(KERNEL),
    "two masks": mask(KNOWN) @ mask(KNOWN.T),
    "two blurs": blur(KERNEL) @ blur(KERNEL.T),
    "all": mask(SMALL) @ downscale(2) @ grey(),
}


def dense(operator, shape=SHAPE):
    """A [pixels of y, pixels of x] in float64, from the images of the unit vectors."""
    n = np.prod(shape)
    return np.float64(operator.A(np.eye(n, dtype=np.float32).reshape(n, *shape))).reshape(n, -1).T


def rolled(x, kernel):
    """The circular convolution as a sum of shifted images."""
    rows, columns = kernel.shape
    return sum(
        kernel[i, j] * np.roll(x, (i - rows // 2, j - columns // 2), axis=(1, 2))
        for i, j in itertools.product(range(rows), range(columns))
    )


def test_each_operator_by_hand(rng):
    x = np.float32(rng.normal(size=(2, 6, 9, 3)))
    means = downscale(3).A(x)
    assert means.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(means[1, 1, 2, 0], x[1, 3:6, 6:9, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        downscale(3).solve(0.5, 0.1)(means), means / (0.5 / 9 + 0.1), rtol=1e-5
    )
    luma = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    np.testing.assert_allclose(grey().A(x), luma, rtol=1e-5, atol=1e-6)
    known = rng.random((2, 6, 9, 1)) > 0.5
    np.testing.assert_array_equal(mask(known).A(x), known * x)
    np.testing.assert_array_equal(mask(0.8 * known[0]).A(x), known[:1] * x)
    np.testing.assert_allclose(blur(KERNEL).A(x), rolled(x, KERNEL), atol=1e-5)
    np.testing.assert_allclose(downscale(1).A(x), x)


def test_a_composition_is_one_after_the_other(rng):
    x = np.float32(rng.normal(size=(2, *SHAPE)))
    parts = [downscale(2), grey(), mask(SMALL), blur(KERNEL[:, :2])]
    for after, before in ((1, 0), (0, 1), (2, 0), (3, 0), (3, 1)):
        whole = (parts[after] @ parts[before]).A(x)
        np.testing.assert_allclose(whole, parts[after].A(parts[before].A(x)), atol=1e-6)
    both = (mask(SMALL) @ downscale(2) @ grey()).A(x)
    np.testing.assert_allclose(both, mask(SMALL).A(downscale(2).A(grey().A(x))), atol=1e-6)
    np.testing.assert_allclose(OPERATORS["grey after mask"].A(x), grey().A(mask(KNOWN).A(x)))
    np.testing.assert_allclose(
        OPERATORS["two blurs"].A(x), rolled(rolled(x, KERNEL), KERNEL.T), atol=1e-6
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_the_pseudoinverse_and_the_inverse_of_the_covariance_of_y(rng, name):
    operator = OPERATORS[name]
    matrix = dense(operator)
    u = np.float32(rng.normal(size=(2, len(matrix))))
    y = u.reshape(operator.A(np.zeros((2, *SHAPE), np.float32)).shape)
    r2 = np.float32([0.3, 0.9])
    x, solved = jax.jit(
        lambda y, r2: (operator.pinv(y), operator.solve(r2.reshape(2, 1, 1, 1), 0.04)(y))
    )(y, r2)
    assert x.shape == (2, *SHAPE)
    expected = u @ np.linalg.pinv(matrix, rcond=1e-4).T
    np.testing.assert_allclose(x.reshape(2, -1), expected, rtol=1e-4, atol=1e-4)
    for i in range(2):
        covariance = r2[i] * matrix @ matrix.T + 0.04 * np.eye(len(matrix))
        expected = np.linalg.solve(covariance, u[i])
        np.testing.assert_allclose(solved[i].ravel(), expected, rtol=1e-4, atol=1e-4)


def test_frequencies_that_a_blur_hardly_leaves_are_dropped(rng):
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / 2.5) ** 2)
    operator = blur(np.outer(kernel, kernel) / kernel.sum() ** 2)
    x = np.float32(rng.normal(size=(1, 32, 32, 1)))
    y = operator.A(x)
    gain = np.abs(
        np.fft.fft2(operator.A(np.eye(1, 1024, dtype=np.float32).reshape(x.shape))[0, ..., 0])
    )
    assert (gain < 1e-6).mean() > 0.5 and not ((gain > 1e-6) & (gain < 0.999e-3)).any()
    np.testing.assert_allclose(operator.A(operator.pinv(y)), y, atol=1e-5)
    assert np.abs(operator.pinv(y)).max() < 10


@pytest.mark.parametrize(
    ("after", "before", "words"),
    [
        ("downscale", "mask", "downscale after mask"),
        ("downscale", "blur", "downscale after blur"),
        ("mask", "blur", "mask after blur"),
        ("blur", "mask", "blur after mask"),
        ("downscale", "mask after grey", "downscale after mask after grey"),
        ("blur", "mask after downscale", "blur after mask after downscale"),
        ("grey", "grey", "grey: an image is made grey once"),
        ("grey", "downscale after grey", "grey: an image is made grey once"),
    ],
)
def test_other_compositions_are_refused(after, before, words):
    with pytest.raises(UserError, match=words) as caught:
        OPERATORS[after] @ OPERATORS[before]
    assert "\n" not in str(caught.value)


def test_only_operators_are_composed():
    with pytest.raises(TypeError):
        grey() @ 3


@pytest.mark.parametrize(
    ("operator", "shape", "words"),
    [
        (downscale(3), (6, 4, 1), "downscale: images of 6 x 4 pixels .* 3 x 3; choose"),
        (downscale(2) @ downscale(2), (6, 4, 1), "6 x 4 pixels .* 4 x 4"),
        (grey(), (4, 4, 1), "grey: needs images of 3 channels, got 1"),
        (mask(KNOWN), (4, 5, 1), r"mask: has the shape \(1, 4, 4, 1\)"),
        (mask(np.ones((3, 4, 4, 1))), (4, 4, 1), "one for each image"),
        (mask(KNOWN) @ downscale(2), (4, 4, 1), r"\(2, 2, 2, 1\)"),
        (blur(np.ones((3, 5))), (4, 4, 1), r"blur: the kernel has the shape \(3, 5\), larger"),
    ],
)
def test_images_that_do_not_fit_are_one_line(operator, shape, words):
    with pytest.raises(UserError, match=words):
        operator.A(np.zeros((2, *shape), np.float32))


def test_a_coloured_y_is_no_grey_image():
    with pytest.raises(UserError, match="grey: needs a y of 1 channel, got 3"):
        grey().pinv(np.zeros((1, 4, 4, 3), np.float32))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: downscale(0), "downscale: the factor must be a whole number of at least 1, got 0"),
        (lambda: mask(np.ones((2, 4, 4, 3))), "mask: must have the shape"),
        (lambda: mask(np.ones(4)), "mask: must have the shape"),
        (lambda: blur(np.ones(4)), "blur: the kernel must be finite numbers"),
        (lambda: blur(np.zeros((2, 2))), "blur: the kernel must be finite numbers"),
        (lambda: blur(np.full((2, 2), np.nan)), "blur: the kernel must be finite numbers"),
    ],
)
def test_what_is_no_operator_is_one_line(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_operators_are_equal_and_hashable_by_their_content():
    assert downscale(4) == downscale(2) @ downscale(2) and grey() == grey()
    assert mask(KNOWN) == mask(KNOWN.astype(bool)) and blur(KERNEL) == blur(KERNEL.copy())
    different = {*OPERATORS.values(), mask(KNOWN[None, ..., None]), mask(KNOWN)}
    assert len(different) == len(OPERATORS) - 3  # Grey commutes with three others.
    assert grey() != downscale(2) and grey() != "grey"
    assert isinstance(grey(), Operator)
    with pytest.raises(AttributeError):
        grey().factor = 2


def test_a_program_takes_any_mask_and_any_operator_as_a_constant():
    traced = []

    @jax.jit
    def as_argument(operator, x):
        traced.append(operator)
        return operator.A(x)

    x = jnp.ones((2, *SHAPE))
    for known in (KNOWN, KNOWN.T):
        np.testing.assert_array_equal(as_argument(mask(known), x), mask(known).A(x))
    assert len(traced) == 1
    as_constant = jax.jit(lambda operator, x: operator.A(x), static_argnums=0)
    for _ in range(2):
        np.testing.assert_array_equal(as_constant(mask(KNOWN), x), mask(KNOWN).A(x))
    assert as_constant._cache_size() == 1
