"""The command line: parses, calls, prints."""

import contextlib
import dataclasses
import io
import logging
import re
import sys
import textwrap

import tyro

from ddpm_jax import __version__
from ddpm_jax.cli.options import (
    EvaluateOptions,
    ExportOptions,
    Launch,
    LikelihoodOptions,
    PlanOptions,
    SampleOptions,
    SamplerOptions,
    TrainOptions,
)
from ddpm_jax.config import load_config, shipped_configs
from ddpm_jax.errors import UserError

log = logging.getLogger("ddpm_jax")

# What `figure NAME` draws: the class in ddpm_jax.figures, which imports jax.
FIGURES = {
    "rate-distortion": "RateDistortion",
    "progressive": "Progressive",
    "shared-latent": "SharedLatent",
    "interpolate": "Interpolate",
    "neighbours": "Neighbours",
    "schedule": "Schedules",
}

USAGE = """usage: ddpm-jax COMMAND ...

  train CONFIG    train a model, or go on with one; CONFIG is a file or one of
                  {configs}
  plan CONFIG     what that run takes: memory, FLOPs, traffic, hours; makes nothing
  sample RUN      draw images from a trained model
  likelihood RUN  its bound on the bits per dimension of a whole split
  evaluate RUN    IS, FID, KID, precision and recall of its samples, its likelihood
  export RUN      write it as .safetensors, for diffusers, or as StableHLO
  figure NAME RUN draw one of the paper's figures; NAME is one of
                  {figures}
                  (schedule needs no RUN)

ddpm-jax COMMAND --help tells the options, ddpm-jax --version the version."""


