"""How far one set of images is from another, from arrays of their features [N,D] alone.

All is computed in float64 by NumPy, in blocks that bound the memory. Features may be of any real type.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Rows that are worked on at a time.
BLOCK = 2048


class Statistics(NamedTuple):
    """What FID needs to know of a set of images."""

    mean: np.ndarray
    """[D] float64."""
    covariance: np.ndarray
    """[D,D] float64, unbiased."""
    count: int
    """Images."""


class InceptionScore(NamedTuple):
    """The inception score over splits of the images."""

    mean: float
    std: float
    """Over the splits: the spread of a split's score and not the error of the mean; what papers write behind +-."""


class KernelDistance(NamedTuple):
    """The kernel distance (KID) over random subsets."""

    mean: float
    error: float
    """Estimated standard error of the mean; it covers the choice of subsets and that of the images."""
    subset_std: float
    """Over the subsets: the spread of one subset's distance, what others print behind +-."""


class PrecisionRecall(NamedTuple):
    """Improved precision and recall."""

    precision: float
    recall: float
    precision_error: float
    """Binomial standard error: a lower bound."""
    recall_error: float
    """Binomial standard error: a lower bound."""


class _Moments(NamedTuple):
    count: int
    mean: np.ndarray
    scatter: np.ndarray  # [D,D]: sum of (x - mean)(x - mean)^T.


