"""The paper's own results (Ho et al. 2020, Tables 1 to 3), printed beside the measured ones."""

import re

from ddpm_jax.config import Config

# CIFAR10, keyed by (prediction, loss, whether the variance is learned).
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

# FID (train) of 256x256 LSUN, keyed by the word in a data set's name.
LSUN = {"bedroom": "6.36", "church": "7.89", "cat": "19.75"}


def results_of(config: Config, data: str) -> dict[str, str]:
    """The paper's numbers {name: value} for a model like `config` of the data set named `data`.

    Empty if the paper has none.
    """
    diffusion = config.diffusion
    words = data.lower()
    if diffusion.schedule != "linear" or config.model.num_classes:
        return {}
    if config.data.image_shape == (32, 32, 3) and re.search(r"cifar-?10(?![0-9_])", words):
        return CIFAR10.get((diffusion.prediction, diffusion.loss, diffusion.learns_variance), {})
    lsun = re.search(r"lsun[^a-z]?(bedroom|church|cat)", words)
    if lsun and config.data.image_shape == (256, 256, 3):
        return {"fid_train": LSUN[lsun[1]]}
    return {}
