"""Distances between two sets of images, computed from arrays of their features [N,D].

Everything is NumPy in float64, in blocks that bound the memory. Features may have any real dtype.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Rows processed at a time.
BLOCK = 2048


class Statistics(NamedTuple):
    """The statistics of a set of images that FID is computed from."""

    mean: np.ndarray
    """[D] float64."""
    covariance: np.ndarray
    """[D,D] float64, unbiased."""
    count: int  # type: ignore[assignment] # no one counts a tuple
    """Number of images."""


class InceptionScore(NamedTuple):
    """The inception score over splits of the images."""

    mean: float
    std: float
    """Over the splits, as papers report after +-: the spread of one score, not the mean's error."""


class KernelDistance(NamedTuple):
    """The kernel distance (KID) over random subsets."""

    mean: float
    error: float
    """Estimated standard error of the mean, from the choice of both the subsets and the images."""
    subset_std: float
    """Over the subsets: the spread of one subset's distance, which others report after +-."""


class PrecisionRecall(NamedTuple):
    """Improved precision and recall."""

    precision: float
    recall: float
    precision_error: float
    """Binomial standard error: a lower bound."""
    recall_error: float
    """Binomial standard error: a lower bound."""


class _Moments(NamedTuple):
    count: int  # type: ignore[assignment] # no one counts a tuple
    mean: np.ndarray
    scatter: np.ndarray  # [D,D]: sum of (x - mean)(x - mean)^T.


