"""The command line: parses, calls, prints.

Each command imports its own part of the package when it runs: `ddpm-jax --help` needs none of it.
"""

import dataclasses
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable

from ddpm_jax import __version__
from ddpm_jax.cli.faults import line_of
from ddpm_jax.cli.streams import (
    READER_LEFT,
    discard_unwritable,
    open_closed_streams,
    reader_has_left,
    say,
)
from ddpm_jax.config.shipped import shipped_configs
from ddpm_jax.errors import UserError, refuse_windows

log = logging.getLogger("ddpm_jax")

# The figures by their names on the command line: the class of each in ddpm_jax.figures.
FIGURES = {
    "rate-distortion": "RateDistortion",
    "progressive": "Progressive",
    "shared-latent": "SharedLatent",
    "interpolate": "Interpolate",
    "neighbours": "Neighbours",
    "steps": "Steps",
    "codec": "Codec",
    "schedule": "Schedules",
}

# The edits likewise: the class of each in ddpm_jax.cli.edit.
EDITS = {
    "inpaint": "Inpaint",
    "vary": "Vary",
    "upscale": "Upscale",
    "colourise": "Colourise",
    "deblur": "Deblur",
}

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended, as shells know it."""

USAGE = """usage: ddpm-jax COMMAND ...

  train CONFIG     train a model, or resume a run; CONFIG is a file or one of
                   {configs}
  plan CONFIG      estimate memory, FLOPs and hours of a run; writes nothing
  sample RUN       draw images from a trained model
  edit NAME RUN IMAGE
                   change images with a trained model; NAME is one of
                   {edits}
  compress RUN IMAGES
                   write images as one file, every prefix of which decodes
  decompress RUN FILE.ddpm
                   make pictures of such a file
  likelihood RUN   measure the bits per dimension of a split
  calibrate RUN    measure what --variance optimal and --grid likelihood need
  tune RUN         find the best sampler of few steps, such as 10
  evaluate RUN     measure IS, FID, KID, precision, recall and likelihood
  export RUN       write a .safetensors file, a diffusers folder or StableHLO
  figure NAME RUN  draw one of the paper's figures; NAME is one of
                   {figures}
                   (schedule needs no RUN)
  report RUN ...   write one HTML file that shows runs, or compares them

A RUN is the run directory of a training, a .safetensors file, a diffusers
folder, or a model's name on huggingface.co.

