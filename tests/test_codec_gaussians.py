"""Relative entropy coding of Gaussians, and the rate of Gaussian data, against closed forms."""

import itertools

import jax
import numpy as np
import pytest
from gaussian import Chain, M, S, gain, mmse

from ddpm_jax import make_schedule
from ddpm_jax.calibration import Calibration, kl_bits
from ddpm_jax.compression import chain
from ddpm_jax.compression.codec import Sent, Setting, receive, send
from ddpm_jax.compression.gaussians import PLACES, arrival_times, candidate, choose, normals
from ddpm_jax.compression.numbers import Counts, Writer, write_numbers
from ddpm_jax.schedule import Schedule

N = 2**10
WIDTH = 8
GROUPS = 256
KEYS = 16


def drawn(seed):
    """(row of normals, arrival times) of one step."""
    keys = jax.random.split(jax.random.key(seed))
    return normals(keys[0], N, WIDTH), arrival_times(keys[1], N)


def directions(rng):
    """GROUPS unit vectors."""
    vectors = rng.normal(size=(GROUPS, WIDTH))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def coded():
    """{|d|: (numbers [KEYS,GROUPS], their parts along d, and across d [..., WIDTH])}."""
    found = {}
    for length in (1.0, 2.5, 4.0):
        rng = np.random.default_rng(0)
        of_keys = []
        for seed in range(KEYS):
            row, times = drawn(seed)
            units = directions(rng)
            offsets = rng.integers(0, N, GROUPS)
            d = list((length * units).astype(np.float32))
            numbers = choose(row, times, d, offsets)
            z = np.stack(
                [
                    candidate(np.asarray(row), N, int(first), int(number), WIDTH)
                    for first, number in zip(offsets, numbers, strict=True)
                ]
            ).astype(np.float64)
            along = (z * units).sum(axis=1)
            of_keys.append((numbers, along, z - along[:, None] * units))
        found[length] = tuple(np.stack(each) for each in zip(*of_keys, strict=True))
    return found


def truncated_law(length, draws=8000):
    """Chosen parts along d: the least arrival time over weight of N independent candidates."""
    rng = np.random.default_rng(1)
    chosen = []
    for _ in range(8):
        z = rng.normal(size=(draws // 8, N))
        times = np.cumsum(rng.exponential(size=z.shape), axis=1)
        best = (times * np.exp(-length * z)).argmin(axis=1)
        chosen.append(z[np.arange(len(z)), best])
    return np.concatenate(chosen)


def near(of_keys, expected, error, most):
    """Whether means of keys agree with a number of that standard error, itself at most `most`."""
    own = of_keys.std(ddof=1) / np.sqrt(len(of_keys))
    assert own < most, own
    np.testing.assert_allclose(of_keys.mean(), expected, rtol=0, atol=5 * np.hypot(own, error))


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
def test_a_choice_has_the_law_of_the_truncated_search(coded, length):
    _, along, across = coded[length]
    law = truncated_law(length)
    error = law.std() / np.sqrt(law.size)
    near(along.mean(axis=1), law.mean(), error, 0.05)
    near(along.var(axis=1), law.var(), 2 * law.var() / np.sqrt(law.size), 0.05)
    # 3.1 nats of N = 2^10 (6.9 nats) show no truncation yet; 8 do.
    if length < 4:
        np.testing.assert_allclose(law.mean(), length, atol=0.15)
    else:
        assert length - law.mean() > 0.5
    # WIDTH - 1 dimensions are left across d.
    near(np.square(across).sum(axis=2).mean(axis=1), WIDTH - 1, 0, 0.2)
    near(across.mean(axis=(1, 2)), 0, 0, 0.02)


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
def test_a_number_is_no_longer_than_its_bound(coded, length):
    """E log2 K <= KL + log2(e) / e + 1 (Li & El Gamal 2018, Appendix A).

    A whole number of mean m has at most the entropy log2(m + 1) + log2(e), and floor(log2 K) takes
    that and m bits more. (Theis & Yosri 2022 have KL + log2(KL + 1) + 4.) The truncated search
    never has a larger K.
    """
    numbers = coded[length][0]
    kl = length**2 / 2 / np.log(2)
    mean = kl + np.log2(np.e) / np.e + 1
    assert np.log2(1.0 + numbers).mean() < mean
    lengths = Counts(np.ones(11, np.int64))
    writer = Writer()
    for of_key in numbers:
        write_numbers(writer, of_key, lengths)
        lengths.add(np.floor(np.log2(1 + of_key)).astype(np.int64))
    learning = 10 / 2 * np.log2(numbers.size) / numbers.size
    bits = 8 * len(writer.bytes()) / numbers.size
    assert kl / 2 < bits < mean + np.log2(mean + 1) + np.log2(np.e) + learning
    assert bits < kl + np.log2(kl + 1) + 4


def test_the_search_finds_what_an_exhaustive_one_finds():
    rng = np.random.default_rng(2)
    row, times = drawn(7)
    shifts = [rng.normal(size=size).astype(np.float32) for size in (1, 3, 8, 8, 5, 2)]
    offsets = np.array([0, 1, N - 1, 517, N // 2, 1000])
    numbers = choose(row, times, shifts, offsets)
    for d, offset, number in zip(shifts, offsets, numbers, strict=True):
        windows = np.stack(
            [candidate(np.asarray(row), N, int(offset), j, d.size) for j in range(N)]
        )
        # Every window is one candidate.
        np.testing.assert_array_equal(np.sort(windows[:, 0]), np.sort(np.asarray(row)[:N]))
        place = offset % PLACES
        between = np.diff(np.float64(times), prepend=0)
        arrivals = np.roll(between, -place).cumsum()
        scores = np.log(arrivals) - windows.astype(np.float64) @ d
        assert scores[number] <= scores.min() + 1e-3


# Gaussian data with the optimal denoiser.

T = 1000
# Steps of equal ratios of the signal to the noise, from 20,000 down to a 1,000th.
FINE = 1 / (1 + np.geomspace(1 / 20_000, 1000, T))
SCHEDULE = Schedule.from_betas(1 - FINE / np.append(1, FINE[:-1]))
CHAIN = Chain(np.float64(SCHEDULE.betas))
MSE = mmse(CHAIN.a)


@pytest.mark.parametrize("distortion", [0.5, 0.05, 0.005])
def test_the_bits_a_chain_is_chosen_by_are_the_rate_of_a_gaussian(monkeypatch, distortion):
    """R(D) = log2(S^2 / D) / 2 for each dimension, in the limit of many steps.

    A step from t to s costs (snr_s - snr_t) mse_t / 2 nats: a sum to the integral of I-MMSE. It is
    too high by less than the difference to the sum that takes mse_s.
    """
    end = int(np.argmin(np.abs(MSE - distortion * S**2)))
    rate = 0.5 * np.log2(S**2 / MSE[end])
    snr = CHAIN.a / (1 - CHAIN.a)
    start = 0.5 * np.log2(1 + snr[-1] * S**2)  # What x_T is taken to tell, and does not.
    sums = {t: 0.5 * (-np.diff(snr) * MSE[t : t + T - 1])[end:].sum() / np.log(2) for t in (0, 1)}
    assert sums[0] < rate - start < sums[1]
    monkeypatch.setattr(chain, "OVERHEAD", 1e-9)
    dimensions = 48
    best, before = chain.path_costs(SCHEDULE, MSE, dimensions, 8, 0.0)
    np.testing.assert_allclose(best[end] / dimensions, sums[1], rtol=1e-5)
    np.testing.assert_allclose(best[end] / dimensions, rate - start, rtol=0.01)
    visited = chain.path(before, end)
    costs = kl_bits(SCHEDULE, MSE, "fixed_small")[visited[:-1], visited[1:]]
    np.testing.assert_allclose(costs.sum(), sums[1], rtol=1e-5)


@pytest.mark.parametrize("group_bits", [1, 4, 12])
def test_no_other_chain_costs_less(group_bits):
    few = 9
    schedule = make_schedule("linear", few, beta_start=0.01, beta_end=0.5)
    table = Chain(np.float64(schedule.betas))
    snr = table.a / (1 - table.a)
    for mse in (mmse(table.a), np.random.default_rng(0).uniform(0.01, 0.3, few)):
        best, before = chain.path_costs(schedule, mse, 20, group_bits, 5.0)

        def cost(visited, mse=mse):
            total = 0.0
            for s, t in itertools.pairwise(visited):
                bits = 20 * 0.5 * (snr[s] - snr[t]) * mse[t] / np.log(2)
                total += bits + 5.0 + 2.5 * max(1, np.ceil(bits / (1.1 * group_bits)))
            return total

        for end in range(few - 1):
            inner = range(end + 1, few - 1)
            every = [
                cost((end, *some, few - 1))
                for size in range(len(inner) + 1)
                for some in itertools.combinations(inner, size)
            ]
            np.testing.assert_allclose(best[end], min(every), rtol=1e-5)
            found = chain.path(before, end)
            assert found.dtype == np.int32 and found[0] == end and found[-1] == few - 1
            np.testing.assert_allclose(cost(found), min(every), rtol=1e-5)
    assert best[few - 1] == 0


SHAPE = (4, 4, 1)
GROUP_BITS = 4
SHORT = make_schedule("linear", 40, beta_start=1e-4, beta_end=0.3)


def gaussian_setting(candidates=2**10):
    """(setting, timesteps, mse, calibration) of Gaussian images, down to a 0.02nd of S^2."""
    table = Chain(np.float64(SHORT.betas))
    mse = mmse(table.a)
    cells = np.tile(mse.astype(np.float32)[:, None, None, None], (1, *SHAPE))
    calibration = Calibration(mse, 0 * mse, cells, 0 * cells, 1)
    _, before = chain.path_costs(SHORT, mse, 16, GROUP_BITS, 0.5)
    timesteps = chain.path(before, int(np.argmax(mse > 0.02 * S**2)))
    steps = chain.steps_of(SHORT, calibration, timesteps, SHAPE)
    nominal = tuple(
        int(n) for n in chain.groups_for(np.array([step.bits for step in steps]), GROUP_BITS)
    )
    return Setting(SHAPE, 3, candidates, tuple(steps), nominal), timesteps, table.a


def optimal(a, timesteps, seen):
    """The optimal denoiser of the chain, which keeps what it sees."""

    def predict(x_t, i):
        of = a[timesteps[i]]
        seen.append(x_t)
        return (M + gain(of) * (x_t - np.sqrt(of) * M)).astype(np.float32)

    return predict


def test_gaussian_images_are_sent_at_the_expected_bits_and_error():
    # So many candidates that the search is hardly cut off.
    setting, timesteps, a = gaussian_setting(2**14)
    images = 200
    x_0 = np.random.default_rng(5).normal(M, S, (images, *SHAPE)).astype(np.float32)
    rows = np.arange(images)
    seen: list = []
    sending = list(send(setting, optimal(a, timesteps, seen), rows, x_0, GROUP_BITS))
    for number, (predicted, of_step) in enumerate(sending):
        t = timesteps[-1 - number]
        error = np.square(x_0 - predicted)
        np.testing.assert_allclose(error.mean(), mmse(a[t]), rtol=0.1)
        if of_step is None:
            assert number == len(setting.steps)
            continue
        step = setting.steps[number]
        assert step.timestep == t
        nats = 0.5 * (step.of_x_0 / step.sigma) ** 2 * error.sum() / images
        np.testing.assert_allclose(nats / np.log(2), step.bits, rtol=0.1)
        expected = 16 * kl_bits(SHORT, mmse(a), "fixed_small")[timesteps[-2 - number], t]
        np.testing.assert_allclose(step.bits, expected, rtol=1e-5)
        # x_t has the variance that noising an image gives it.
        spread = a[t] * S**2 + 1 - a[t]
        np.testing.assert_allclose(seen[number].var(), spread, rtol=0.08)
        np.testing.assert_allclose(seen[number].mean(), np.sqrt(a[t]) * M, atol=0.05)


def test_the_receiver_sees_the_senders_x_t_in_any_batch():
    setting, timesteps, a = gaussian_setting()
    x_0 = np.random.default_rng(6).normal(M, 2 * S, (6, *SHAPE)).astype(np.float32)
    rows = np.array([3, 4, 5, 6, 7, 8])
    seen: list = []
    sent = [
        of_step
        for _, of_step in send(setting, optimal(a, timesteps, seen), rows, x_0, GROUP_BITS)
        if of_step is not None
    ]
    moved: list = []
    for few in ([0, 1, 2, 3, 4, 5], [4], [2, 5, 5]):
        of_few = [Sent(each.levels[few], [each.numbers[i] for i in few]) for each in sent]
        for steps in (0, 1, len(sent)):
            again: list = []
            predict = optimal(a, timesteps, again)
            x_t = receive(setting, predict, rows[few], of_few[:steps], moved.append)
            for ours, theirs in zip([*again, x_t], seen, strict=False):
                np.testing.assert_array_equal(ours, theirs[few])
    assert sum(moved) == 3 * (1 + len(sent))
    assert len(set(sent[-1].levels)) > 1
