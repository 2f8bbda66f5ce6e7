"""A class keeps its number in every folder: a run keeps the names of its classes."""

import dataclasses
import json
import os
import zipfile

import numpy as np
import pytest
from conftest import messages, with_
from PIL import Image

from ddpm_jax import DDPM, UserError, fit
from ddpm_jax.config import Config, Data, to_dict
from ddpm_jax.data import from_array, load_source
from ddpm_jax.devices.mesh import make_mesh
from ddpm_jax.evaluation.evaluate import real_images
from ddpm_jax.evaluation.labels import labels_of
from ddpm_jax.evaluation.splits import read_split
from ddpm_jax.storage.run import data_fingerprint, read_config
from ddpm_jax.training import train
from ddpm_jax.training.prepare import with_classes
from ddpm_jax.weights.load import Loaded, weights_for
from ddpm_jax.weights.single_file import write_single_file

SHAPE = (8, 8, 1)


def folder(root, names, each=2):
    """A folder with `each` images in each of the folders `names`."""
    rng = np.random.default_rng(len(names))
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, SHAPE[:2], dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def read(path, *names):
    return load_source(Data(source=f"folder:{path}", image_shape=SHAPE, class_names=names))


@pytest.fixture
def pets(tmp_path):
    return folder(tmp_path / "pets", ["cat", "dog", "eel"])


@pytest.fixture
def fewer(tmp_path):
    return folder(tmp_path / "fewer", ["cat", "eel"])


def test_names_number_a_folder_that_lacks_one(pets, fewer, tmp_path):
    names = read(pets).class_names
    assert names == ("cat", "dog", "eel")
    assert read(fewer).labels.tolist() == [0, 0, 1, 1]
    source = read(fewer, *names)
    assert source.labels.tolist() == [0, 0, 2, 2] and source.labels.dtype == np.int32
    assert source.class_names == names
    # What is measured with other labels is another measurement.
    assert source.fingerprint != read(fewer).fingerprint
    with zipfile.ZipFile(tmp_path / "fewer.zip", "w") as archive:
        for file in fewer.rglob("*.png"):
            archive.write(file, file.relative_to(fewer))
    zipped = read(tmp_path / "fewer.zip", *names)
    assert zipped.labels.tolist() == [0, 0, 2, 2] and zipped.fingerprint == source.fingerprint
    # Images that lie in no folder have no labels, whatever the names are.
    os.rename(fewer / "cat/0.png", fewer / "0.png")
    assert read(fewer, *names).labels is None


def test_names_in_the_folders_own_order_change_nothing(pets):
    bare = read(pets)
    for names in (bare.class_names, (*bare.class_names, "fox")):
        source = read(pets, *names)
        np.testing.assert_array_equal(source.labels, bare.labels)
        assert source.fingerprint == bare.fingerprint
    turned = read(pets, "eel", "dog", "cat")
    assert turned.labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert turned.fingerprint != bare.fingerprint


def test_numbers_of_an_npz_stay(pets, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, *SHAPE), np.uint8), labels=[2, 0, 1])
    data = Data(source=f"npz:{tmp_path}/x.npz", image_shape=SHAPE, class_names=("b", "a", "c"))
    source = load_source(data)
    assert source.labels.tolist() == [2, 0, 1]
    assert source.fingerprint == load_source(dataclasses.replace(data, class_names=())).fingerprint


def test_former_fingerprints_know_the_names(tmp_path):
    """A zip from Windows had other names once."""
    image = folder(tmp_path, ["b"], each=1) / "b/0.png"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("b\\0.png", image.read_bytes())
    bare = read(tmp_path / "x.zip")
    named = read(tmp_path / "x.zip", "a", "b")
    assert len(named.former) == len(bare.former) > 0
    assert not set(named.former) & {*bare.former, bare.fingerprint, named.fingerprint}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "eel"), "images of the class dog, but the classes are cat, eel"),
        (("Cat", "dog"), "images of the classes cat, eel, but the classes are Cat, dog"),
    ],
)
def test_a_folder_of_another_class_is_one_line(pets, names, words):
    with pytest.raises(UserError) as caught:
        read(pets, *names)
    line = str(caught.value)
    assert line.startswith(f"data: folder:{pets} has {words} (data.class_names); rename")
    assert "\n" not in line


def test_the_config_takes_any_names_once(tmp_path):
    assert to_dict(Config())["data"]["class_names"] == []
    strange = ("a b", "é", os.fsdecode(b"caf\xe9"), *map(str, range(1000)))
    config = Config(data=Data(class_names=strange))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path) == config
    with pytest.raises(UserError, match=r"^data\.class_names: 'a' stands there more than once"):
        Data(class_names=("a", "b", "a"))
    with pytest.raises(UserError, match=r"^data\.class_names: must be a tuple of texts, got 'ab'"):
        Data(class_names="ab")


