"""Prints how well halves that a model inpaints fit the known ones: seam.py MODEL IMAGES [STEPS].

IMAGES is an .npz with `images` uint8 [N,H,W,C], and `labels` [N] for a model with classes. For each
known half, the mean step of grey across the seam, as a part of that of the same line in the images;
1 is a perfect fit. JSON.
"""

import json
import sys

import numpy as np

from ddpm_jax import load
from ddpm_jax.keys import seed_key


def half(image_shape, side):
    """A mask [1,H,W,1], 1 where the left or the top half is known."""
    height, width, _ = image_shape
    mask = np.zeros((1, height, width, 1), np.float32)
    if side == "left":
        mask[:, :, : width // 2] = 1
    else:
        mask[:, : height // 2] = 1
    return mask


def across(images, side):
    """The mean absolute difference of the two lines of pixels that meet in the middle."""
    along = np.moveaxis(np.float64(images), 2 if side == "left" else 1, 1)
    middle = along.shape[1] // 2
    return np.abs(along[:, middle] - along[:, middle - 1]).mean()


def main(model, images, steps=50):
    ddpm, params = load(model)
    with np.load(images) as arrays:
        known = arrays["images"] / np.float32(127.5) - 1
        labels = arrays.get("labels")
    ratios = {}
    for side in ("left", "top"):
        mask = half(ddpm.image_shape, side)
        drawn = ddpm.inpaint(params, seed_key(0), known, mask, steps=int(steps), labels=labels)
        hidden = np.broadcast_to(mask == 0, known.shape)
        assert (drawn[~hidden] == known[~hidden]).all()
        assert (drawn[hidden] != known[hidden]).mean() > 0.5
        ratios[side] = across(drawn, side) / across(known, side)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main(*sys.argv[1:])
