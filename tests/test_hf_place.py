"""The files of a data set of the datasets library, found without it."""

import sys

import pytest

from ddpm_jax import UserError
from ddpm_jax.config import Data
from ddpm_jax.data import load_source
from ddpm_jax.data.hf_place import find


def made(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def refusal(*args):
    with pytest.raises(UserError) as error:
        find(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_splits_of_a_saved_data_set_are_its_folders(tmp_path):
    both = made(tmp_path / "both", "dataset_dict.json", "train/state.json", "val/state.json")
    assert find(str(both)).saved == both / "train"
    assert find(str(both), test=True).saved == both / "val"
    assert find(f"{both}/val").saved == both / "val"
    assert find(f"{both}/val").title == f"hf:{both}/val"
    line = refusal(f"{both}/test")
    assert "no split test (its splits: train, val); name one of these as hf:PATH/SPLIT" in line
    one = made(tmp_path / "one", "state.json")
    assert find(str(one)).saved == find(str(one), test=True).saved == one
    assert "has no split test" in refusal(made(tmp_path / "x", "train/state.json"), True)


def test_splits_of_parquet_stand_in_the_files_names(tmp_path):
    for files in (
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        ("train/0.parquet", "train/1.parquet"),
        ("train.parquet",),
    ):
        root = made(tmp_path / files[0].replace("/", "_"), *files)
        made(root, *(file.replace("train", "test") for file in files))
        for split, test in (("train", False), ("test", True)):
            expected = [str(root / file.replace("train", split)) for file in files]
            assert list(find(str(root), test).parquet) == expected
            assert (
                list(find(f"{root}/{split}", test).parquet) == expected or (root / split).is_dir()
            )
    plain = made(tmp_path / "plain", "a.parquet", "b.parquet", "constrained.parquet")
    assert len(find(str(plain)).parquet) == 3 == len(find(str(plain), test=True).parquet)
    assert find(f"{plain}/a.parquet").parquet == (f"{plain}/a.parquet",)
    assert "has no split other (its splits: none)" in refusal(f"{plain}/other")


def test_what_is_no_data_set_is_refused(tmp_path):
    assert "is no such data set; name a folder that datasets.Dataset.save_to_disk" in refusal(
        str(tmp_path)
    )
    assert "does not exist" in refusal(f"{tmp_path}/there/nothing")


def test_without_the_library_its_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "ddpm_jax.data.hf", raising=False)
    with pytest.raises(UserError, match=r'pip install "ddpm-jax\[hf\]"'):
        load_source(Data(source=f"hf:{tmp_path}"))
