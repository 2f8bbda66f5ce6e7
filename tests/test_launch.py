"""The launch scripts, with the cluster's commands replaced by fakes that log their calls."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import HANG, finish, read_until, started

from ddpm_jax.cli.options import TrainOptions
from ddpm_jax.cli.parsing import parse
from ddpm_jax.config import load_config

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
TRAIN = ["--data.source", "folder:/data/my 'own' images", "--train.steps", "7"]

# Logs its arguments. If they contain a word that has a list of answers, it gives the next one: a
# line to print and an exit code. The last answer is repeated.
PYTHON = f"#!{sys.executable} -IS"  # nothing imported that is not needed: these start in no time
FAKE = f"""{PYTHON}
import json, os, sys
here, name, said = os.environ["FAKES"], os.path.basename(sys.argv[0]), sys.argv[1:]
with open(f"{{here}}/log", "a") as log:
    log.write(json.dumps([name, *said]) + "\\n")
with open(f"{{here}}/answers") as file:
    answers = json.load(file)
for word, left in answers.items():
    if any(word in argument for argument in [name, *said]):
        line, code = left.pop(0) if len(left) > 1 else left[0]
        with open(f"{{here}}/answers", "w") as file:
            json.dump(answers, file)
        print(line, end="")
        sys.exit(code)
"""


class Fakes:
    """Commands on PATH that log what they are called with."""

    def __init__(self, folder: Path, names: str):
        self.folder = folder
        (folder / "bin").mkdir()
        for name in names.split():
            self.write(folder / "bin" / name, FAKE)
        self.answers()

    def write(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, **answers):
        """word=[(line, exit code), ...]: the answers, in turn, to commands with that word."""
        (self.folder / "answers").write_text(json.dumps(answers))

    def environment(self, **more):
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "FAKES": str(self.folder), "PAUSE": "0", **more}

    def log(self) -> list[list[str]]:
        file = self.folder / "log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def options_of(arguments):
    """The options of `ddpm-jax train CONFIG ...` for these arguments; raises if refused."""
    name, *rest = arguments
    return parse(TrainOptions, rest, "ddpm-jax train", TrainOptions(load_config(name), ""))


def launch(fakes, *arguments, **environment):
    command = [SCRIPTS / "launch_tpu_pod.sh", *arguments]
    return subprocess.run(
        command, env=fakes.environment(**environment), capture_output=True, text=True, timeout=HANG
    )


def files_in(folder):
    """The paths of all files, relative to the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def verbs(fakes):
    """The commands sent to the slice: create, scp, install, train, delete; not state checks."""
    asked = [call[4] for call in fakes.log() if call[0] == "gcloud"]
    commands = [call[-1] for call in fakes.log() if call[0] == "gcloud"]
    named = [
        ("train" if "ddpm-jax train" in command else "install") if verb == "ssh" else verb
        for verb, command in zip(asked, commands, strict=True)
    ]
    return [verb for verb in named if verb != "describe"]


@pytest.fixture
def cloud(tmp_path):
    return Fakes(tmp_path, "gcloud pkill pgrep ddpm-jax")


def test_every_script_is_clean_in_the_eyes_of_shellcheck():
    files = [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch"), ROOT / ".ci/run"]
    command = [
        Path(sys.executable).parent / "shellcheck",
        "--external-sources",
        "--source-path=SCRIPTDIR",
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_slice_is_made_trained_on_and_made_anew_when_it_is_taken_away(cloud):
    states = ["", "READY", "PREEMPTED", "PREEMPTED", "", "CREATING", "READY", "READY"]
    cloud.answers(
        describe=[[state, 0] for state in states], **{"ddpm-jax train": [["", 255], ["", 0]]}
    )
    arguments = ["cifar10", "--workdir", "gs://bucket/run", *TRAIN]
    done = launch(
        cloud,
        *arguments,
        NAME="mine",
        ZONE="here",
        TYPE="v5litepod-16",
        CREATE="--network=a --tags=b",
    )
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == [
        "create",
        "scp",
        "install",
        "train",
        "delete",
        "create",
        "scp",
        "install",
        "train",
    ]
    calls = {call[4]: call[1:] for call in cloud.log() if call[0] == "gcloud"}
    tpu = ["compute", "tpus", "tpu-vm"]
    of_slice = ["mine", "--zone=here"]
    assert calls["create"][:5] == [*tpu, "create", *of_slice][:5]
    made_with = {
        "--accelerator-type=v5litepod-16",
        "--version=tpu-ubuntu2204-base",
        "--spot",
        "--network=a",
        "--tags=b",
    }
    assert set(calls["create"][6:]) == made_with
    assert calls["delete"] == [*tpu, "delete", *of_slice]
    assert calls["scp"][5] == "mine:ddpm-jax.tgz" and "--worker=all" in calls["scp"]
    assert calls["ssh"][:8] == [*tpu, "ssh", *of_slice, "--worker=all", "--batch-size=all"]
    assert "the slice is still there" in done.stderr


def test_a_worker_gets_the_arguments_as_they_were_given(cloud, tmp_path):
    """The command for the workers, run by a shell here."""
    cloud.answers(describe=[["READY", 0]])
    arguments = ["cifar10", "--workdir=gs://bucket/run", *TRAIN]
    assert launch(cloud, *arguments).returncode == 0
    (command,) = [
        call[-1].removeprefix("--command=") for call in cloud.log() if "ddpm-jax train" in call[-1]
    ]
    (tmp_path / "home/ddpm-jax/.venv/bin").mkdir(parents=True)
    (tmp_path / "home/ddpm-jax/.venv/bin/ddpm-jax").symlink_to(cloud.folder / "bin/ddpm-jax")
    (tmp_path / "log").unlink()
    cloud.answers(pgrep=[["", 0], ["", 1]])
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path / "home", env=cloud.environment(), timeout=HANG
    )
    assert done.returncode == 0
    pkill, *looks, trained = cloud.log()
    assert pkill == ["pkill", "-x", "ddpm-jax"] and looks == 2 * [["pgrep", "-x", "ddpm-jax"]]
    assert trained == ["ddpm-jax", "train", *arguments]
    options = options_of(trained[2:])
    assert options.workdir == "gs://bucket/run" and options.config.data.source == TRAIN[1]

    # The machine goes down: all processes get SIGTERM, and training exits with 0 once it has saved.
    cloud.answers(pgrep=[["", 1]])
    cloud.write(cloud.folder / "bin/ddpm-jax", "#!/bin/bash\nkill -TERM $PPID\nexit 0\n")
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path / "home", env=cloud.environment(), timeout=HANG
    )
    assert done.returncode == 75


def test_failures_are_tried_again_but_not_for_ever_and_wrong_options_not_at_all(cloud):
    run = ["cifar10", "--workdir", "gs://bucket/run"]
    cloud.answers(describe=[["READY", 0]], **{"ddpm-jax train": [["", 1], ["", 2], ["", 1]]})
    assert launch(cloud, *run, RETRIES="3").returncode == 1
    assert verbs(cloud).count("train") == 3
    (cloud.folder / "log").unlink()
    cloud.answers(describe=[["READY", 0]], **{"ddpm-jax train": [["", 2]]})
    assert launch(cloud, *run).returncode == 2
    assert verbs(cloud).count("train") == 1
    (cloud.folder / "log").unlink()
    # An exit with 0 on a slice that is being taken away was a SIGTERM, not the end.
    states = ["READY", "STOPPING", "STOPPED", "", "READY", "READY"]
    cloud.answers(describe=[[state, 0] for state in states], **{"ddpm-jax train": [["", 0]]})
    assert launch(cloud, *run, DELETE="1", SPOT="0").returncode == 0
    assert verbs(cloud) == [
        "scp",
        "install",
        "train",
        "delete",
        "create",
        "scp",
        "install",
        "train",
        "delete",
    ]
    assert not any("--spot" in call for call in cloud.log())


@pytest.mark.parametrize("arguments", [[], ["cifar10"], ["cifar10", "--workdir", "runs/cifar10"]])
def test_a_workdir_that_would_go_with_the_slice_is_refused(cloud, arguments):
    done = launch(cloud, *arguments)
    assert done.returncode == 2 and "gs://" in done.stderr and not cloud.log()


def test_what_is_copied_to_the_workers_is_all_that_installing_needs(cloud, tmp_path):
    """The archive is taken from the copying command while it lasts."""
    keep = f'#!/bin/bash\nif [ "$4" = scp ]; then cp "$5" {tmp_path}/package.tgz; fi; echo READY\n'
    cloud.write(cloud.folder / "bin/gcloud", keep)
    assert launch(cloud, "cifar10", "--workdir", "gs://bucket/run").returncode == 0
    package = tmp_path / "package"
    package.mkdir()
    subprocess.run(["tar", "-xzf", tmp_path / "package.tgz", "-C", package], check=True)
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert (package / "setup.py").is_file() and (package / project["readme"]).is_file()
    assert {"tpu", "gcs"} <= project["optional-dependencies"].keys()
    for folder in ("ddpm_jax", "configs"):
        ours = {name for name in files_in(ROOT / folder) if "__pycache__" not in name}
        assert files_in(package / folder) == ours


