"""The configs that come with the package."""

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """The files of the shipped configs, by name."""
    package = Path(__file__).parent.parent
    # In a wheel they lie inside the package, in a checkout beside it.
    folder = next(
        path for path in (package / "configs", package.parent / "configs") if path.is_dir()
    )
    return {path.stem: path for path in sorted(folder.glob("*.py"))}
