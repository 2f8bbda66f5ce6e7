"""The shape that the repository promises: rooms, the order between them, each library's place."""

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

import ddpm_jax
from ddpm_jax import keys
from ddpm_jax.config import shipped_configs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ddpm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Files of the root and rooms: each imports only from those in lines above its own.
ORDER = """
errors shapes
keys schedule
diffusion
losses samplers calibration
likelihood average guidance operators
editing
config
sampler models
devices
data
calls
ddpm
storage
compression
weights
evaluation
training
figures
report
cli
__main__
""".strip().splitlines()

# The mathematics knows jax and numpy only, and each library has its place.
MATHEMATICS = {"shapes", "keys", "schedule", "diffusion", "losses", "samplers", "likelihood"}
MATHEMATICS |= {"average", "calibration", "guidance", "operators", "editing"}
STANDARD = {"collections", "dataclasses", "functools", "inspect", "math", "typing"}
PLACES = {
    "jaxtyping": {"shapes"},
    "flax": {"models"},
    "orbax": {"storage/restore"},
    "tyro": {"cli"},
    "tensorboardX": {"training/logs"},
    "optax": {"training/update", "evaluation/proxy"},
    "matplotlib": {"figures"},
    "tensorflow_datasets": {"data/tfds"},
    "tensorflow": {"data/tfds"},
    "grain": {"data/stream"},
    "datasets": {"data/hf"},
    "pyarrow": {"data/hf"},
    "constriction": {"compression/numbers"},
    "tifffile": {"data/tiff"},
    "safetensors": {"weights", "evaluation/inception_weights"},
    "huggingface_hub": {"weights/hub"},
}


def place(path):
    """The file without its ending, from the package on: "data/stream"."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room(path):
    """Its name in ORDER: the file's, or the room's that it stands in."""
    return place(path).partition("/")[0]


def imports(path, tree=None):
    """The modules and names that a file imports, inside functions too."""
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(imported):
    """The package's file that `imported` names, or that holds it; None for another package."""
    parts = imported.split(".")
    if parts[0] != "ddpm_jax":
        return None
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    raise AssertionError(f"{imported} is not there")


INSIDE = [path for path in FILES if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", INSIDE, ids=place)
def test_files_import_only_from_rooms_above(path):
    row = {name: number for number, line in enumerate(ORDER) for name in line.split()}
    for imported in imports(path):
        file = file_of(imported)
        if file in (None, PACKAGE / "__init__.py"):  # The version is a name of the package itself.
            continue
        own, other = room(path), room(file)
        assert other == own or row[other] < row[own], f"{path} imports {imported}"


def test_no_file_imports_itself_by_a_detour():
    """Inside a room, and within functions too: a package's __init__ counts where it is named."""
    graph = {
        path: {file_of(imported) for imported in imports(path)} - {None, path} for path in INSIDE
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # Raises CycleError.


@pytest.mark.parametrize("path", FILES, ids=place)
def test_every_library_has_its_place(path):
    for imported in imports(path):
        top = imported.partition(".")[0]
        if top in PLACES:
            assert {room(path), place(path)} & PLACES[top], f"{path} imports {imported}"
        if room(path) in MATHEMATICS and top != "ddpm_jax":
            assert top in {"jax", "jaxtyping", "numpy", *STANDARD}, f"{path} imports {imported}"


def test_the_root_holds_the_paper_and_what_users_call():
    files = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert len(files) <= 14, files
    rooms = {room(path) for path in FILES if path.parent != PACKAGE}
    assert rooms <= {name for line in ORDER for name in line.split()}


def test_grain_tfds_and_hf_are_imported_when_they_are_needed():
    """They take seconds each, which a run on an array shall not."""
    late = {"data/tfds", "data/stream", "data/hf"}
    for path in FILES:
        tree = ast.parse(path.read_text())
        at_import = ast.Module([node for node in tree.body if not _is_definition(node)], [])
        for imported in imports(path, at_import):
            file = file_of(imported)
            assert file is None or place(file) not in late, f"{path} imports {imported}"


def _is_definition(node):
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_numbers_that_keys_are_folded_with_stand_in_one_file_and_differ():
    for family, numbers in keys.FAMILIES.items():
        assert len(set(numbers)) == len(numbers), family
        assert all(0 <= number < 2**32 for number in numbers), family
    named = {
        value for name, value in vars(keys).items() if name.isupper() and isinstance(value, int)
    }
    assert named == {number for numbers in keys.FAMILIES.values() for number in numbers}
    # Counters of steps and images share these keys.
    assert min(*keys.FAMILIES["run"], *keys.FAMILIES["image"]) > 2**31
    for path in FILES:
        if path.name == "keys.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("fold_in"):
                number = node.args[-1]
                named_or_counted = any(isinstance(part, ast.Name) for part in ast.walk(number))
                assert named_or_counted, f"{path}: fold_in(..., {ast.unparse(number)})"


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


def unannotated(function, method=False):
    """The arguments of a function without a type, and "return" where its result has none."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    if method:
        arguments = arguments[1:]
    missing = [each.arg for each in arguments if each is not None and each.annotation is None]
    if function.returns is None and function.name != "__init__":
        missing.append("return")
    return missing


@pytest.mark.parametrize("path", FILES, ids=place)
def test_public_functions_are_annotated(path):
    """mypy checks the annotations in .ci/run; __init__ and the like are public."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert unannotated(node) == [], node.name
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for each in node.body:
                private = isinstance(each, ast.FunctionDef) and (
                    each.name.startswith("_") and not each.name.endswith("__")
                )
                if isinstance(each, ast.FunctionDef) and not private:
                    assert unannotated(each, method=True) == [], f"{node.name}.{each.name}"