def test_slurm_starts_the_tasks_and_passes_their_exit_code_on(tmp_path):
    fakes = Fakes(tmp_path, "srun scancel scontrol")
    fakes.answers(srun=[["", 3]])
    arguments = ["cifar10", "--workdir", "/shared/runs/my run", *TRAIN]
    environment = fakes.environment(SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="8")
    assert (
        subprocess.run(
            ["bash", SCRIPTS / "slurm.sbatch", *arguments], env=environment, timeout=HANG
        ).returncode
        == 3
    )
    (call,) = fakes.log()
    start = call.index("train")
    assert call[start - 1] == ".venv/bin/ddpm-jax" and call[start + 1 :] == arguments
    assert call[1 : start - 1] == ["--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=8"]
    assert options_of(arguments).workdir == "/shared/runs/my run"


@pytest.mark.parametrize(("code", "queued"), [(0, True), (1, False)])
def test_slurm_saves_before_the_time_limit_and_queues_the_job_again(tmp_path, code, queued):
    fakes = Fakes(tmp_path, "scontrol")
    # Tasks that end when scancel tells them to: it writes into a pipe that they read.
    os.mkfifo(tmp_path / "told")
    fakes.write(tmp_path / "bin/scancel", FAKE + 'open(f"{here}/told", "w").close()\n')
    tasks = f'#!/bin/bash\necho started\nread < "$FAKES/told"\nexit {code}\n'
    fakes.write(tmp_path / "bin/srun", tasks)
    environment = fakes.environment(SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="8")
    with started(["bash", SCRIPTS / "slurm.sbatch", "cifar10"], env=environment) as job:
        read_until(job, "started")
        job.send_signal(signal.SIGUSR1)
        assert finish(job)[0] == code
    told = [["scancel", "--signal=TERM", "17"], ["scontrol", "requeue", "17"]]
    assert fakes.log() == (told if queued else told[:1])


def test_slurm_reads_the_settings_of_the_script():
    """sbatch reads them up to the first command."""
    head = (SCRIPTS / "slurm.sbatch").read_text().partition("\nset -euo pipefail\n")[0]
    settings = dict(
        line[len("#SBATCH --") :].partition("=")[::2]
        for line in head.splitlines()
        if "#SBATCH" in line
    )
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert (
        settings["signal"] == "B:USR1@300"
        and "requeue" in settings
        and settings["open-mode"] == "append"
    )
    assert (SCRIPTS / "slurm.sbatch").read_text().count("\n#SBATCH") == len(settings)


@pytest.fixture
def jobset():
    return yaml.safe_load((SCRIPTS / "kubernetes.yaml").read_text())


def of_pods(jobset):
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    return workers["name"], job, job["template"]["spec"]


def test_kubernetes_starts_as_many_processes_as_pods_each_with_its_number(jobset):
    workers, job, pod = of_pods(jobset)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert (
        job["completionMode"] == "Indexed"
        and job["backoffLimit"] == 0
        and pod["restartPolicy"] == "Never"
    )
    assert (
        jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
        and pod["terminationGracePeriodSeconds"] >= 60
    )
    (container,) = pod["containers"]
    arguments = container["args"][2:]
    by_host = {
        key: value for key, _, value in (argument.partition("=") for argument in arguments[-3:])
    }
    name = jobset["metadata"]["name"]
    assert by_host == {
        # hostname.subdomain, as JobSet gives them.
        "--coordinator": f"{name}-{workers}-0-0.{name}:8476",
        "--num-processes": str(job["parallelism"]),
        "--process-id": "$(JOB_COMPLETION_INDEX)",
    }
    assert job["completions"] == job["parallelism"]
    options = options_of(arguments[:-3])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/runs", "/dev/shm"} and options.workdir.startswith("/runs/")
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(("code", "told", "exits"), [(0, False, 0), (3, False, 3), (0, True, 75)])
def test_a_pod_that_was_told_to_go_does_not_pass_for_one_that_has_finished(
    jobset, tmp_path, code, told, exits
):
    """The container's command, run by a shell here."""
    (container,) = of_pods(jobset)[2]["containers"]
    program = f"""{PYTHON}
import json, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with open(os.environ["FAKES"] + "/log", "w") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
print("started", flush=True)
if {told}:
    signal.sigwait([signal.SIGTERM])
sys.exit({code})
"""
    fakes = Fakes(tmp_path, "")
    fakes.write(tmp_path / "bin/ddpm-jax", program)
    # The shell says when it waits: it has set its trap by then.
    fakes.write(tmp_path / "functions", 'wait() { echo waits; builtin wait "$@"; }\n')
    environment = fakes.environment(BASH_ENV=str(tmp_path / "functions"))
    with started([*container["command"], *container["args"]], env=environment) as pod:
        read_until(pod, "started", "waits")
        if told:
            pod.send_signal(signal.SIGTERM)
        assert finish(pod)[0] == exits
    assert fakes.log() == [["train", *container["args"][2:]]]
