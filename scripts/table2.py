"""Trains and measures the six variants of Table 2 (Ho et al. 2020) on the digits; see table2.sh."""

import argparse
import dataclasses
import sys

from ddpm_jax import fit, load_config
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.errors import NonFiniteLoss
from ddpm_jax.evaluation.bound import measure
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.weights.load import load_weights

ROWS = {
    "mean  L         learned": ("cifar10_mean_vlb_learned", "IS 7.28, FID 23.69"),
    "mean  L         fixed": ("cifar10_mean_vlb_fixed", "IS 8.06, FID 13.22"),
    "mean  MSE       fixed": ("cifar10_mean_mse", "unstable"),
    "eps   L         learned": ("cifar10_eps_vlb_learned", "unstable"),
    "eps   L         fixed": ("cifar10_eps_vlb_fixed", "IS 7.67, FID 13.51, NLL 3.70"),
    "eps   L_simple  fixed": ("cifar10", "IS 9.46, FID 3.17, NLL 3.75"),
}
NOTE = """Bits/dim of the held-out digits, an upper bound. The digits have only 17 of the 256 grey
levels that the bound assumes, so only the order of the variants means anything, and after so few
steps not much."""


def config_of(name: str, steps: int):
    """The config of the digits, with process, loss and gradient clipping of the CIFAR10 `name`."""
    digits = load_config("digits")
    row = load_config(name)
    optim = dataclasses.replace(digits.optim, clip_norm=row.optim.clip_norm)
    train = dataclasses.replace(digits.train, steps=steps, num_samples=16)
    return dataclasses.replace(digits, diffusion=row.diffusion, optim=optim, train=train)


def main(steps: int) -> None:
    """Trains, measures and prints all variants."""
    lines = [
        f"predicts, trained on, variance {'total':>8} {'rate':>8} {'distortion':>11}"
        "  the paper on CIFAR10"
    ]
    for row, (name, paper) in ROWS.items():
        workdir = f"runs/table2/{steps}/{name}"
        try:
            fit(config_of(name, steps), workdir)
            model = load_weights(workdir, mesh=make_mesh())
            summary = measure(model, read_split(model)).summary
            figures = "{total:8.3f} {rate:8.3f} {distortion:11.3f}".format(**summary)
        except NonFiniteLoss as error:
            figures = f"diverged: {error}"
        lines.append(f"{row:30} {figures}  {paper}")
        print(lines[-1], file=sys.stderr)
    print(*lines, NOTE, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="training steps per variant")
    main(**vars(parser.parse_args()))
