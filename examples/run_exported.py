"""Draws images with an exported model, without ddpm_jax.

    pip install jax numpy flatbuffers
    ddpm-jax export RUN --format stablehlo --out FOLDER
    python examples/run_exported.py FOLDER -n 16 --seed 0 --out samples.npz

The images are uint8 [n,H,W,C], named `images`. They are the same as those of
`ddpm-jax sample RUN -n 16 --seed 0 --out samples.npz`.

A model with classes takes `--labels 0 1 2 --guidance 3`, as `ddpm-jax sample` does: of k labels,
image i has number i modulo k, and -1 is no class. The file then has the `labels`, too. The program
computes guidance 1 as any other, so that there a few numbers differ by 1 from those of the command.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path, help="folder of the exported model")
parser.add_argument("-n", type=int, default=16, help="number of images")
parser.add_argument("--seed", type=int, default=0, help="seed of the images")
parser.add_argument("--labels", type=int, nargs="+", help="classes, in turn; -1 is no class")
parser.add_argument("--guidance", type=float, help="above 1, further towards the class")
parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
parser.add_argument("--out", type=Path, default="samples.npz", help="file to write, a .npz")
options = parser.parse_args()


def labels_and_guidance(classes):
    """Lists of the labels and the guidance that the options say; empty where none is taken.

    `classes` is what about.json says of the model's classes, None for a model without.
    """
    labels, guidance = options.labels, options.guidance
    if classes is None:
        if labels is not None or guidance is not None:
            sys.exit("--labels, --guidance: this model was trained without classes; leave them out")
        return [], []
    last, no_class = classes["number"] - 1, classes["no_class"]
    if labels is None and not no_class:
        sys.exit(f"--labels: this model knows no images without a class; give some of 0 to {last}")
    outside = [label for label in labels or [] if not -no_class <= label <= last]
    if outside:
        or_none = ", or -1 for no class" if no_class else ""
        sys.exit(f"--labels: must be from 0 to {last}{or_none}, got {outside[0]}")
    if guidance is None:
        guidance = 1.0
    if not math.isfinite(guidance):
        sys.exit(f"--guidance: must be a finite number, got {guidance}")
    if guidance != 1 and labels is None:
        sys.exit("--guidance: leads images towards their class; give --labels, too")
    if guidance != 1 and not no_class:
        sys.exit("--guidance: this model knows no images without a class; leave it out")
    return labels or [-1], [np.float32(guidance)] if no_class else []


if importlib.util.find_spec("flatbuffers") is None:  # jax reads programs with it, unasked.
    sys.exit("flatbuffers is missing; pip install jax numpy flatbuffers")
if options.n < 1 or options.batch_size < 1 or not 0 <= options.seed < 2**32:
    sys.exit("-n and --batch-size must be at least 1, --seed from 0 to 2**32 - 1")
if options.out.suffix != ".npz" or not options.out.parent.is_dir():
    sys.exit(f"--out {options.out} must end in .npz and be in a folder that exists")

try:
    about = json.loads((options.folder / "about.json").read_text())
    for name, expected in about["sha256"].items():
        if hashlib.sha256((options.folder / name).read_bytes()).hexdigest() != expected:
            sys.exit(f"{options.folder / name}: damaged, its sha256 differs; export it again")
except (OSError, ValueError, KeyError) as error:
    sys.exit(
        f"{options.folder}: not an exported model ({error!r}); "
        "make one with ddpm-jax export RUN --format stablehlo"
    )

labels, guidance = labels_and_guidance(about.get("classes"))
sample = jax.jit(
    export.deserialize(bytearray((options.folder / "sampler.stablehlo").read_bytes())).call
)
params = dict(np.load(options.folder / "params.npz"))
key = jax.random.key_data(jax.random.key(options.seed, impl="threefry2x32"))

images = []
for start in range(0, options.n, options.batch_size):
    left = options.n - start
    # Batch sizes are powers of two, as in `ddpm-jax sample`: then the last bits agree too.
    size = min(options.batch_size, 1 << (left - 1).bit_length())
    indices = start + np.arange(size, dtype=np.uint32)
    of_images = [np.int32(labels)[indices % len(labels)]] if labels else []
    x = np.asarray(sample(params, key, indices, *of_images, *guidance))[:left]
    if not np.isfinite(x).all():
        sys.exit("some images are not finite: the model's weights may have diverged")
    images.append(np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8))
drawn = {"images": np.concatenate(images)}
if options.labels:
    drawn["labels"] = np.resize(np.int32(labels), options.n)
np.savez_compressed(options.out, **drawn)
print(f"{options.n} images {about['image_shape']}: {options.out}")