ddpm-jax COMMAND --help shows the options; ddpm-jax --version, the version."""


def main(args: list[str] | None = None) -> int:
    """Runs the command `args`, sys.argv's by default.

    Returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C, 141 where the reader of the
    output has left.
    """
    is_program = args is None
    args = sys.argv[1:] if args is None else args
    open_closed_streams()
    _log_to_stderr()
    _hide_closed_loops()
    code = _code_of(args)
    discard_unwritable()
    if code == INTERRUPTED and is_program:
        # Jax may hold what it was compiling, and would crash when Python takes its objects apart.
        os._exit(code)
    if code:
        _leave(code)
    return code


def _code_of(args: list[str]) -> int:
    """Runs the command; prints one line for an error that is not a bug. Returns the exit code."""
    command = args[0] if args else ""
    try:
        _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumes = command in ("calibrate", "evaluate", "likelihood")
        advice = "; run the same command to resume" if resumes else ""
        say(f"ddpm-jax: interrupted{advice}")
        return INTERRUPTED
    except Exception as error:
        return _code_of_error(error, command)
    return 0


def _code_of_error(error: Exception, command: str) -> int:
    """Says what `error` is; raises it again if it is a bug."""
    if isinstance(error, BrokenPipeError) and reader_has_left():
        return READER_LEFT
    line = line_of(error, command)
    if line is None:
        _leave(1)
        raise error
    say(f"ddpm-jax: {line}")
    return 2


def _leave(code: int) -> None:
    """Ends one of several processes at once: it would wait for the others, and they for it."""
    if "jax" in sys.modules:
        from ddpm_jax.devices.processes import leave_at_once

        leave_at_once(code)


def _run(args: list[str]) -> None:
    refuse_windows()
    command, *rest = args or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
    elif command == "--version":
        print(f"ddpm-jax {__version__}")
    elif command in COMMANDS:
        _import_jax()
        COMMANDS[command](rest)
    else:
        raise UserError(f"{command!r} is not a command; choose one of {', '.join(COMMANDS)}")


def _import_jax() -> None:
    """Imports jax, which reads its settings from the environment and refuses some.

    Raises UserError naming the setting.
    """
    try:
        import jax  # noqa: F401
    except (ValueError, RuntimeError) as error:
        names = [name for name in os.environ if name.startswith("JAX_")]
        named = [name for name in names if name in str(error).upper()] or names
        raise UserError(
            f"jax cannot start ({error}); correct or unset {' and '.join(named) or 'its settings'}"
        ) from error


def _train(args: list[str]) -> None:
    from ddpm_jax.cli.options import TrainOptions
    from ddpm_jax.cli.parsing import parse
    from ddpm_jax.config import changed, load_config

    label, name, args = _config_first("train", args)
    workdir = f"runs/{name.removesuffix('.py').rpartition('/')[2]}"
    config = load_config(name)
    default = TrainOptions(config, workdir)
    options = parse(TrainOptions, args, f"ddpm-jax train {label}", default)
    given = changed(config, options.config)
    what = (options.config, options.workdir)
    if options.dry_run:
        # What is compiled is not kept, either: nothing is written, and it is measured.
        _start(dataclasses.replace(options.launch, compile_cache=False))
        from ddpm_jax.training.dry_run import dry_run, table

        _print_once(table(dry_run(*what, init_from=options.init_from, given=given)))
        return
    _start(options.launch)
    from ddpm_jax.training.train import fit

    fit(*what, init_from=options.init_from, given=given)


def _plan(args: list[str]) -> None:
    from ddpm_jax.cli.options import PlanOptions
    from ddpm_jax.cli.parsing import parse
    from ddpm_jax.config import load_config

    label, name, args = _config_first("plan", args)
    default = PlanOptions(load_config(name))
    options = parse(PlanOptions, args, f"ddpm-jax plan {label}", default)
    import jax

    # It needs no accelerator, and must not take one's memory from a run.
    jax.config.update("jax_platforms", "cpu")
    from ddpm_jax.devices.mesh import all_devices
    from ddpm_jax.devices.runtime import check_xla_flags

    check_xla_flags()
    all_devices()
    from ddpm_jax.training.plan import compile_for, plan, table

    config = options.config
    if config.model.num_classes == "auto":
        from ddpm_jax.data import load_source
        from ddpm_jax.training.prepare import with_classes

        config = with_classes(config, load_source(config.data))
    machine = options.machine
    fsdp = machine.fsdp or config.parallel.fsdp
    planned = plan(config, machine.devices, fsdp)
    compiled = None
    if machine.compile:
        compiled = compile_for(config, machine.compile, machine.devices, fsdp)
    print(table(planned, machine.flops_per_s, machine.utilisation, machine.memory_gib, compiled))


def _config_first(command: str, args: list[str]) -> tuple[str, str, list[str]]:
    """(the config as help shows it, its name, the other arguments); its fields are defaults."""
    if args in (["-h"], ["--help"]):
        return "CONFIG", "digits", args
    if not args or args[0].startswith("-"):
        raise UserError(f"{command}: CONFIG is missing; run ddpm-jax {command} CONFIG [--options]")
    return args[0], args[0], args[1:]


def _sample(args: list[str]) -> None:
    from ddpm_jax.cli.options import SampleOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(SampleOptions, args, "ddpm-jax sample")
    _start(options.launch)
    from ddpm_jax.evaluation.sample import destination, sample_to

    out = destination(options.out, options.files, options.channels)
    model = _load(options)
    sample_to(
        out,
        model,
        options.n,
        options.seed,
        options.sampler,
        options.batch_size,
        options.guide,
    )


def _export(args: list[str]) -> None:
    from ddpm_jax.cli.options import ExportOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(ExportOptions, args, "ddpm-jax export")
    _start()
    from ddpm_jax.weights.export import export, new_path

    path = new_path(options.out, options.format)
    export(path, _load(options, on_mesh=False), options.format, options.sampler)


def _likelihood(args: list[str]) -> None:
    from ddpm_jax.cli.options import LikelihoodOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(LikelihoodOptions, args, "ddpm-jax likelihood")
    _start(options.launch)
    from ddpm_jax.evaluation.bound import measure, table
    from ddpm_jax.evaluation.splits import first_of, read_split

    model = _load(options)
    images, first = first_of(read_split(model, options.split, options.data), options.images)
    measured = measure(
        model,
        images,
        options.draws,
        options.seed,
        options.batch_size,
        options.out,
        sampler=options.chain.sampler,
        first=first,
        conditional=options.conditional,
        resolution=options.resolution,
    )
    _print_once(table(measured))


def _calibrate(args: list[str]) -> None:
    from ddpm_jax.cli.options import CalibrateOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(CalibrateOptions, args, "ddpm-jax calibrate")
    _start(options.launch)
    from ddpm_jax.evaluation.calibrate import calibrate, places, table
    from ddpm_jax.evaluation.splits import calibration_split, first_of, read_split

    model = _load(options)
    places(model, options.out)  # One that cannot be is better known before.
    split = options.split or calibration_split(model)
    images, first = first_of(read_split(model, split, options.data), options.images)
    calibrated = calibrate(model, images, first, options.seed, options.batch_size, options.out)
    _print_once(table(calibrated))


def _tune(args: list[str]) -> None:
    from ddpm_jax.cli.options import TuneOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(TuneOptions, args, "ddpm-jax tune")
    _start(options.launch)
    from ddpm_jax.evaluation.tune import table, tune

    tuned = tune(
        _load(options),
        options.steps,
        options.method,
        images=options.images,
        seed=options.seed,
        data=options.data,
        batch_size=options.batch_size,
        out=options.out,
    )
    _print_once(table(tuned))


def _evaluate(args: list[str]) -> None:
    from ddpm_jax.cli.options import EvaluateOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(EvaluateOptions, args, "ddpm-jax evaluate")
    _start(options.launch)
    from ddpm_jax.evaluation.evaluate import evaluate, table

    model = _load(options)
    if model.kind == "raw" and options.weights != "raw":
        raise UserError(
            f"weights: {options.run} holds no averaged weights; pass --weights raw to "
            "evaluate the raw ones"
        )
    result = evaluate(
        model,
        data=options.data,
        n=options.n,
        seed=options.seed,
        sampler=options.sampler,
        batch_size=options.batch_size,
        inception_file=options.inception,
        samples=options.samples,
        likelihood=options.likelihood,
        out=options.out,
        guide=options.guide,
    )
    _print_once(table(result))


def _edit(args: list[str]) -> None:
    name, *args = args or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in EDITS:
        raise UserError(
            f"edit: {name!r} is not one of {', '.join(EDITS)}; run ddpm-jax edit NAME RUN IMAGE "
            "[--options]"
        )
    from ddpm_jax.cli import edit
    from ddpm_jax.cli.parsing import parse

    options = parse(getattr(edit, EDITS[name]), args, f"ddpm-jax edit {name}")
    _start(options.launch)
    options.write(_load(options))


def _compress(args: list[str]) -> None:
    from ddpm_jax.cli.codec import CompressOptions

    _run_codec(CompressOptions, args, "ddpm-jax compress")


def _decompress(args: list[str]) -> None:
    from ddpm_jax.cli.codec import DecompressOptions

    _run_codec(DecompressOptions, args, "ddpm-jax decompress")


def _run_codec(options_class, args: list[str], program: str) -> None:
    from ddpm_jax.cli.parsing import parse

    options = parse(options_class, args, program)
    _start(options.launch)
    _print_once(options.write(_load(options)))


def _figure(args: list[str]) -> None:
    name, *args = args or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in FIGURES:
        names = ", ".join(FIGURES)
        raise UserError(
            f"figure: {name!r} is not one of {names}; run ddpm-jax figure NAME RUN [--options]"
        )
    from ddpm_jax import figures
    from ddpm_jax.cli.parsing import parse

    figure = parse(getattr(figures, FIGURES[name]), args, f"ddpm-jax figure {name}")
    _start()
    figure.draw()


def _report(args: list[str]) -> None:
    from ddpm_jax.cli.options import ReportOptions
    from ddpm_jax.cli.parsing import parse

    options = parse(ReportOptions, args, "ddpm-jax report")
    if options.compute == "none":
        import jax

        # It needs no accelerator, and must not take one's memory from a run.
        jax.config.update("jax_platforms", "cpu")
    _start()
    from ddpm_jax.report.write import report

    report(options.runs, options.out, compute=options.compute, data=options.data)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "plan": _plan,
    "sample": _sample,
    "edit": _edit,
    "compress": _compress,
    "decompress": _decompress,
    "likelihood": _likelihood,
    "evaluate": _evaluate,
    "figure": _figure,
    "export": _export,
    "calibrate": _calibrate,
    "tune": _tune,
    "report": _report,
}


def _load(options, on_mesh: bool = True):
    """The model that the options name; by default on all devices, which share the work."""
    from ddpm_jax.devices.mesh import make_mesh
    from ddpm_jax.weights.load import load_for_command

    mesh = make_mesh() if on_mesh else None
    return load_for_command(options.run, options.weights, options.step, mesh)


def _print_once(text: str) -> None:
    """Prints by the first of several processes."""
    from ddpm_jax.devices.processes import is_first

    if is_first():
        print(text)


def _usage() -> str:
    return USAGE.format(
        configs=_lines(shipped_configs()), figures=_lines(FIGURES), edits=_lines(EDITS)
    )


def _lines(names) -> str:
    """The names, as many a line as fit under the commands' descriptions."""
    indent = " " * 19
    text = ", ".join(names)
    return textwrap.fill(text, 78, subsequent_indent=indent, initial_indent=indent).strip()


def _start(launch=None) -> None:
    """Configures jax, joins the other processes, of which only the first logs, finds the devices.

    Logs advice on the devices where there is any.
    """
    from ddpm_jax.cli.options import Launch
    from ddpm_jax.devices.mesh import all_devices, device_advice
    from ddpm_jax.devices.processes import is_first, join
    from ddpm_jax.devices.runtime import configure_jax

    launch = launch or Launch()
    configure_jax(launch.compile_cache)
    join(launch.coordinator, launch.num_processes, launch.process_id)
    all_devices()
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


def _hide_closed_loops() -> None:
    """Keeps Python from printing that an event loop of Orbax's is closed, or a task not awaited.

    Its threads find that out after a load or save that failed, which is reported already.
    """
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is not sys.__unraisablehook__:
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook
