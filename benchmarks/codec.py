"""The codec: bytes against the ideal rates, seconds an image, exact images, and the coding alone.

    python benchmarks/codec.py RUN [--data SOURCE] [--split test] [--n 64] [--rmse 5]
    python benchmarks/codec.py --coding

The first measures the bound of the images as `ddpm-jax likelihood` does. Then it prints a row for
each number of bits a group: bits/dim of the whole file, that over the ideal rate of the same images
along the same chain and along all steps down to the same one, the error, seconds an image to
compress and to decompress, and decompressing over sampling by as many steps. Times are of second
runs. At last come exact images, beside that bound, PNG and WebP. The second command compares two
ways to code a Gaussian, by NumPy alone.
"""

import argparse
import time

import jax
import numpy as np

from ddpm_jax import configure_jax
from ddpm_jax.calibration import kl_bits
from ddpm_jax.compression import Asked, compressed, decompress
from ddpm_jax.compression.format import read_head
from ddpm_jax.data.images import to_float
from ddpm_jax.evaluation.splits import first_of, read_split
from ddpm_jax.figures.codec import exact_bits
from ddpm_jax.keys import seed_key
from ddpm_jax.weights.load import load_weights


def timed(call):
    """(what it returns, seconds of a second call)."""
    call()
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def rates(model, images, bound, rmse, group_bits):
    """One row of the table."""
    ddpm = model.ddpm
    # That of these images in place of the calibration's.
    own = np.asarray(bound.mse, np.float64).mean(axis=0)

    def compress():
        return compressed(ddpm, model.params, images, Asked(rmse=rmse, group_bits=group_bits))

    whole, to_compress = timed(compress)
    _, to_decompress = timed(lambda: decompress(ddpm, model.params, whole.data))
    head, _ = read_head(whole.data)
    timesteps = np.array(head.timesteps)
    steps = tuple(head.timesteps)

    def sample():
        return ddpm.sample(model.params, seed_key(0), len(images), timesteps=steps)

    _, to_sample = timed(sample)
    kl = kl_bits(ddpm.schedule, own, "fixed_small")
    of_chain = kl[timesteps[:-1], timesteps[1:]].sum()
    every = np.arange(timesteps[0], len(own))
    of_all = kl[every[:-1], every[1:]].sum()
    bits = 8 * len(whole.data) / images.size
    error = np.sqrt(np.square(whole.rmse[-1]).mean())
    print(
        f"{group_bits:10} {len(steps):6} {bits:9.3f} {bits / of_chain:11.2f} {bits / of_all:11.2f} "
        f"{error:7.2f} {to_compress / len(images):9.3f} {to_decompress / len(images):11.3f} "
        f"{to_decompress / to_sample:13.2f}",
        flush=True,
    )


def exact(model, images, bound, group_bits):
    """The bits of exact images, and what they are compared with."""
    ddpm = model.ddpm

    def compress():
        return compressed(ddpm, model.params, images, Asked(lossless=True, group_bits=group_bits))

    whole, seconds = timed(compress)
    assert (decompress(ddpm, model.params, whole.data) == images).all()
    bits = 8 * len(whole.data) / images.size
    lossy = 8 * whole.ends[-2] / images.size
    total = float(np.mean(bound.total))
    print(f"exact: {bits:.3f} bits/dim, of which the steps take {lossy:.3f}")
    print(f"bound of the same images: {total:.3f} bits/dim; ratio {bits / total:.3f}")
    for name in ("PNG", "WebP"):
        print(f"{name}: {exact_bits(images, name):.3f} bits/dim")
    print(f"seconds an image: {seconds / len(images):.3f}")


def coding(groups=2000):
    """Poisson functional representation and minimal random coding of one Gaussian."""
    rng = np.random.default_rng(0)
    print("bits of KL  method   candidates   bits sent   mean along d / |d|   variance along d")
    for bits in (8, 10, 12):
        shift = np.sqrt(2 * bits * np.log(2))
        many = 2 ** (bits + 6)
        found = [poisson(rng, shift, many) for _ in range(groups)]
        numbers, along = np.array(found).T
        lengths = np.floor(np.log2(numbers + 1)).astype(int)
        counts = np.bincount(lengths)
        share = counts[counts > 0] / groups
        sent = lengths.mean() - (share * np.log2(share)).sum()
        row(bits, "Poisson", many, sent, along, shift)
        for more in (1, 3):
            few = 2 ** (bits + more)
            along = np.array([minimal(rng, shift, few) for _ in range(groups)])
            row(bits, "minimal", few, bits + more, along, shift)


def poisson(rng, shift, candidates):
    """(number, its place along d): the least arrival time over weight."""
    places = rng.standard_normal(candidates)
    arrivals = np.cumsum(rng.exponential(size=candidates))
    number = np.argmin(np.log(arrivals) - shift * places)
    return number, places[number]


def minimal(rng, shift, candidates):
    """The place along d of a candidate drawn with probabilities in proportion to the weights."""
    places = rng.standard_normal(candidates)
    return places[np.argmax(shift * places + rng.gumbel(size=candidates))]


def row(bits, name, candidates, sent, along, shift):
    """Prints a row of `coding`."""
    print(
        f"{bits:10}  {name:8} {candidates:10} {sent:11.2f} {along.mean() / shift:20.3f} "
        f"{along.var():18.2f}",
        flush=True,
    )


def main():
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rmse", type=float, default=5.0)
    parser.add_argument("--group-bits", type=int, nargs="+", default=[8, 10, 12])
    parser.add_argument("--coding", action="store_true")
    options = parser.parse_args()
    if options.coding:
        coding()
        return
    configure_jax()
    model = load_weights(options.run)
    split, _ = first_of(read_split(model, options.split, options.data), options.n)
    images = split.source.read(split.indices)
    print(f"{split.split}, {len(images)} images, {jax.devices()[0].device_kind}")
    bound = model.ddpm.bits_per_dim(model.params, seed_key(0), np.asarray(to_float(images)))
    print(
        "group bits  steps  bits/dim  over chain  over all T    RMSE  compress  decompress  "
        "over sampling"
    )
    for group_bits in options.group_bits:
        rates(model, images, bound, options.rmse, group_bits)
    exact(model, images, bound, options.group_bits[-1])


if __name__ == "__main__":
    main()
