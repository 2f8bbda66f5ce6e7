"""The paper's own results (Ho et al. 2020, Tables 1 to 3), to print beside what is measured here."""

import re

from ddpm_jax.config import Config

# Of CIFAR10, by (prediction, loss, whether the variance is learned): IS, FID (train), FID (test), NLL (test).
CIFAR10 = {
    ("eps", "simple", False): {
        "is": "9.46 +- 0.11",
        "fid_train": "3.17",
        "fid_test": "5.24",
        "nll_test": "<= 3.75",
    },
    ("eps", "vlb", False): {"is": "7.67 +- 0.13", "fid_train": "13.51", "nll_test": "<= 3.70"},
    ("mean", "vlb", True): {"is": "7.28 +- 0.10", "fid_train": "23.69"},
    ("mean", "vlb", False): {"is": "8.06 +- 0.09", "fid_train": "13.22"},
}

# Of 256x256 LSUN, by the words in a data set's name.
LSUN = {"bedroom": "6.36", "church": "7.89", "cat": "19.75"}


def results_of(config: Config, data: str) -> dict[str, str]:
    """The paper's numbers, by their names, for such a model of the images that `data` names; none if it has none."""
    diffusion, words = config.diffusion, data.lower()
    if diffusion.schedule != "linear":
        return {}
    if config.data.image_shape == (32, 32, 3) and re.search(r"cifar-?10(?![0-9_])", words):
        return CIFAR10.get((diffusion.prediction, diffusion.loss, diffusion.learns_variance), {})
    lsun = re.search(r"lsun[^a-z]?(bedroom|church|cat)", words)
    return {"fid_train": LSUN[lsun[1]]} if lsun and config.data.image_shape == (256, 256, 3) else {}
