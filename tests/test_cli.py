"""The command line as users run it, bad input included."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    QUICK,
    compiled_once,
    finish,
    lines,
    made_since,
    make_old,
    read_until,
    refused,
    started,
)
from PIL import Image

from ddpm_jax import load, to_uint8
from ddpm_jax.cli import main
from ddpm_jax.cli.options import SampleOptions, TrainOptions
from ddpm_jax.cli.parsing import parse, with_values
from ddpm_jax.config import to_dict
from ddpm_jax.sampler import Sampler

COMMAND = [sys.executable, "-m", "ddpm_jax"]
SMALL = [
    "--model.base-channels",
    "4",
    "--model.norm-groups",
    "2",
    "--model.channel-multipliers",
    "1",
]
SMALL += ["--model.num-res-blocks", "1", "--diffusion.num-timesteps", "4"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["tarin"],
            "'tarin' is not a command; "
            "choose one of train, plan, sample, edit, compress, decompress, likelihood, evaluate, "
            "figure, export, calibrate, tune, report",
        ),
        (["train"], "train: CONFIG is missing; run ddpm-jax train CONFIG"),
        (
            ["train", "digts"],
            "config: 'digts' is not a file or a shipped config; the shipped ones are",
        ),
        (["train", "digits", "--optim.learning-rat", "1"], "--optim.learning-rate"),
        (["train", "digits", "--optim.learning-rate", "fast"], "learning-rate"),
        (
            ["train", "digits", "--optim.learning-rate", "-1"],
            "optim.learning_rate: must be above 0, got -1.0",
        ),
        (["train", "digits", "--optim.learning-rate"], "learning-rate"),
        (
            ["train", "digits", "--train.batch-size", "0"],
            "train.batch_size: must be at least 1 and at most 16777216, got 0",
        ),
        (["train", "digits", "--diffusion.schedule", "sine"], "sine"),
        (
            ["train", "digits", "--diffusion.clip", "maybe"],
            "'maybe' for argument '--diffusion.clip'. Expected one of",
        ),
        (
            ["sample", "RUN", "--timesteps", "0,10,50"],
            "timesteps: must be None or INT INT ..., with spaces between, got '0,10,50'; see",
        ),
        (["sample", "RUN", "--timesteps", "10", "0"], "in ascending order, got (10, 0)"),
        (["sample", "RUN", "--timesteps"], "timesteps: must be one or more"),
        (
            ["sample", "RUN", "--timesteps", "0", "9", "--grid", "quad"],
            "timesteps: are themselves the grid; leave out --steps and --grid",
        ),
        (["sample", "RUN", "--grid", "tuned"], "grid: tuned requires --steps; add it"),
        # A bound is of an ancestral chain, whose steps are not tuned.
        (["likelihood", "RUN", "--steps", "4", "--grid", "tuned"], "invalid choice 'tuned'"),
        (
            ["tune", "RUN", "--sampler", "unipc", "--data", "folder:x"],
            "data: a named --sampler is tuned without images; leave out --data, or --sampler",
        ),
        (
            ["tune", "RUN", "--images", "600000000"],
            "images: must be at least 8 and at most 536870912, got 600000000",
        ),
        (
            ["likelihood", "RUN", "--steps", "4", "--grid", "tuned"],
            "invalid choice 'tuned' for argument '--grid'. Expected one of",
        ),
        (
            ["train", "digits", "--data.image-shape", "28", "28", "1"],
            "pass --data.image-shape 8 8 1",
        ),
        (
            ["train", "small32"],
            "data/images does not exist; name a folder or a zip with --data.source folder:PATH",
        ),
        (["train", "digits", "--data.source", "folder:/nowhere"], "/nowhere does not exist"),
        (["train", "digits", "--workdir", "/dev/null/x"], "/dev/null/x"),
        (["sample"], "RUN is missing; see ddpm-jax sample --help"),
        (["sample", "/nowhere"], "/nowhere: not found; name a run directory"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, monkeypatch, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_a_switch_that_also_takes_a_word(tiny):
    """The flags of a switch stay what they were."""
    for args, complete in [
        (["--diffusion.clip"], ["--diffusion.clip", "True"]),
        (["--diffusion.clip", "--seed", "1"], ["--diffusion.clip", "True", "--seed", "1"]),
        (["--diffusion.no-clip", "--seed", "1"], ["--diffusion.clip", "False", "--seed", "1"]),
        (["--diffusion.clip", "dynamic"], ["--diffusion.clip", "dynamic"]),
        (["--diffusion.clip=dynamic"], ["--diffusion.clip=dynamic"]),
        (["--data.no-flip", "--optim.clip"], ["--data.no-flip", "--optim.clip"]),
    ]:
        assert with_values(args) == complete
    for args, clip in [(["--diffusion.no-clip"], False), (["--diffusion.clip=dynamic"], "dynamic")]:
        options = parse(TrainOptions, args, "train", TrainOptions(tiny, "x"))
        assert options.config.diffusion.clip == clip


def test_timesteps_are_numbers_apart():
    options = parse(SampleOptions, ["RUN", "--timesteps", "0", "10", "50"], "sample")
    assert options.sampler == Sampler(timesteps=(0, 10, 50))


def test_help_and_version(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "cifar10" in capsys.readouterr().out
    assert main(["--version"]) == 0
    for args, option in [
        (["train", "--help"], "--optim.ema-decay"),
        (["sample", "-h"], "--weights"),
    ]:
        with pytest.raises(SystemExit) as exit:
            main(args)
        assert not exit.value.code and option in capsys.readouterr().out


def test_samples_as_a_grid_as_arrays_and_as_files_are_the_same_images(run, tmp_path, capsys):
    assert (
        main(["sample", str(run), "-n", "5", "--out", str(tmp_path / "x.npz"), "--seed", "3"]) == 0
    )
    images = np.load(tmp_path / "x.npz")["images"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    import jax

    ddpm, params = load(run)
    expected = to_uint8(ddpm.sample(params, jax.random.key(3), 5))
    assert np.abs(images.astype(int) - expected).max() <= 1

    assert (
        main(["sample", str(run), "-n", "5", "--out", str(tmp_path / "x.png"), "--seed", "3"]) == 0
    )
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert picture.shape == (2 * 51 + 3, 3 * 51 + 3)
    np.testing.assert_array_equal(picture[3:51:6, 3:51:6], images[0, ..., 0])
    np.testing.assert_array_equal(picture[54:102:6, 54:102:6], images[4, ..., 0])

    assert main(["sample", str(run), "-n", "5", "--out", f"{tmp_path}/files/", "--seed", "3"]) == 0
    for i, image in enumerate(images):
        difference = (
            np.asarray(Image.open(tmp_path / f"files/{i:06d}.png")).astype(int) - image[..., 0]
        )
        assert np.abs(difference).max() <= 1


def test_a_folder_of_samples_is_filled_up(run, tmp_path, capsys):
    args = ["sample", str(run), "--out", f"{tmp_path}/files/", "-n"]
    assert main([*args, "4"]) == 0
    second = (tmp_path / "files/000001.png").read_bytes()
    (tmp_path / "files/000001.png").unlink()
    make_old(tmp_path / "files")
    assert main([*args, "6"]) == 0
    assert (tmp_path / "files/000001.png").read_bytes() == second
    assert made_since(tmp_path / "files", "*.png") == ["000001.png", "000004.png", "000005.png"]
    # Other images than those that are there must not be mixed in.
    assert "choose another folder" in refused(capsys, *args, "4", "--seed", "1")
    assert "choose another folder" in refused(capsys, *args, "4", "--weights", "raw")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.png").write_bytes(second)
    assert "not written by this command" in refused(
        capsys, "sample", run, "--out", f"{tmp_path}/mine/"
    )
    # A folder of a version that left the grid out had the default of its time.
    args = ["sample", str(run), "-n", "1", "--steps", "4", "--sampler", "dpm-solver++"]
    trailing = [*args, "--out", f"{tmp_path}/old/", "--grid", "trailing"]
    assert main(trailing) == 0
    label = json.loads((tmp_path / "old/samples.json").read_text())
    assert label["grid"] == "trailing"
    (tmp_path / "old/samples.json").write_text(json.dumps({**label, "grid": None}))
    assert main(trailing) == 0
    assert "grid 'trailing', not 'squares'" in refused(capsys, *args, "--out", f"{tmp_path}/old/")
    args = ["sample", str(run), "--out", f"{tmp_path}/files/", "-n"]
    (tmp_path / "files/samples.json").write_text("{")
    assert "samples.json: cannot be read" in refused(capsys, *args, "4")


def test_raw_and_averaged_weights_and_steps_are_told_apart(run, tmp_path, capsys):
    command = ["sample", str(run), "-n", "2", "--out", str(tmp_path / "x.npz"), "--weights"]
    for weights in ("ema", "raw"):
        assert main([*command, weights]) == 0
        assert f"{weights} weights of step 2" in capsys.readouterr().err
    for args, says in [
        (["--step", "1"], "no checkpoint of step 1; choose one of 2"),
        (["-n", "0"], "n: must be at least 1 and at most 4294967296, got 0"),
        (["--seed", "-1"], "seed: must be at least 0"),
        (["--batch-size", "0"], "batch_size: must be at least 1"),
        (["--out", "x.jpg"], "must end in .png"),
        (["--weights", "best"], "best"),
    ]:
        assert says in refused(capsys, "sample", run, *args)


def test_a_damaged_run_is_named(tiny, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert "config.json: cannot be read" in refused(capsys, "sample", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny) | {"modle": {}}))
    assert "modle: unknown field" in refused(capsys, "sample", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny)))
    assert "this run has no checkpoint yet" in refused(capsys, "sample", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_killed_softly_goes_on_with_the_same_command(tmp_path):
    """A separate process trains, gets SIGTERM, exits cleanly, and resumes to the end.

    It has devices of its own.
    """
    environment = {**os.environ, "XLA_FLAGS": QUICK, **compiled_once(tmp_path / "xla")}
    command = [
        *COMMAND,
        "train",
        "digits",
        "--workdir",
        "run",
        *SMALL,
        "--train.log-every",
        "1",
        "--train.steps",
    ]
    with started([*command, "1000000"], cwd=tmp_path, env=environment) as program:
        read_until(program, "step 1/1000000")
        program.send_signal(signal.SIGTERM)
        code, said = finish(program)
    assert code == 0 and "SIGTERM: saved after step" in said and "Traceback" not in said
    saved = int(max((tmp_path / "run/checkpoints").iterdir(), key=lambda path: int(path.name)).name)
    with started([*command, str(saved + 3)], cwd=tmp_path, env=environment) as program:
        code, said = finish(program)
    assert code == 0, said
    assert f"step {saved} of {saved + 3}" in said and "run directory: run (" in said
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, saved + 4))
    with Image.open(tmp_path / "run/samples.png") as picture:
        assert picture.size[0] > 100


def test_a_gpu_that_jax_cannot_use_gets_a_line_of_advice(monkeypatch):
    from ddpm_jax.devices import mesh as parallel

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(parallel.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "pip install 'ddpm-jax[cuda12]'" in parallel.device_advice()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert parallel.device_advice() is None


def test_the_command_starts_without_jax():
    """--help must not wait for jax, flax or orbax."""
    code = "import sys; from ddpm_jax.cli import main; main(['--help'])"
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
