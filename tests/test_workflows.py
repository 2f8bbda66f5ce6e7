"""The workflows of GitHub: valid, and in step with pyproject.toml."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path):
    """The shell commands of the workflow's steps."""
    steps = [step for job in jobs(path).values() for step in job.get("steps", [])]
    return [step["run"] for step in steps if "run" in step]


def test_workflows_follow_the_schema_of_github():
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_are_clean_in_the_eyes_of_shellcheck(path):
    for script in commands(path):
        command = [BIN / "shellcheck", "--shell=bash", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_unless_a_job_says_otherwise(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert "uses" in job or "timeout-minutes" in job, name


def test_tests_run_on_every_python_and_on_the_oldest_jax():
    matrix = jobs(ROOT / ".github/workflows/tests.yml")["tests"]["strategy"]["matrix"]["include"]
    python = "Programming Language :: Python :: 3."
    versions = [each.split()[-1] for each in PROJECT["classifiers"] if each.startswith(python)]
    assert sorted({each["python"] for each in matrix}) == versions
    (jax,) = [each for each in PROJECT["dependencies"] if each.startswith("jax>")]
    oldest = {"python": versions[0], "jax": jax.replace(">=", "==") + ".0"}
    assert oldest in matrix
