"""The networks. No other part of the package imports Flax."""

from ddpm_jax.models.classifier import Classifier, classifier_features, init_classifier
from ddpm_jax.models.inception import inception_features, inception_shapes, preprocess
from ddpm_jax.models.layers import TILES
from ddpm_jax.models.parameters import parameter_shapes
from ddpm_jax.models.unet import UNet, init_params
from ddpm_jax.models.winograd import tile_kernels

__all__ = [
    "TILES",
    "Classifier",
    "UNet",
    "classifier_features",
    "inception_features",
    "inception_shapes",
    "init_classifier",
    "init_params",
    "parameter_shapes",
    "preprocess",
    "tile_kernels",
]
