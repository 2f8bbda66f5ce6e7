"""How good a model's samples are: the row of the paper's Table 1, and KID, precision and recall.

RUN/evaluation/STEP-WEIGHTS-SAMPLER-seedN/, of a model with classes STEP-...-guidanceW-HASH/
  samples/         as `ddpm-jax sample --out` makes them, and may have made them
  features-.../    one file for every few images
  KIND-N-SETS.json the result, with all that it depends on
"""

import hashlib
import json
import logging
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax.calls.conditions import UNGUIDED, Guide
from ddpm_jax.config import Split, to_dict
from ddpm_jax.devices.mesh import describe_devices, make_mesh
from ddpm_jax.devices.processes import agreed, wait_for_all
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.bound import measure
from ddpm_jax.evaluation.classes import lines_of, of_classes
from ddpm_jax.evaluation.features import (
    Extractor,
    Features,
    Reference,
    cache_root,
    compared,
    extractor_of,
    features_of,
    reference_of,
)
from ddpm_jax.evaluation.labels import guide_for
from ddpm_jax.evaluation.paper import results_of
from ddpm_jax.evaluation.sample import checked_sampler, fill_folder
from ddpm_jax.evaluation.sample_files import sample_files
from ddpm_jax.evaluation.splits import Images, load_images, read_split
from ddpm_jax.sampler import ANCESTRAL, Sampler
from ddpm_jax.storage.files import path_of, read_table, write_file
from ddpm_jax.storage.run import versions
from ddpm_jax.weights.load import Loaded, words_of

log = logging.getLogger(__name__)

LEAST = 20
"""Fewest samples, and images trained on, that errors can be computed from."""


def evaluate(
    model: Loaded,
    data: str | None = None,
    n: int = 50_000,
    seed: int = 0,
    sampler: Sampler = ANCESTRAL,
    batch_size: int | None = None,
    inception_file: epath.PathLike | None = None,
    samples: epath.PathLike | None = None,
    likelihood: bool = True,
    out: epath.PathLike | None = None,
    guide: Guide = UNGUIDED,
) -> dict[str, Any]:
    """Compares images 0, ..., n - 1 of key(seed) with real ones; resumes with what is there.

    Returns the result that it writes. The real images are `data`, named as data.source (of
    tfds:NAME the test split counts too), by default those that the run was trained on and those
    that it was not. Features are FID's InceptionV3's with the weights of `inception_file`, or else
    those of a small classifier trained on the images' labels; its numbers are called proxy.
    `samples` is a folder of `ddpm-jax sample`, filled up if images are missing. If `guide` has no
    labels, those of samples of a model with classes are `guide_for`'s. `likelihood` measures the
    bound on the images that were not trained on, as `ddpm-jax likelihood` does.
    Raises UserError for what cannot be used.
    """
    sampler = checked_sampler(sampler, model)
    if likelihood:
        model.ddpm.config.diffusion.check_bound()
    home = None if out else model.home / "evaluation"

    sets = real_images(model, data)
    train = sets[0]
    guide = guide_for(model.ddpm, train, guide)
    folder = home / _name(model, sampler, seed, guide) if home else path_of(out)
    root = cache_root(train.source, folder / "real")
    extractor = extractor_of(
        inception_file, model.ddpm.config.data, train.source, train.indices, root, make_mesh()
    )
    references = {
        images.split: reference_of(extractor, images.source, images.indices, root)
        for images in sets
    }
    place = path_of(samples) if samples else folder / "samples"
    fill_folder(place, model, n, seed, sampler, batch_size or 64 * model.devices, guide)
    drawn = _features_of_samples(extractor, model, place, n, folder)
    result = _described(model, data, n, seed, sampler, guide, extractor, sets)
    result["values"] = _compare(drawn, references, extractor.kind)
    labels = guide.of(np.arange(n))["labels"]
    own = train.source.labels
    if labels is not None and own is not None:
        result |= _by_class(drawn, labels, own[train.indices], references["train"], result)
    file = folder / f"{extractor.kind}-{n}-{_hash_of(sets)}.json"
    if likelihood:
        _write(file, result)  # The likelihood may take long.
        result["values"] |= _likelihood(model, sets, seed, batch_size, folder if out else None)
    else:
        result["values"] |= _likelihood_in(file, model)
    _write(file, result)
    log.info("results: %s", file)
    return result


