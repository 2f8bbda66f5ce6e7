"""The time from process start to the first image and to the first update, ours and PyTorch's.

    python benchmarks/startup.py [--rounds 2]

Each turn is a fresh process, timed until the picture or the update exists; the contestants take
turns, after one each that is not timed, in which Python compiles what they import. "cold" starts
without compiled programs, "again" with those of the process before. Also measures imports, --help,
and the peak memory of ten updates. The network is small32's; the image is one, drawn with 50 steps
of DDIM.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
FIRST_UPDATE = "run/metrics.jsonl"
"""A file that exists after the first update."""
UNITS_IN_MIB = 2**20 if sys.platform == "darwin" else 2**10
"""The kernel reports peak memory in bytes on a Mac, in KiB elsewhere."""
OURS = "import sys; from ddpm_jax.cli import main; sys.exit(main())"


def prepare(folder: Path) -> None:
    """Writes the same weights for both sides, and a folder of pictures."""
    import numpy as np
    import ours
    from PIL import Image

    from ddpm_jax import load_config
    from ddpm_jax.weights.diffusers import write_diffusers
    from ddpm_jax.weights.single_file import write_single_file

    config = load_config("small32")
    params = ours.parameters(config)
    write_diffusers(folder / "model", config, params)
    about = {"weights": "unknown", "step": None, "data_fingerprint": None}
    write_single_file(folder / "model.safetensors", config, params, about)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(64):
        picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.save(folder / f"images/{i}.png")


def peer(what: str, folder: Path, steps: int) -> None:
    """The work of PyTorch's processes; `what` is "image" or "update", optionally + " compile"."""
    import diffusers
    import numpy as np
    import torch
    from PIL import Image

    diffusers.utils.logging.set_verbosity_error()
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder / "model")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    network = torch.compile(pipeline.unet) if what.endswith("compile") else pipeline.unet
    if what.startswith("image"):
        pipeline.unet = network
        pipeline.set_progress_bar_config(disable=True)
        pipeline(num_inference_steps=50).images[0].save(folder / "peer.png")
        return
    files = sorted((folder / "images").iterdir())
    images = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)[:32]
    adam = torch.optim.Adam(pipeline.unet.parameters(), 1e-3, fused=True)
    (folder / "run").mkdir()
    for step in range(steps):
        x_0 = torch.from_numpy(images).float() / 127.5 - 1
        t = torch.randint(0, 1000, (len(x_0),))
        noise = torch.randn_like(x_0)
        output = network(pipeline.scheduler.add_noise(x_0, noise, t), t).sample
        torch.nn.functional.mse_loss(output, noise).backward()
        adam.step()
        adam.zero_grad()
        (folder / FIRST_UPDATE).write_text(f"{step}\n")


def commands(folder: Path, steps: int) -> dict[str, dict[str, list[str]]]:
    """{what: {contestant: command}}."""
    python = sys.executable
    sample = ["sample", f"{folder}/model.safetensors", "-n", "1", "--out", f"{folder}/ours.png"]
    sample += ["--sampler", "ddim", "--steps", "50"]
    train = ["train", "small32", "--workdir", f"{folder}/run"]
    train += ["--data.source", f"folder:{folder}/images"]
    train += ["--train.eval-every", "0", "--train.sample-every", "0", "--train.num-samples", "1"]
    train += ["--train.steps", str(steps), "--train.log-every", "1"]

    def of_peer(what):
        return [python, __file__, "--peer", what, "--folder", str(folder), "--steps", str(steps)]

    return {
        "first image": {
            "ours": [python, "-c", OURS, *sample],
            "eager": of_peer("image"),
            "compile": of_peer("image compile"),
        },
        "first update": {
            "ours": [python, "-c", OURS, *train],
            "eager": of_peer("update"),
            "compile": of_peer("update compile"),
        },
    }


def run(command: list[str], folder: Path, until: str | None = None) -> tuple[float, float]:
    """(seconds, peak memory in MiB) of one process; it is killed when the file `until` exists."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": f"{folder}/cache",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
    }
    shutil.rmtree(folder / "run", ignore_errors=True)
    start = time.perf_counter()
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    while until:
        if (folder / until).exists() and (folder / until).stat().st_size:
            seconds = time.perf_counter() - start
            process.kill()
            process.wait()
            return seconds, 0.0
        if process.poll() is not None:
            sys.exit(f"{command} ended early: {(folder / 'output').read_text()}")
        time.sleep(0.01)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed: {(folder / 'output').read_text()}")
    return time.perf_counter() - start, usage.ru_maxrss / UNITS_IN_MIB


def measure(rounds: int, folder: Path) -> dict:
    """{what: {contestant: median seconds, or MiB of memory}}."""
    prepare(folder)
    result = {}
    for what, contestants in commands(folder, 1).items():
        until = FIRST_UPDATE if what == "first update" else None
        for command in contestants.values():
            run(command, folder, until)
        times = {f"{name}, {when}": [] for when in ("cold", "again") for name in contestants}
        for _ in range(rounds):
            for cache in ("cache", "inductor"):
                shutil.rmtree(folder / cache, ignore_errors=True)
            for when in ("cold", "again"):
                for name, command in contestants.items():
                    seconds, _ = run(command, folder, until)
                    print(f"{what}, {name}, {when}: {seconds:.1f} s", flush=True)
                    times[f"{name}, {when}"].append(seconds)
        result[what] = {name: statistics.median(values) for name, values in times.items()}
    memory = commands(folder, 10)["first update"]
    result["MiB of ten updates"] = {
        name: run(command, folder)[1] for name, command in memory.items()
    }
    python = sys.executable
    quick = {
        "import ddpm_jax": [python, "-c", "import ddpm_jax"],
        "import ddpm_jax and what sampling takes": [
            python,
            "-c",
            "from ddpm_jax import load, to_uint8",
        ],
        "import diffusers' UNet2DModel": [python, "-c", "from diffusers import UNet2DModel"],
        "ddpm-jax --help": [python, "-c", OURS, "--help"],
        "ddpm-jax train small32 --help": [python, "-c", OURS, "train", "small32", "--help"],
    }
    result["import and --help"] = {
        name: statistics.median(run(command, folder)[0] for _ in range(rounds))
        for name, command in quick.items()
    }
    return result


def table(result: dict) -> str:
    """A Markdown table."""
    lines = ["| what | which | |", "|---|---|---|"]
    for what, values in result.items():
        unit = "MiB" if what.startswith("MiB") else "s"
        lines += [
            f"| {what} | {name} | {value:.{0 if unit == 'MiB' else 2}f} {unit} |"
            for name, value in values.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.folder, options.steps)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            found = measure(options.rounds, Path(temporary))
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "startup.json").write_text(json.dumps(found, indent=1))
        print(table(found))