def test_a_config_gets_the_names_where_the_model_has_classes(tiny, pets):
    source = read(pets)
    auto = with_(tiny, model={"num_classes": "auto"})
    resolved = with_classes(auto, source)
    assert resolved.data.class_names == ("cat", "dog", "eel") and resolved.model.num_classes == 3
    assert with_classes(resolved, source) == resolved
    assert with_classes(tiny, source) == tiny
    array = from_array(np.zeros((2, *SHAPE), np.uint8), SHAPE, [0, 1])
    assert with_classes(auto, array).data.class_names == ()
    # A class without images counts if it is named.
    named = with_(auto, data={"class_names": ("cat", "dog", "eel", "fox")})
    assert with_classes(named, source).model.num_classes == 4
    with pytest.raises(UserError, match=r"^data\.class_names: 4 names for 3 classes; leave some"):
        with_classes(with_(named, model={"num_classes": 3}), source)


class Started(Exception):
    """Training would begin now."""


@pytest.fixture
def start(tiny, pets, monkeypatch):
    """Starts a run of `pets`, but trains nothing."""

    def start(workdir, **data):
        config = with_(
            tiny,
            model={"num_classes": "auto"},
            data={"source": f"folder:{pets}", "image_shape": SHAPE, "holdout": 0.0, **data},
            train={"batch_size": 4},
        )
        with pytest.raises(Started):
            fit(config, workdir)

    def first_state(*_):
        raise Started

    monkeypatch.setattr(train, "_first_state", first_state)
    return start


def loaded(workdir):
    """The model of a run that has no weights yet."""
    ddpm = DDPM(read_config(workdir))
    return Loaded(workdir, ddpm, ddpm.shapes, "ema", 1, data_fingerprint(workdir))


def test_a_run_keeps_its_names_and_numbers_other_folders_by_them(
    start, pets, fewer, tmp_path, caplog
):
    caplog.set_level("INFO")
    start(tmp_path / "run")
    assert "data: the classes are 0 cat, 1 dog, 2 eel" in messages(caplog)
    model = loaded(tmp_path / "run")
    assert labels_of(model.ddpm, read_split(model, "train")).tolist() == [0, 0, 1, 1, 2, 2]
    test = read_split(model, "test", f"folder:{fewer}")
    assert labels_of(model.ddpm, test).tolist() == [0, 0, 2, 2]
    other = folder(tmp_path / "other", ["eel", "fox"])
    with pytest.raises(UserError, match="images of the class fox, but the classes are cat, dog, "):
        read_split(model, "test", f"folder:{other}")
    many = folder(tmp_path / "many", ["dog", "eel"], each=10)
    (images,) = real_images(model, f"folder:{many}")
    assert set(images.source.labels.tolist()) == {1, 2}


def test_a_model_without_names_says_how_it_numbers_a_folder(start, fewer, tmp_path, caplog):
    """As a run of an older version, or one that was trained on an npz."""
    start(tmp_path / "run")
    model = loaded(tmp_path / "run")
    bare = with_(model.ddpm.config, data={"class_names": ()})
    model = model._replace(ddpm=DDPM(bare))
    caplog.clear()
    read_split(model, "train")
    assert not messages(caplog)
    read_split(model, "test", f"folder:{fewer}")
    (line,) = messages(caplog)
    assert "has 2 classes and the model 3, whose names are not known" in line
    assert line.endswith("their labels are taken to be 0 cat, 1 eel")


def test_a_run_resumes_with_the_same_labels_alone(start, tmp_path):
    run = tmp_path / "run"
    start(run)
    # An older version kept no names.
    before = json.loads((run / "config.json").read_text())
    del before["data"]["class_names"]
    (run / "config.json").write_text(json.dumps(before))
    start(run)
    assert read_config(run).data.class_names == ("cat", "dog", "eel")
    with pytest.raises(UserError) as caught:
        start(run, class_names=("dog", "cat", "eel"))
    assert "the data's fingerprint has changed (6 images, now 6; " in str(caught.value)
    assert "the classes were 0 cat, 1 dog, 2 eel and are 0 dog, 1 cat, 2 eel" in str(caught.value)
    start(tmp_path / "chosen", class_names=("dog", "cat", "eel"))
    model = loaded(tmp_path / "chosen")
    assert labels_of(model.ddpm, read_split(model, "train")).tolist() == [1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "eel"), "--init-from: label 1 is the class dog in {}, and eel here; --data.class"),
        (("cat", "dog"), None),
        ((), None),
    ],
)
def test_weights_of_other_names_are_said(tiny, tmp_path, caplog, names, words):
    config = with_(tiny, model={"num_classes": 3}, data={"class_names": ("cat", "dog", "eel")})
    file = tmp_path / "x.safetensors"
    ddpm = DDPM(config)
    params = {name: _zeros(part) for name, part in ddpm.shapes.items()}
    about = {"weights": "ema", "step": 1, "data_fingerprint": None}
    write_single_file(file, config, params, about)
    weights_for(DDPM(with_(config, data={"class_names": names})), file, make_mesh(1))
    lines = messages(caplog)
    assert len(lines) == bool(words)
    assert not words or lines[0].startswith(words.format(file))


def _zeros(shapes):
    if isinstance(shapes, dict):
        return {name: _zeros(part) for name, part in shapes.items()}
    return np.zeros(shapes.shape, shapes.dtype)