def _described(
    model: Loaded,
    data: str | None,
    n: int,
    seed: int,
    sampler: Sampler,
    guide: Guide,
    extractor: Extractor,
    sets: list[Images],
) -> dict[str, Any]:
    """All that the values of a result depend on, and the paper's own."""
    config = model.ddpm.config
    return {
        "run": str(model.path),
        **model.label,
        "seed": seed,
        **sampler.recorded(config.diffusion),
        **guide.recorded,
        "samples": n,
        "diffusion": to_dict(config)["diffusion"],
        "features": {"kind": extractor.kind, "sha256": extractor.sha256, **extractor.about},
        "data": data or config.data.source,
        "references": [_reference(images) for images in sets],
        "rounding": "to the nearest of the 256 levels",
        "versions": versions(),
        "devices": describe_devices(make_mesh()),
        "paper": results_of(config, data or config.data.source),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text, beside the paper's own where it has such a row."""
    features = result["features"]
    is_proxy = features["kind"] == "proxy"
    paper = {} if is_proxy else result["paper"]
    weights = words_of(result["weights"], result["step"])
    steps = "" if result["steps"] is None else f" of {result['steps']} steps"
    sets = [f"{each['images']} images of {each['split']}" for each in result["references"]]
    width = max(28, *(len(value["title"]) + 1 for value in result["values"].values()))
    lines = [
        f"{result['run']}: {weights}, {result['sampler']}{steps}{_words_of_guide(result)}",
        f"{result['samples']} samples of seed {result['seed']} against {', '.join(sets)}",
        f"features: {features['kind']}, sha256 {features['sha256'][:16]}",
        f"{'':{width}}{'here':>10}{'error':>10}{'  the paper' if paper else ''}",
    ]
    for name, value in result["values"].items():
        numbers = f"{value['value']:10.5f}{value['error']:10.5f}"
        lines.append(f"{value['title']:{width}}{numbers}  {paper.get(name, '')}".rstrip())
    if result.get("classes"):
        lines += lines_of(result["classes"], "proxy KID" if is_proxy else "KID")
    if is_proxy:
        lines += [
            "proxy: features of a small classifier of these images, which classifies "
            f"{features['accuracy']:.1%} of its held-out images correctly.",
            "Compare proxy scores only between models of the same images. For published scores, "
            "pass --inception PATH.",
        ]
    return "\n".join(lines)


def _words_of_guide(result: dict[str, Any]) -> str:
    """For example ", guidance 2.0 at 0 <= t < 500"; nothing of 1."""
    if result.get("guidance", 1) == 1:
        return ""
    words = f", guidance {result['guidance']}"
    if result["guidance_interval"] is None:
        return words
    lo, hi = result["guidance_interval"]
    return f"{words} at {lo} <= t < {hi}"


def _write(file: epath.Path, result: dict[str, Any]) -> None:
    write_file(file, json.dumps(result, indent=1).encode())


def _reference(images: Images) -> dict[str, Any]:
    return {
        "split": images.split,
        "data_fingerprint": images.source.fingerprint,
        "images": len(images.indices),
    }


def _name(model: Loaded, sampler: Sampler, seed: int, guide: Guide = UNGUIDED) -> str:
    """Of the folder for what is made with these."""
    options = sampler.options
    if sampler.timesteps is not None:  # A thousand numbers are no name.
        steps = np.array(sampler.timesteps, np.int64)
        digest = hashlib.blake2b(steps.tobytes(), digest_size=4).hexdigest()
        options["timesteps"] = f"{len(steps)}steps-{digest}"
    drawn_by = [str(option) for option in options.values() if option is not None]
    shown = []
    if guide.recorded:
        hashed = hashlib.blake2b(json.dumps(guide.recorded).encode(), digest_size=4).hexdigest()
        shown = [f"guidance{guide.guidance:g}", hashed]
    return "-".join([f"{model.step:08d}", model.kind, *drawn_by, f"seed{seed}", *shown])


def _hash_of(sets: list[Images]) -> str:
    """Which images are compared with."""
    hashed = hashlib.blake2b(digest_size=4)
    for split, source, indices in sets:
        hashed.update(
            f"{split} {source.fingerprint}".encode() + np.asarray(indices, np.int64).tobytes()
        )
    return hashed.hexdigest()


def real_images(model: Loaded, data: str | None) -> list[Images]:
    """The sets to compare samples with; that of the images trained on comes first.

    `data` as for `evaluate`. Raises UserError for images that cannot be used.
    """
    if data is None:
        train = read_split(model, "train")
    else:
        source = load_images(model, data)
        train = Images("train", source, np.arange(len(source)))
    if len(train.indices) < LEAST:
        raise UserError(
            f"data: at least {LEAST} images are needed to compare with, got "
            f"{len(train.indices)}; name a larger set with --data"
        )
    try:
        others = _others(model, data)
    except UserError as error:
        log.warning("samples are compared only with the training images: %s", error)
        return [train]
    if others is None:
        return [train]
    if len(others.indices) < 2:
        log.warning("%s: skipped, since one image is too few to compare with", others.split)
        return [train]
    return [train, others]


def _others(model: Loaded, data: str | None) -> Images | None:
    """The images that were not trained on, or None where none are known."""
    config = model.ddpm.config.data
    if data is None and (config.test or (model.data_fingerprint and config.holdout)):
        return read_split(model)
    if data is not None and data.startswith("tfds:"):
        return read_split(model, "test", data)
    return None


def _features_of_samples(extractor: Extractor, model: Loaded, place, n: int, folder) -> Features:
    """Kept by the bytes of the files, which somebody may have put others in the place of."""
    wait_for_all("samples")
    files = sample_files(model.ddpm)

    def tag(indices):
        hashed = hashlib.blake2b(digest_size=8)
        for i in indices:
            hashed.update(files.file(place, i).read_bytes())
        return hashed.hexdigest()

    def read(indices):
        return np.stack([files.read(files.file(place, i)) for i in indices])

    return features_of(extractor, read, n, folder / f"features-{extractor.sha256[:16]}", tag)


def _compare(drawn: Features, references: dict[Split, Reference], kind: str) -> dict[str, dict]:
    """The values by their names; those of a proxy are called so."""
    n = len(drawn.features)
    warn_of_few(n, references)
    score = metrics.inception_score(drawn.logits)
    error_is = "standard deviation over 10 parts of the samples"
    values = {"is": _value("IS", score.mean, score.std, error_is)}
    own = metrics.statistics(drawn.features)
    for split, reference in references.items():
        fid = metrics.frechet_distance(own, reference.statistics)
        error = metrics.fid_error(drawn.features, reference.statistics)
        error_is = "jackknife over 10 groups of the samples"
        values[f"fid_{split}"] = _value(f"FID ({split})", fid, error, error_is)
    real = references["train"].features
    kid = metrics.kernel_distance(drawn.features, real)
    error_is = "standard error over subsets and images"
    values["kid_train"] = _value("KID (train)", kid.mean, kid.error, error_is)
    # Both depend on the numbers of images, which are made the same.
    some = min(n, len(real))
    places = np.linspace(0, len(real) - 1, some).astype(int)
    both = metrics.precision_recall(real[places], drawn.features[:some])
    error_is = f"binomial, {some} of each set"
    values["precision_train"] = _value(
        "precision (train)", both.precision, both.precision_error, error_is
    )
    values["recall_train"] = _value("recall (train)", both.recall, both.recall_error, error_is)
    if kind == "proxy":
        return {f"proxy_{name}": _as_proxy(value) for name, value in values.items()}
    return values


def _by_class(
    drawn: Features, labels: np.ndarray, real: np.ndarray, reference: Reference, result: dict
) -> dict[str, Any]:
    """The classes' figures, and how many of the samples the proxy names by their label.

    `labels` are those of the samples, `real` those of the images trained on.
    """
    named = None
    values = result["values"]
    has_label = labels >= 0
    if result["features"]["kind"] == "proxy" and has_label.any():
        named = np.unique(real)[drawn.logits.argmax(axis=1)]
        right = float((named == labels)[has_label].mean())
        count = int(has_label.sum())
        error = float(np.sqrt(right * (1 - right) / count))
        words = f"binomial, {count} samples with a label"
        values = {**values, "proxy_named_right": _value("proxy named right", right, error, words)}
    of_reference = real[compared(len(real))]
    rows = of_classes(drawn.features, labels, reference.features, of_reference, named)
    return {"values": values, "classes": rows}


def warn_of_few(n: int, references: dict[Split, Reference]) -> None:
    """Logs where `n` samples, or the real images, are fewer than the features that FID takes."""
    dim = next(iter(references.values())).features.shape[1]
    counts = {f"images of {split}": each.statistics.count for split, each in references.items()}
    for what, count in {"samples": n, **counts}.items():
        if count <= dim:
            log.warning(
                "%d %s for %d features: too few, so FID is far too large (singular covariance)",
                count,
                what,
                dim,
            )


def _as_proxy(value: dict) -> dict:
    return {**value, "title": f"proxy {value['title']}"}


def _likelihood(model: Loaded, sets, seed, batch_size, folder) -> dict[str, dict]:
    """The bound on the images that were not trained on, where there are any.

    Kept in `folder`, or in the run's likelihood/ if that is None.
    """
    if len(sets) < 2:
        log.info("likelihood: skipped, since no test or held-out images are known")
        return {}
    images = sets[1]
    if folder is not None:
        folder = folder / f"likelihood-{images.split}-{images.source.fingerprint[:8]}"
    summary = measure(model, images, seed=seed, batch_size=batch_size, out=folder).summary
    error = summary["standard_error_over_images"]
    error_is = f"standard error over the {len(images.indices)} images"
    given = " | label" if summary.get("conditional") else ""
    title = f"NLL ({images.split}{given}), bits/dim <="
    return {f"nll_{images.split}": _value(title, summary["total"], error, error_is)}


def _likelihood_in(file, model: Loaded) -> dict[str, dict]:
    """What an earlier evaluation measured that wrote `file`, if it was of the same model."""
    before = read_table(file) if agreed(file.exists()) else {}
    if any(before.get(name) != value for name, value in model.label.items()):
        return {}
    values = before.get("values")
    if not isinstance(values, dict) or not all(map(_is_value, values.values())):
        raise UserError(f"{file}: holds no values of an evaluation; delete it to compute it again")
    return {name: value for name, value in values.items() if name.startswith("nll_")}


def _is_value(value) -> bool:
    """Whether it is like those of `_value`."""
    if not isinstance(value, dict) or value.keys() != _value("", 0, 0, "").keys():
        return False
    texts = [value["title"], value["error_is"]]
    numbers = [value["value"], value["error"]]
    return all(isinstance(text, str) for text in texts) and all(
        isinstance(number, int | float) for number in numbers
    )


def _value(title: str, value: float, error: float, error_is: str) -> dict[str, Any]:
    return {"title": title, "value": value, "error": error, "error_is": error_is}
