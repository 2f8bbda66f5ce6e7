"""Draws images with an exported model, without ddpm_jax.

    pip install jax numpy flatbuffers
    ddpm-jax export RUN --format stablehlo --out FOLDER
    python examples/run_exported.py FOLDER -n 16 --seed 0 --out samples.npz

The images are uint8 [n,H,W,C], named `images`. They are the same as those of
`ddpm-jax sample RUN -n 16 --seed 0 --out samples.npz`.
"""

import argparse
import hashlib
import importlib.util
import json
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
parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
parser.add_argument("--out", type=Path, default="samples.npz", help="file to write, a .npz")
options = parser.parse_args()
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
    x = np.asarray(sample(params, key, indices))[:left]
    if not np.isfinite(x).all():
        sys.exit("some images are not finite: the model's weights may have diverged")
    images.append(np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8))
np.savez_compressed(options.out, images=np.concatenate(images))
print(f"{options.n} images {about['image_shape']}: {options.out}")
