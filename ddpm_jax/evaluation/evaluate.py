"""How good a model's samples are: the row of the paper's Table 1, and KID, precision and recall.

RUN/evaluation/STEP-WEIGHTS-SAMPLER-seedN/
  samples/         as `ddpm-jax sample --out` makes them, and may have made them
  features-.../    one file for every few images
  KIND-N-SETS.json the result, with all that it depends on
"""

import dataclasses
import functools
import hashlib
import json
import logging
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.config import to_dict
from ddpm_jax.data import Source, load_source
from ddpm_jax.data.decode import decode
from ddpm_jax.ddpm import ANCESTRAL, Sampler, seed_key
from ddpm_jax.devices.mesh import describe_devices, make_mesh
from ddpm_jax.devices.processes import agreed, wait_for_all
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.bound import measure
from ddpm_jax.evaluation.features import (
    Extractor,
    Features,
    Reference,
    cache_root,
    features_of,
    inception,
    proxy,
    reference_of,
)
from ddpm_jax.evaluation.paper import results_of
from ddpm_jax.evaluation.sample import fill_folder, image_file
from ddpm_jax.evaluation.splits import Split, default_split, read_split
from ddpm_jax.storage.files import path_of, read_json, write_file
from ddpm_jax.storage.run import Weights, versions
from ddpm_jax.weights.load import Loaded, home, load_weights, words_of

log = logging.getLogger(__name__)

LEAST = 20
"""Samples, and images trained on, that errors can be told of."""


class Images(NamedTuple):
    """A set of real images."""

    split: Split
    source: Source
    indices: np.ndarray


