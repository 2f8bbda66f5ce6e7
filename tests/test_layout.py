"""What the repository promises about its own shape."""

import ast
import importlib
from pathlib import Path

import pytest

import ddpm_jax
from ddpm_jax.config import shipped_configs

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ddpm_jax").rglob("*.py"))

# Files of the root and rooms: each imports only from those in lines above its own.
ORDER = """
errors schedule
diffusion
losses samplers
likelihood
models
config
devices
data
ddpm
storage
weights
training
evaluation
figures
cli
__main__
""".strip().splitlines()

# Who may import what: the mathematics knows jax and numpy only, and each library has its place.
MATHEMATICS = {"schedule", "diffusion", "losses", "samplers", "likelihood"}
PLACES = {
    "flax": {"models"},
    "orbax": {"storage/checkpoint"},
    "tyro": {"cli"},
    "tensorboardX": {"training/logs"},
    "optax": {"training/update", "evaluation/proxy"},
    "matplotlib": {"figures"},
    "tensorflow_datasets": {"data/tfds"},
    "tensorflow": {"data/tfds"},
    "grain": {"data/stream"},
    "safetensors": {"weights", "evaluation/inception_weights"},
    "huggingface_hub": {"weights/hub"},
}


def module(path):
    """Its name in ORDER: the file's, or the room's that it stands in."""
    return path.relative_to(ROOT / "ddpm_jax").parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "ddpm_jax":
                yield from (f"ddpm_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=module)
def test_files_import_only_from_those_above(path):
    row = {name: number for number, line in enumerate(ORDER) for name in line.split()}
    name = module(path)
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        if top == "ddpm_jax":
            other = rest.split(".")[0]
            assert other in {name, "__version__"} or row[other] < row[name], (
                f"{path} imports {imported}"
            )
        elif name in MATHEMATICS:
            assert top in {
                "jax",
                "numpy",
                "collections",
                "dataclasses",
                "inspect",
                "math",
                "typing",
            }, f"{path}: {imported}"
        if top in PLACES:
            place = path.relative_to(ROOT / "ddpm_jax").with_suffix("").as_posix()
            assert {name, place} & PLACES[top], f"{path} imports {imported}"


def test_grain_and_tfds_are_imported_when_they_are_needed():
    """They take a second each, which a run on an array shall not."""
    late = {"tfds": "tensorflow_datasets", "stream": "grain"}
    for path in FILES:
        for library in {"tensorflow_datasets", "grain"} & {
            name.partition(".")[0] for name in imports(path)
        }:
            assert module(path) == "data" and late.get(path.stem) == library, (
                f"{path} imports {library}"
            )
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert node.module not in {f"ddpm_jax.data.{name}" for name in late}, (
                    f"{path} imports {node.module}"
                )


@pytest.mark.parametrize("folder", ["benchmarks", "scripts"])
def test_what_no_test_runs_imports_names_that_are_there(folder):
    imports = [
        (file.name, node.module, alias.name)
        for file in sorted((ROOT / folder).glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module
        and node.module.partition(".")[0] == "ddpm_jax"
        for alias in node.names
    ]
    assert (
        imports
        and [each for each in imports if not hasattr(importlib.import_module(each[1]), each[2])]
        == []
    )


def test_every_name_of_the_package_is_there_and_documented():
    for name in ddpm_jax.__all__:
        assert getattr(ddpm_jax, name).__doc__, name


def test_public_functions_have_docstrings():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_nothing_is_ever_unpickled():
    for path in FILES:
        text = path.read_text()
        assert "allow_pickle=True" not in text and "pickle" not in set(imports(path)), path


def test_configs_promise_something():
    for name, path in shipped_configs().items():
        assert f"ddpm-jax train {name}" in ast.get_docstring(ast.parse(path.read_text())), path