def main(args: list[str] | None = None) -> int:
    """Runs the command `args`, sys.argv's by default; returns the exit code: 0, or 2 for a user's error."""
    args = sys.argv[1:] if args is None else args
    _log_to_stderr()
    try:
        code = _run(args)
    except (UserError, OSError, ImportError) as error:
        remedy = "; pip install 'ddpm-jax[gcs]'" if "gcsfs" in str(error) else ""
        print(f"ddpm-jax: {error}{remedy}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if args[0] in ("evaluate", "likelihood") else ""
        print(f"ddpm-jax: interrupted{goes_on}", file=sys.stderr)
        code = 130
    except Exception:
        _leave(1)
        raise
    if code:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """Ends one of several processes at once: it would wait for the others, and they for it."""
    if "jax" in sys.modules:
        from ddpm_jax.devices.processes import leave_at_once

        leave_at_once(code)


def _run(args: list[str]) -> int:
    commands = {
        **{
            "train": _train,
            "plan": _plan,
            "sample": _sample,
            "likelihood": _likelihood,
            "evaluate": _evaluate,
        },
        **{"figure": _figure, "export": _export},
    }
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    if command in ("-h", "--help"):
        print(_usage())
    elif command == "--version":
        print(f"ddpm-jax {__version__}")
    elif command in commands:
        commands[command](rest)
    else:
        raise UserError(f"no command {command!r}; there are {', '.join(commands)}")
    return 0


def _train(args: list[str]) -> None:
    name, *args = _config_first("train", args)
    default = TrainOptions(load_config(name), f"runs/{name.removesuffix('.py').rpartition('/')[2]}")
    options = _parse(TrainOptions, args, f"ddpm-jax train {name}", default)
    _start(options.launch)
    from ddpm_jax.training.train import fit

    fit(options.config, options.workdir, init_from=options.init_from)


def _plan(args: list[str]) -> None:
    name, *args = _config_first("plan", args)
    options = _parse(PlanOptions, args, f"ddpm-jax plan {name}", PlanOptions(load_config(name)))
    import jax

    # It needs no accelerator, and must not take one's memory from a run.
    jax.config.update("jax_platforms", "cpu")
    from ddpm_jax.training.plan import compile_for, plan, table

    config, machine = options.config, options.machine
    fsdp = machine.fsdp or config.parallel.fsdp
    planned = plan(config, machine.devices, fsdp)
    compiled = machine.compile and compile_for(config, machine.compile, machine.devices, fsdp)
    print(table(planned, machine.flops_per_s, machine.utilisation, machine.memory_gib, compiled))


def _config_first(command: str, args: list[str]) -> list[str]:
    """The arguments, of which the first names a config: its fields are the options' defaults."""
    if args in (["-h"], ["--help"]):
        return ["digits", "--help"]
    if not args or args[0].startswith("-"):
        raise UserError(f"{command}: name the config first: ddpm-jax {command} CONFIG [--options]")
    return args


def _sample(args: list[str]) -> None:
    options = _parse(SampleOptions, args, "ddpm-jax sample")
    _start(options.launch)
    from ddpm_jax.evaluation.sample import sample_to

    sample_to(**_arguments(options))


def _export(args: list[str]) -> None:
    options = _parse(ExportOptions, args, "ddpm-jax export")
    _start(Launch())
    from ddpm_jax.weights.export import export

    export(**_arguments(options))


def _likelihood(args: list[str]) -> None:
    options = _parse(LikelihoodOptions, args, "ddpm-jax likelihood")
    _start(options.launch)
    from ddpm_jax.devices.processes import is_first
    from ddpm_jax.evaluation.bound import measure, table

    words = table(measure(**_arguments(options)))
    if is_first():
        print(words)


def _evaluate(args: list[str]) -> None:
    options = _parse(EvaluateOptions, args, "ddpm-jax evaluate")
    _start(options.launch)
    from ddpm_jax.devices.processes import is_first
    from ddpm_jax.evaluation.evaluate import evaluate, table

    arguments = _arguments(options)
    words = table(evaluate(inception_file=arguments.pop("inception"), **arguments))
    if is_first():
        print(words)


def _figure(args: list[str]) -> None:
    name, *args = args or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in FIGURES:
        raise UserError(
            f"figure: {name!r} is not one of {', '.join(FIGURES)}; ddpm-jax figure NAME RUN [--options]"
        )
    from ddpm_jax import figures

    figure = _parse(getattr(figures, FIGURES[name]), args, f"ddpm-jax figure {name}")
    _start(Launch())
    figure.draw()


def _usage() -> str:
    return USAGE.format(configs=_lines(shipped_configs()), figures=_lines(FIGURES))


def _lines(names) -> str:
    """The names, as many a line as fit under the commands' descriptions."""
    return textwrap.fill(
        ", ".join(names), 78, subsequent_indent=" " * 18, initial_indent=" " * 18
    ).strip()


def _parse(kind, args, prog, default=None):
    """tyro's parsing, its boxed complaints turned into a UserError of one line."""
    given = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind, args=args, prog=prog, config=(tyro.conf.PositionalRequiredArgs,), **given
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        words = _one_line(complaint.getvalue()).removesuffix(f"{prog} --help").rstrip()
        raise UserError(f"{words}; see {prog} --help") from None


def _one_line(box: str) -> str:
    """The words of tyro's box, whose frame is of lines or, on a plain terminal, of dashes."""
    rows = [row.strip(" │|") for row in box.splitlines()]
    rows = [
        row
        for row in rows
        if row.strip("─-╭╮╰╯ ") and not row.startswith(("╭", "For full helptext"))
    ]
    words = (
        " ".join(rows)
        .replace(" Perhaps you meant:", "; perhaps you meant")
        .replace(" Argument helptext:", " for")
    )
    # "Error parsing config.optim: optim.learning_rate: must be ..." names the option twice.
    return re.sub(r".*Error parsing \S+: ", "", words).rstrip(".")


def _arguments(options) -> dict:
    """What the command's function takes."""
    arguments = {
        name: value for name, value in dataclasses.asdict(options).items() if name != "launch"
    }
    if isinstance(options, SamplerOptions):
        from ddpm_jax.ddpm import Sampler

        arguments["sampler"] = Sampler(
            *(arguments.pop(name) for name in ("sampler", "steps", "eta", "grid"))
        )
    return arguments


def _start(launch: Launch) -> None:
    """Configures jax, joins the other processes, of which only the first talks, and gives advice on the devices."""
    from ddpm_jax.devices.mesh import device_advice
    from ddpm_jax.devices.processes import is_first, join
    from ddpm_jax.devices.runtime import configure_jax

    configure_jax(launch.compile_cache)
    join(launch.coordinator, launch.num_processes, launch.process_id)
    if not is_first():
        log.setLevel(logging.ERROR)
    advice = device_advice()
    if advice:
        log.warning(advice)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