def evaluate(
    run: epath.PathLike,
    data: str | None = None,
    n: int = 50_000,
    seed: int = 0,
    weights: Weights | None = None,
    step: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler = ANCESTRAL,
    inception_file: epath.PathLike | None = None,
    samples: epath.PathLike | None = None,
    likelihood: bool = True,
    out: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Compares images 0, ..., n - 1 of key(seed) with real ones; goes on with what is there. Returns what it writes.

    The real images are `data` (folder:PATH, npz:PATH or tfds:NAME, of which the test split counts too), or else those
    the run was trained on and those it was not. Features are FID's InceptionV3's with the weights of `inception_file`,
    or else those of a small classifier trained on the images' labels, whose numbers are called proxy. `samples` is a
    folder that `ddpm-jax sample` filled or that is filled now. `likelihood` measures the bound on the images that
    were not trained on, as `ddpm-jax likelihood` does. Raises UserError for what cannot be used, and for weights
    that are known not to be averaged unless `weights` is raw.
    """
    if n < LEAST:
        raise UserError(f"n: must be at least {LEAST}, got {n}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}")
    seed_key(seed)
    mesh = make_mesh()
    model = load_weights(run, weights=weights, step=step, mesh=mesh)
    if model.kind == "raw" and weights != "raw":
        raise UserError(
            f"weights: {run} holds weights that are not averaged; say --weights raw to evaluate those"
        )
    config = model.ddpm.config
    sampler.check(config)
    folder = path_of(out) if out else home(run) / "evaluation" / _name(model, sampler, seed)

    sets = _real_images(model, data)
    root = cache_root(sets[0].source, folder / "real")
    extractor = (
        inception(inception_file, mesh) if inception_file else proxy(*sets[0][1:], root, mesh)
    )
    references = {
        each.split: reference_of(extractor, each.source, each.indices, root) for each in sets
    }
    place = path_of(samples) if samples else folder / "samples"
    fill_folder(place, model, n, seed, sampler, batch_size or 64 * mesh.size)
    drawn = _features_of_samples(extractor, model, place, n, folder)
    result = {
        **{"run": str(run), **model.label, "seed": seed, **sampler.options, "samples": n},
        "diffusion": to_dict(config)["diffusion"],
        "features": {"kind": extractor.kind, "sha256": extractor.sha256, **extractor.about},
        "data": data or config.data.source,
        "references": [
            {"split": split, "data_fingerprint": source.fingerprint, "images": len(indices)}
            for split, source, indices in sets
        ],
        "rounding": "to the nearest of the 256 levels",
        **{"versions": versions(), "devices": describe_devices(mesh)},
        "paper": results_of(config, data or config.data.source),
        "values": _compare(drawn, references, extractor.kind),
    }
    file = folder / f"{extractor.kind}-{n}-{_hash_of(sets)}.json"
    if likelihood:
        write_file(file, json.dumps(result, indent=1).encode())  # The likelihood may take long.
        result["values"] |= _likelihood(
            run, data, sets, folder, out, model, seed, weights, batch_size
        )
    else:
        result["values"] |= _likelihood_in(file, model)
    write_file(file, json.dumps(result, indent=1).encode())
    log.info("%s", file)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text, beside the paper's own where it has such a row."""
    features = result["features"]
    is_proxy = features["kind"] == "proxy"
    paper = {} if is_proxy else result["paper"]
    steps = "" if result["steps"] is None else f" of {result['steps']} steps"
    against = ", ".join(
        f"{each['images']} images of {each['split']}" for each in result["references"]
    )
    lines = [
        f"{result['run']}: {words_of(result['weights'], result['step'])}, {result['sampler']}{steps}",
        f"{result['samples']} samples of seed {result['seed']} against {against}",
        f"features: {features['kind']}, sha256 {features['sha256'][:16]}",
        f"{'':28}{'here':>10}{'error':>10}{'  the paper' if paper else ''}",
    ]
    for name, value in result["values"].items():
        lines.append(
            f"{value['title']:28}{value['value']:10.5f}{value['error']:10.5f}  {paper.get(name, '')}".rstrip()
        )
    if is_proxy:
        lines += [
            f"proxy: by a classifier of these images that names {features['accuracy']:.1%} of held-out ones right. It",
            "compares models of the same images with each other, and with no published number: --inception PATH does",
        ]
    return "\n".join(lines)


def _name(model: Loaded, sampler: Sampler, seed: int) -> str:
    """Of the folder for what is made with these."""
    drawn_by = [str(option) for option in sampler.options.values() if option is not None]
    return "-".join([f"{model.step:08d}", model.kind, *drawn_by, f"seed{seed}"])


def _hash_of(sets: list[Images]) -> str:
    """Which images are compared with."""
    hashed = hashlib.blake2b(digest_size=4)
    for split, source, indices in sets:
        hashed.update(
            f"{split} {source.fingerprint}".encode() + np.asarray(indices, np.int64).tobytes()
        )
    return hashed.hexdigest()


def _real_images(model: Loaded, data: str | None) -> list[Images]:
    """The sets to compare with, that of the images trained on first."""
    config = model.ddpm.config
    channels = config.data.image_shape[-1]
    if channels not in (1, 3):
        raise UserError(
            f"data.image_shape: samples of 1 or 3 channels can be evaluated, not of {channels}"
        )
    if data is None:
        train = Images("train", *read_split(model, "train"))
    else:
        source = load_source(dataclasses.replace(config.data, source=data))
        train = Images("train", source, np.arange(len(source)))
    if len(train.indices) < LEAST:
        raise UserError(
            f"data: at least {LEAST} images are needed to compare with, and there are {len(train.indices)}"
        )
    try:
        others = _others(model, data)
    except UserError as error:
        log.warning("%s: the samples are compared with the train images alone", error)
        return [train]
    if others is not None and len(others.indices) < 2:
        log.warning("one image of %s is too few to compare with, and left out", others.split)
        return [train]
    return [train] if others is None else [train, others]


def _others(model: Loaded, data: str | None) -> Images | None:
    """The images that were not trained on, or None where none are known."""
    config = model.ddpm.config
    if data is None and (config.data.test or (model.data_fingerprint and config.data.holdout)):
        split = default_split(config)
        return Images(split, *read_split(model, split))
    if data is not None and data.startswith("tfds:"):
        source = load_source(dataclasses.replace(config.data, test=data), test=True)
        return Images("test", source, np.arange(len(source)))
    return None


def _features_of_samples(extractor: Extractor, model: Loaded, place, n: int, folder) -> Features:
    """Kept by the bytes of the files, which somebody may have put others in the place of."""
    wait_for_all("samples")

    def tag(indices):
        hashed = hashlib.blake2b(digest_size=8)
        for i in indices:
            hashed.update(image_file(place, i).read_bytes())
        return hashed.hexdigest()

    read = functools.partial(_read_samples, place, model.ddpm.image_shape)
    return features_of(extractor, read, n, folder / f"features-{extractor.sha256[:16]}", tag)


def _read_samples(place, image_shape, indices) -> np.ndarray:
    files = [image_file(place, i) for i in indices]
    return np.stack([decode(file.read_bytes(), image_shape, file.name) for file in files])


def _compare(drawn: Features, references: dict[Split, Reference], kind: str) -> dict[str, dict]:
    """The values by their names; those of a proxy are called so."""
    n, dim = drawn.features.shape
    counts = {
        "samples": n,
        **{f"images of {split}": each.statistics.count for split, each in references.items()},
    }
    for what, count in counts.items():
        if count <= dim:
            log.warning(
                "%d %s for %d features: their covariance is singular, and FID far too large",
                count,
                what,
                dim,
            )
    score = metrics.inception_score(drawn.logits)
    values = {
        "is": _value("IS", score.mean, score.std, "standard deviation over 10 parts of the samples")
    }
    own = metrics.statistics(drawn.features)
    for split, reference in references.items():
        fid = metrics.frechet_distance(own, reference.statistics)
        error = metrics.fid_error(drawn.features, reference.statistics)
        values[f"fid_{split}"] = _value(
            f"FID ({split})", fid, error, "jackknife over 10 groups of the samples"
        )
    real = references["train"].features
    kid = metrics.kernel_distance(drawn.features, real)
    values["kid_train"] = _value(
        "KID (train)", kid.mean, kid.error, "standard error over subsets and images"
    )
    # Both depend on the numbers of images, which are made the same.
    some = min(n, len(real))
    both = metrics.precision_recall(
        real[np.linspace(0, len(real) - 1, some).astype(int)], drawn.features[:some]
    )
    for name in ("precision", "recall"):
        error = getattr(both, f"{name}_error")
        values[f"{name}_train"] = _value(
            f"{name} (train)", getattr(both, name), error, f"binomial, {some} of each set"
        )
    if kind == "proxy":
        return {
            f"proxy_{name}": value | {"title": f"proxy {value['title']}"}
            for name, value in values.items()
        }
    return values


def _likelihood(
    run, data, sets, folder, out, model: Loaded, seed, weights, batch_size
) -> dict[str, dict]:
    """The bound on the images that were not trained on, where there are any."""
    if len(sets) < 2:
        log.info("likelihood: left out, for no images are known that were not trained on")
        return {}
    split, source, indices = sets[1]
    summary = measure(
        **{
            "run": run,
            "split": split,
            "seed": seed,
            "weights": weights,
            "step": model.step,
            "batch_size": batch_size,
        },
        data=data,
        out=folder / f"likelihood-{split}-{source.fingerprint[:8]}" if out else None,
    ).summary
    error, words = (
        summary["standard_error_over_images"],
        f"standard error over the {len(indices)} images",
    )
    return {f"nll_{split}": _value(f"NLL ({split}), bits/dim <=", summary["total"], error, words)}


def _likelihood_in(file, model: Loaded) -> dict[str, dict]:
    """What an earlier evaluation measured that wrote `file`, if it was of the same model."""
    before = read_json(file) if agreed(file.exists()) else {}
    if any(before.get(name) != value for name, value in model.label.items()):
        return {}
    return {name: value for name, value in before["values"].items() if name.startswith("nll_")}


def _value(title: str, value: float, error: float, error_is: str) -> dict[str, Any]:
    return {"title": title, "value": value, "error": error, "error_is": error_is}
