"""The commands: each parses its options, calls, prints.

Each imports its own part of the package when it runs: `ddpm-jax --help` needs none of it.
"""

import dataclasses
import logging
from collections.abc import Callable

from ddpm_jax.cli.usage import EDITS, FIGURES, usage
from ddpm_jax.errors import UserError

log = logging.getLogger("ddpm_jax")


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
        print(usage())
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
        print(usage())
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
