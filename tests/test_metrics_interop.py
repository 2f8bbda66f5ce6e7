"""The metrics against torch-fidelity's on random features."""

import numpy as np
import pytest
from fidelity import fidelity

from ddpm_jax.evaluation import metrics

pytestmark = pytest.mark.interop


@pytest.fixture
def features(rng):
    """(reference [500,24], samples [400,24]) float32: correlated, positive, unlike each other."""
    mix = rng.normal(size=(24, 24))
    reference = np.maximum(rng.normal(size=(500, 24)) @ mix + 1, 0)
    return np.float32(reference), np.float32(
        np.maximum(rng.normal(size=(400, 24)) @ mix * 1.2 + 0.5, 0)
    )


def test_fid(features):
    other = fidelity("metric_fid")
    import torch

    theirs = [other.fid_features_to_statistics(torch.from_numpy(x).double()) for x in features]
    expected = other.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    ours = metrics.frechet_distance(*map(metrics.statistics, features))
    assert ours == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [400, 203])
def test_inception_score(features, n):
    other = fidelity("metric_isc")
    import torch

    logits = features[1][:n]
    expected = other.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    ours = metrics.inception_score(logits)
    assert ours.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert ours.std == pytest.approx(expected["inception_score_std"], rel=1e-10)


def test_kernel_distance(features):
    """Ours on their own subsets, and both on random ones of their own."""
    other = fidelity("metric_kid")
    import torch

    x, y = features[0][:400], features[1]
    assert metrics._mmd(x, y) == pytest.approx(
        other.kernel_mmd(np.float64(x), np.float64(y)), rel=1e-10
    )
    options = dict(kid_subsets=450, kid_subset_size=100, rng_seed=7, verbose=False)
    theirs = other.kid_features_to_metric(
        *(torch.from_numpy(x).double() for x in features), **options
    )
    ours = metrics.kernel_distance(*features, subsets=450, subset_size=100)
    # 6 standard errors of their difference.
    error = 9 * ours.subset_std / np.sqrt(450)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=error)
    assert ours.subset_std == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.4)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall(features, k):
    other = fidelity("metric_prc")
    import torch

    reference, samples = (torch.from_numpy(x).double() for x in features)
    theirs = other.prc_features_to_metric(samples, reference, prc_neighborhood=k, verbose=False)
    ours = metrics.precision_recall(*features, k=k)
    assert (ours.precision, ours.recall) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-7
    )
    assert 0.05 < ours.precision < ours.recall < 0.99
