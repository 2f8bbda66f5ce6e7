"""How good the samples of each class are: KID from its real images, and whether it is recognised.

KID has no bias, so that it says something of the few images of a class.
"""

from typing import Any

import numpy as np

from ddpm_jax.evaluation.metrics import kernel_distance
from ddpm_jax.shapes import Float, Integer

LEAST = 20
"""Fewest samples and real images of a class that its KID is computed from."""

ROWS = 50
"""Most classes in the table."""

Rows = list[dict[str, Any]]


def of_classes(
    features: Float[np.ndarray, "n d"],
    labels: Integer[np.ndarray, " n"],
    real: Float[np.ndarray, "m d"],
    real_labels: Integer[np.ndarray, " m"],
    named: Integer[np.ndarray, " n"] | None,
) -> Rows:
    """A row for each class among the `labels` of samples, by the features of both sets.

    `named` are the labels that a classifier gives the samples. A figure that is not known is None.
    """
    rows = []
    for label in np.unique(labels[labels >= 0]).tolist():
        drawn = labels == label
        own = features[drawn]
        others = real[real_labels == label]
        kid = kernel_distance(own, others) if min(len(own), len(others)) >= LEAST else None
        rows.append(
            {
                "label": label,
                "samples": len(own),
                "images": len(others),
                "kid": None if kid is None else kid.mean,
                "kid_error": None if kid is None else kid.error,
                "named_right": None if named is None else float((named[drawn] == label).mean()),
            }
        )
    return rows


def lines_of(rows: Rows, kid: str) -> list[str]:
    """The rows as text; `kid` is the name of their KID."""
    lines = [f"{'class':>10}{'samples':>10}{'images':>10}{kid:>12}{'error':>10}  named right"]
    for row in rows[:ROWS]:
        line = f"{row['label']:10}{row['samples']:10}{row['images']:10}"
        line += f"{_number(row['kid']):>12}{_number(row['kid_error']):>10}"
        right = row["named_right"]
        lines.append(f"{line}{'-' if right is None else f'{right:.1%}':>13}")
    if len(rows) > ROWS:
        lines.append(f"and {len(rows) - ROWS} classes more, which the file of results has")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
