"""A data set of tfds prepared without TensorFlow, and what hides TensorFlow from a program."""

import importlib.machinery

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

COUNTS = {"train": 40, "validation": 6}


class OwnPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Noise, 6x5 pixels; the label is the key modulo 3."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(6, 5, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in COUNTS}

    def _generate_examples(self, split):
        for key in range(COUNTS[split]):
            yield key, {"image": Image.fromarray(pixels(split)[key]), "label": key % 3}


def pixels(split):
    """uint8 [N,6,5,3], in the order of the keys; tfds shuffles them."""
    return np.random.default_rng(COUNTS[split]).integers(
        0, 256, (COUNTS[split], 6, 5, 3), dtype=np.uint8
    )


def prepare(folder, cls=OwnPictures):
    """Writes the set below `folder`."""
    cls(data_dir=folder, file_format="array_record").download_and_prepare()


class NoTensorFlow:
    """On sys.meta_path: makes importing TensorFlow fail.

    A None in sys.modules would mislead tfds.
    """

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self)
            if name.partition(".")[0] == "tensorflow"
            else None
        )

    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r}")

    def exec_module(self, module):
        raise NotImplementedError
