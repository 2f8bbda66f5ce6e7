"""What a report computes."""

from typing import Literal

Compute = Literal["quick", "none"]
"""A few samples and their nearest training images, or nothing."""
