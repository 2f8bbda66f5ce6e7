"""The commands at a glance, as `ddpm-jax --help` prints them."""

import textwrap

from ddpm_jax.config.shipped import shipped_configs

# The figures by their names on the command line: the class of each in ddpm_jax.figures.
FIGURES = {
    "rate-distortion": "RateDistortion",
    "progressive": "Progressive",
    "shared-latent": "SharedLatent",
    "interpolate": "Interpolate",
    "neighbours": "Neighbours",
    "steps": "Steps",
    "codec": "Codec",
    "schedule": "Schedules",
}

# The edits likewise: the class of each in ddpm_jax.cli.edit.
EDITS = {
    "inpaint": "Inpaint",
    "vary": "Vary",
    "upscale": "Upscale",
    "colourise": "Colourise",
    "deblur": "Deblur",
}

USAGE = """usage: ddpm-jax COMMAND ...

  train CONFIG     train a model, or resume a run; CONFIG is a file or one of
                   {configs}
  plan CONFIG      estimate memory, FLOPs and hours of a run; writes nothing
  sample RUN       draw images from a trained model
  edit NAME RUN IMAGE
                   change images with a trained model; NAME is one of
                   {edits}
  compress RUN IMAGES
                   write images as one file, every prefix of which decodes
  decompress RUN FILE.ddpm
                   make pictures of such a file
  likelihood RUN   measure the bits per dimension of a split
  calibrate RUN    measure what --variance optimal and --grid likelihood need
  tune RUN         find the best sampler of few steps, such as 10
  evaluate RUN     measure IS, FID, KID, precision, recall and likelihood
  export RUN       write a .safetensors file, a diffusers folder or StableHLO
  figure NAME RUN  draw one of the paper's figures; NAME is one of
                   {figures}
                   (schedule needs no RUN)
  report RUN ...   write one HTML file that shows runs, or compares them

A RUN is the run directory of a training, a .safetensors file, a diffusers
folder, or a model's name on huggingface.co.

ddpm-jax COMMAND --help shows the options; ddpm-jax --version, the version."""


def usage() -> str:
    """What `ddpm-jax --help` prints."""
    return USAGE.format(
        configs=_lines(shipped_configs()), figures=_lines(FIGURES), edits=_lines(EDITS)
    )


def _lines(names) -> str:
    """The names, as many a line as fit under the commands' descriptions."""
    indent = " " * 19
    text = ", ".join(names)
    return textwrap.fill(text, 78, subsequent_indent=indent, initial_indent=indent).strip()
