"""The paper's own results (Ho et al. 2020, Tables 1 to 3), to print beside what is measured here."""

from ddpm_jax.config import Config

# Of CIFAR10, by (prediction, loss, whether the variance is learned): IS, FID (train), FID (test), NLL (test).
CIFAR10 = {
    ("eps", "simple", False): {"is": "9.46 +- 0.11", "fid_train": "3.17", "fid_test": "5.24", "nll": "<= 3.75"},
    ("eps", "vlb", False): {"is": "7.67 +- 0.13", "fid_train": "13.51", "nll": "<= 3.70"},
    ("mean", "vlb", True): {"is": "7.28 +- 0.10", "fid_train": "23.69"},
    ("mean", "vlb", False): {"is": "8.06 +- 0.09", "fid_train": "13.22"},
}

# Of 256x256 LSUN, by the words in a data set's name.
LSUN = {"bedroom": "6.36", "church": "7.89", "cat": "19.75"}


def results_of(config: Config, data: str) -> dict[str, str]:
    """The paper's numbers, by their names, for such a model of the images that `data` names; none if it has none."""
    diffusion, words = config.diffusion, data.lower()
    if "cifar10" in words.replace("-", "") and diffusion.schedule == "linear":
        return CIFAR10.get((diffusion.prediction, diffusion.loss, diffusion.learns_variance), {})
    if "lsun" in words:
        return next(({"fid_train": fid} for name, fid in LSUN.items() if name in words), {})
    return {}