def statistics(features: np.ndarray | Iterable[np.ndarray]) -> Statistics:
    """Mean and unbiased covariance of `features` [N,D], or of all rows of an iterable of blocks [n,D].

    Only one block lies there in float64 at a time. Raises ValueError for fewer than 2 rows, other shapes, or a number
    that is not finite.
    """
    return _as_statistics(functools.reduce(_join, map(_moments, _blocks(features)), None))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): FID (Heusel et al. 2017, Eq. 6) of two sets of features.

    Covariances may be singular: with C_b = R R^T the trace is the sum of the roots of the eigenvalues of the symmetric
    R^T C_a R, and the zeros that a count below D makes are left out by their number. Raises ValueError if D differs.
    """
    return _distance(a, b, _root(b))


def fid_error(
    features: np.ndarray | Iterable[np.ndarray], reference: Statistics, groups: int = 10
) -> float:
    """Standard error of frechet_distance(statistics(features), reference), by a delete-one-group jackknife.

    Row i of `features` (as for `statistics`) is of group i % groups. This is the scatter that other images of the
    same sampler would give. It holds nothing of the bias, by which FID is too large for any finite number of images
    (the same for all who use as many), and nothing of the choice of the reference. From 10 groups it is itself known
    to a quarter. Raises ValueError for fewer than 2 groups, or than 2 images besides a group's.
    """
    if groups < 2:
        raise ValueError(f"groups: at least 2 are needed, got {groups}")
    parts, offset = [None] * groups, 0
    for block in _blocks(features):
        for group in range(groups):
            rows = block[(group - offset) % groups :: groups]
            if len(rows):
                parts[group] = _join(parts[group], _moments(rows))
        offset += len(block)
    if offset < groups:
        raise ValueError(f"features: {offset} images cannot be divided into {groups} groups")
    total, root = functools.reduce(_join, parts), _root(reference)
    left = [_distance(_as_statistics(_without(total, part)), reference, root) for part in parts]
    return float(np.sqrt((groups - 1) * np.var(left)))


def inception_score(logits: np.ndarray, splits: int = 10) -> InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)) of each of `splits` runs of rows (Salimans et al. 2016, Section 4).

    `logits` [N,K]. All rows count: the splits differ by one where `splits` does not divide N. Between 1 and K.
    Raises ValueError for fewer rows than splits, other shapes, or a number that is not finite.
    """
    _check(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits: must be from 1 to the {len(logits)} images, got {splits}")
    scores = [
        _score(np.float64(logits[i * len(logits) // splits : (i + 1) * len(logits) // splits]))
        for i in range(splits)
    ]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID (Binkowski et al. 2018, Section 4): the unbiased squared MMD of x [N,D] and y [M,D], kernel (x.y / D + 1)^3.

    The mean over `subsets` pairs of subsets of `subset_size` rows, drawn without replacement from `seed`; of sets of
    fewer than 2 subset_size the subsets have half the smaller one's rows, so that they differ. It may be negative. Its
    error takes the variance to fall as 1 / rows, which is too careful where x and y hardly differ.
    Raises ValueError for sets of fewer than 4, other shapes, or a number that is not finite.
    """
    _check(x)
    _check(y, x.shape[1])
    rows = min(len(x), len(y))
    size = min(subset_size, rows // 2)
    if size < 2 or subsets < 2:
        raise ValueError(
            f"at least 4 images of each set, 2 subsets and 2 rows of each are needed, got {rows} images, "
            f"{subsets} subsets and {subset_size} rows"
        )
    values = [
        _mmd(x[_subset(seed, 2 * i, len(x), size)], y[_subset(seed, 2 * i + 1, len(y), size)])
        for i in range(subsets)
    ]
    # Subsets of one finite set vary less than those of fresh images, by 1 - size / rows.
    std = float(np.std(values, ddof=1))
    fresh = std**2 / (1 - size / rows)
    return KernelDistance(
        float(np.mean(values)), float(np.sqrt(fresh * size / rows + std**2 / subsets)), std
    )


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1 and 2) of reference [N,D] and samples [M,D].

    Precision is the part of the samples in at least one of the balls around the reference's rows, each reaching to the
    k-th nearest other row; recall the part of the reference in the samples' balls. The errors are binomial: those of
    so many independent images, the balls taken as they are. What other balls would change comes on top.
    |x - y|^2 is made of |x|^2 + |y|^2 - 2 x.y in float64. Rows that are nearer to each other than a millionth of their
    length count as the same, as rounding may make of one image in two batches. Both depend on N and M: compare only
    equal ones. Raises ValueError if a set has no more than k rows, for other shapes, or a number that is not finite.
    """
    _check(reference)
    _check(samples, reference.shape[1])
    if not 1 <= k < min(len(reference), len(samples)):
        raise ValueError(
            f"k: must be from 1 to less than the images of each set, got {k} for {len(reference)} "
            f"and {len(samples)} images"
        )
    precision, recall = (covered.mean() for covered in _covered(samples, reference, k))
    errors = [
        np.sqrt(p * (1 - p) / n) for p, n in ((precision, len(samples)), (recall, len(reference)))
    ]
    return PrecisionRecall(float(precision), float(recall), *map(float, errors))


def _check(features, dim=None) -> None:
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        wanted = "[N,D]" if dim is None else f"[N,{dim}]"
        raise ValueError(f"features: {wanted} is needed, got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError("features: there are numbers that are not finite")


def _blocks(features):
    """Blocks [n,D] float64 of an array or an iterable of arrays."""
    dim = None
    for block in _slices(features) if hasattr(features, "shape") else features:
        _check(block, dim)
        dim = block.shape[1]
        if len(block):
            yield np.float64(block)


def _slices(features):
    _check(features)
    yield from (features[part] for part in _parts(features))


def _moments(block) -> _Moments:
    mean = block.mean(axis=0)
    centred = block - mean
    return _Moments(len(block), mean, centred.T @ centred)


def _join(a: _Moments | None, b: _Moments) -> _Moments:
    """The moments of two sets together (Chan et al. 1983): sums of squares would cancel where the mean is large."""
    if a is None:
        return b
    count, shift = a.count + b.count, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return _Moments(count, a.mean + shift * (b.count / count), scatter)


def _without(total: _Moments, part: _Moments) -> _Moments:
    """What is left of `total` without `part`: _join read backwards."""
    count = total.count - part.count
    if not count:
        return _Moments(0, total.mean, total.scatter)
    mean = total.mean + (total.mean - part.mean) * (part.count / count)
    shift = part.mean - mean
    scatter = (
        total.scatter - part.scatter - np.outer(shift, shift) * (count * part.count / total.count)
    )
    return _Moments(count, mean, scatter)


def _as_statistics(moments: _Moments | None) -> Statistics:
    count = 0 if moments is None else moments.count
    if count < 2:
        raise ValueError(f"features: a covariance needs at least 2 images, got {count}")
    return Statistics(moments.mean, moments.scatter / (count - 1), count)


def _root(b: Statistics) -> np.ndarray:
    """R [D,r] with R R^T = C_b, r its rank at most."""
    values, vectors = np.linalg.eigh(b.covariance)
    rank = min(b.count - 1, len(values))
    return vectors[:, -rank:] * np.sqrt(np.maximum(values[-rank:], 0))


def _distance(a: Statistics, b: Statistics, root: np.ndarray) -> float:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared"
        )
    rank = min(a.count - 1, root.shape[1])
    # Zeros come out as +-1e-16 of the largest, and their roots as 1e-8.
    values = np.linalg.eigvalsh(root.T @ a.covariance @ root)[-rank:]
    trace = (
        np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    )
    return float(max(np.square(a.mean - b.mean).sum() + trace, 0.0))


def _score(logits) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # p log p(y) is 0 for a class that no image has, and log 0 times 0 is not.
    marginal = p.mean(axis=0)
    entropy = -(marginal[marginal > 0] * np.log(marginal[marginal > 0])).sum()
    return float(np.exp((p * log_p).sum(axis=1).mean() + entropy))


def _subset(seed: int, number: int, n: int, size: int) -> np.ndarray:
    # NumPy promises that a bit generator's stream never changes, and promises it of nothing above it.
    return np.argsort(np.random.Philox(key=[seed, number]).random_raw(n), kind="stable")[:size]


def _mmd(x, y) -> float:
    """The unbiased squared MMD of x [m,D] and y [m,D]."""
    x, y, m = np.float64(x), np.float64(y), len(x)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()


def _squared_radii(features, k: int) -> np.ndarray:
    """The squared distance [N] of each row of features [N,D] to the k-th nearest other one."""
    radii = []
    for rows in _parts(features):
        nearest = np.empty((rows.stop - rows.start, 0))
        for columns in _parts(features):
            squared = _squared_distances(features[rows], features[columns])
            if rows == columns:
                np.fill_diagonal(squared, np.inf)
            nearest = np.concatenate([nearest, squared], axis=1)
            nearest = (
                np.partition(nearest, k - 1, axis=1)[:, :k] if nearest.shape[1] > k else nearest
            )
        radii.append(nearest.max(axis=1))
    return np.concatenate(radii)


def _covered(x, y, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(which rows of x lie in a ball around one of y's, which of y in one of x's): bool [N] and [M]."""
    x_radii, y_radii = _squared_radii(x, k), _squared_radii(y, k)
    x_covered, y_covered = np.zeros(len(x), bool), np.zeros(len(y), bool)
    for rows in _parts(x):
        for columns in _parts(y):
            squared = _squared_distances(x[rows], y[columns])
            x_covered[rows] |= (squared <= y_radii[None, columns]).any(axis=1)
            y_covered[columns] |= (squared <= x_radii[rows, None]).any(axis=0)
    return x_covered, y_covered


def _parts(features) -> list[slice]:
    n = len(features)
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _squared_distances(x, y):
    """float64 [n,m] of x [n,D] and y [m,D]."""
    x, y = np.float64(x), np.float64(y)
    lengths = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None]
    squared = lengths - 2 * (x @ y.T)
    return np.where(squared <= 1e-12 * lengths, 0.0, squared)