def statistics(features: np.ndarray | Iterable[np.ndarray]) -> Statistics:
    """Mean and unbiased covariance of `features`: an array [N,D] or an iterable of blocks [n,D].

    Only one block at a time is held in float64. Raises ValueError for fewer than 2 rows, other
    shapes, or a number that is not finite.
    """
    return _as_statistics(functools.reduce(_join, map(_moments, _blocks(features)), None))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID of two sets of features (Heusel et al. 2017, Eq. 6).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). Covariances may be singular: with
    C_b = R R^T, the trace of the root is the sum of the square roots of the eigenvalues of the
    symmetric R^T C_a R. A set of fewer images than D makes zero eigenvalues. Their number is known,
    and that many are left out. Raises ValueError if D differs.
    """
    return _distance(a, b, _root(b))


def fid_error(
    features: np.ndarray | Iterable[np.ndarray], reference: Statistics, groups: int = 10
) -> float:
    """Standard error of frechet_distance(statistics(features), reference), by jackknife.

    One group of images is left out at a time; row i of `features` (as for `statistics`) is in group
    i % groups. This is the scatter that other images from the same sampler would give. It does not
    cover the choice of the reference, nor the bias: FID is too large for any finite number of
    images (equally for all who use the same number). With 10 groups the error is itself accurate to
    about a quarter. Raises ValueError for fewer than 2 groups, or if leaving out a group leaves
    fewer than 2 images.
    """
    if groups < 2:
        raise ValueError(f"groups: must be at least 2, got {groups}")
    parts: list[_Moments | None] = [None] * groups
    offset = 0
    for block in _blocks(features):
        for group in range(groups):
            rows = block[(group - offset) % groups :: groups]
            if len(rows):
                parts[group] = _join(parts[group], _moments(rows))
        offset += len(block)
    if offset < groups:
        raise ValueError(
            f"features: {offset} images cannot be divided into {groups} groups; use fewer groups"
        )
    whole = [part for part in parts if part is not None]
    total = functools.reduce(_join, whole)
    root = _root(reference)
    left = [_distance(_as_statistics(_without(total, part)), reference, root) for part in whole]
    return float(np.sqrt((groups - 1) * np.var(left)))


def inception_score(logits: np.ndarray, splits: int = 10) -> InceptionScore:
    """Inception score of `logits` [N,K], between 1 and K (Salimans et al. 2016, Section 4).

    exp of the mean KL(p(y|x) || p(y)) of each of `splits` consecutive parts of the rows. All rows
    are used: if `splits` does not divide N, the sizes of the parts differ by one. Raises ValueError
    for fewer rows than splits, other shapes, or a number that is not finite.
    """
    _check(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(
            f"splits: must be from 1 to {len(logits)}, the number of images, got {splits}"
        )
    ends = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_score(np.float64(logits[ends[i] : ends[i + 1]])) for i in range(splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID of x [N,D] and y [M,D] (Binkowski et al. 2018, Section 4); it may be negative.

    The unbiased squared MMD with kernel (x.y / D + 1)^3, averaged over `subsets` pairs of subsets
    of `subset_size` rows, drawn without replacement from `seed`. If a set has fewer than
    2 subset_size rows, subsets have half the rows of the smaller set, so that they differ. The
    error assumes that the variance falls as 1 / rows, which overestimates it if x and y hardly
    differ. Raises ValueError for sets of fewer than 4 rows, other shapes, or a number that is not
    finite.
    """
    _check(x)
    _check(y, x.shape[1])
    rows = min(len(x), len(y))
    size = min(subset_size, rows // 2)
    if size < 2 or subsets < 2:
        raise ValueError(
            "kernel_distance: needs at least 4 images in each set and 2 subsets of 2 rows, "
            f"got {rows} images and {subsets} subsets of {subset_size} rows"
        )
    values = [
        _mmd(x[_subset(seed, 2 * i, len(x), size)], y[_subset(seed, 2 * i + 1, len(y), size)])
        for i in range(subsets)
    ]
    # Subsets of one finite set vary less than subsets of fresh images, by 1 - size / rows.
    std = float(np.std(values, ddof=1))
    fresh = std**2 / (1 - size / rows)
    error = float(np.sqrt(fresh * size / rows + std**2 / subsets))
    return KernelDistance(float(np.mean(values)), error, std)


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of reference [N,D] and samples [M,D].

    Kynkaanniemi et al. 2019, Eq. 1 and 2. Each row of a set has a ball that reaches to the k-th
    nearest other row of that set. Precision is the fraction of the samples inside at least one of
    the reference's balls, recall the fraction of the reference inside at least one of the samples'
    balls. Both depend on N and M: compare only results of equal N and M.

    The errors are binomial, those of as many independent images with the balls fixed. The error
    from the choice of the balls comes on top. |x - y|^2 is computed as |x|^2 + |y|^2 - 2 x.y in
    float64. Rows closer than a millionth of their length count as equal, because rounding can make
    one image differ that much between two batches.

    Raises ValueError if a set has no more than k rows, for other shapes, or a number that is not
    finite.
    """
    _check(reference)
    _check(samples, reference.shape[1])
    if not 1 <= k < min(len(reference), len(samples)):
        raise ValueError(
            "k: must be from 1 to less than the number of images in each set, "
            f"got {k} for {len(reference)} and {len(samples)} images"
        )
    samples_covered, reference_covered = _covered(samples, reference, k)
    precision = samples_covered.mean()
    recall = reference_covered.mean()
    return PrecisionRecall(
        precision=float(precision),
        recall=float(recall),
        precision_error=float(np.sqrt(precision * (1 - precision) / len(samples))),
        recall_error=float(np.sqrt(recall * (1 - recall) / len(reference))),
    )


def _check(features, dim=None) -> None:
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        wanted = "[N,D]" if dim is None else f"[N,{dim}]"
        raise ValueError(f"features: must be {wanted}, got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError("features: some numbers are not finite; check the network and its weights")


def _blocks(features):
    """Yields blocks [n,D] float64 of an array or an iterable of arrays."""
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
    """The moments of two sets together (Chan et al. 1983).

    Plain sums of squares would lose digits to cancellation if the mean is large.
    """
    if a is None:
        return b
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return _Moments(count, a.mean + shift * (b.count / count), scatter)


def _without(total: _Moments, part: _Moments) -> _Moments:
    """The moments of `total` without `part`: the inverse of _join."""
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
    if moments is None or moments.count < 2:
        count = 0 if moments is None else moments.count
        raise ValueError(f"features: a covariance needs at least 2 images, got {count}")
    return Statistics(moments.mean, moments.scatter / (moments.count - 1), moments.count)


def _root(b: Statistics) -> np.ndarray:
    """R [D,r] with R R^T = C_b; r is the largest rank that C_b can have."""
    values, vectors = np.linalg.eigh(b.covariance)
    rank = min(b.count - 1, len(values))
    return vectors[:, -rank:] * np.sqrt(np.maximum(values[-rank:], 0))


def _distance(a: Statistics, b: Statistics, root: np.ndarray) -> float:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; "
            "use the same network for both"
        )
    rank = min(a.count - 1, root.shape[1])
    # Zero eigenvalues come out as +-1e-16 of the largest, and their roots as 1e-8.
    values = np.linalg.eigvalsh(root.T @ a.covariance @ root)[-rank:]
    trace = (
        np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    )
    return float(max(np.square(a.mean - b.mean).sum() + trace, 0.0))


def _score(logits) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # A class that no image has adds 0 to the entropy, but 0 * log(0) is NaN: leave it out.
    marginal = p.mean(axis=0)
    entropy = -(marginal[marginal > 0] * np.log(marginal[marginal > 0])).sum()
    return float(np.exp((p * log_p).sum(axis=1).mean() + entropy))


def _subset(seed: int, number: int, n: int, size: int) -> np.ndarray:
    # NumPy promises a fixed stream only for bit generators, not for the methods of Generator.
    return np.argsort(np.random.Philox(key=[seed, number]).random_raw(n), kind="stable")[:size]


def _mmd(x, y) -> float:
    """The unbiased squared MMD of x [m,D] and y [m,D]."""
    x = np.float64(x)
    y = np.float64(y)
    m = len(x)
    xx = _kernel(x, x)
    yy = _kernel(y, y)
    xy = _kernel(x, y)
    return (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()


def _kernel(a, b):
    """(a.b / D + 1)^3 for each pair of rows of a [n,D] and b [m,D]: [n,m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _squared_radii(features, k: int) -> np.ndarray:
    """The squared distance [N] from each row of features [N,D] to the k-th nearest other row."""
    radii = []
    for rows in _parts(features):
        nearest = np.empty((rows.stop - rows.start, 0))
        for columns in _parts(features):
            squared = _squared_distances(features[rows], features[columns])
            if rows == columns:
                np.fill_diagonal(squared, np.inf)
            nearest = np.concatenate([nearest, squared], axis=1)
            if nearest.shape[1] > k:
                nearest = np.partition(nearest, k - 1, axis=1)[:, :k]
        radii.append(nearest.max(axis=1))
    return np.concatenate(radii)


def _covered(x, y, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of x lie in a ball of y, and which rows of y in a ball of x: bool [N] and [M]."""
    x_radii = _squared_radii(x, k)
    y_radii = _squared_radii(y, k)
    x_covered = np.zeros(len(x), bool)
    y_covered = np.zeros(len(y), bool)
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
    """Squared distances float64 [n,m] between rows of x [n,D] and y [m,D]."""
    x = np.float64(x)
    y = np.float64(y)
    lengths = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None]
    squared = lengths - 2 * (x @ y.T)
    return np.where(squared <= 1e-12 * lengths, 0.0, squared)
