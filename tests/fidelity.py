"""Modules of torch-fidelity, an independent library of the same metrics; for the tests alone."""

import importlib
import importlib.util
import sys
import types

import pytest


def fidelity(name: str):
    """torch_fidelity.`name`; skips the test if torch or the library is absent.

    Importing the package would import torchvision, which is not needed here, so its `__init__` and
    its `utils` are left out.
    """
    pytest.importorskip("torch", reason="torch is not installed")
    if "torch_fidelity" not in sys.modules:
        spec = importlib.util.find_spec("torch_fidelity")
        if spec is None:
            pytest.skip("torch_fidelity is not installed (pip install --no-deps torch-fidelity)")
        package = types.ModuleType("torch_fidelity")
        package.__path__ = spec.submodule_search_locations
        utils = types.ModuleType("torch_fidelity.utils")
        utils.__getattr__ = lambda name: None
        sys.modules |= {"torch_fidelity": package, "torch_fidelity.utils": utils}
    return importlib.import_module(f"torch_fidelity.{name}")
