"""Settings that cannot act in a run, a line each: such a setting is a mistake."""

from collections.abc import Collection, Iterator

from ddpm_jax.config import Config, Data, Train, value_of
from ddpm_jax.config.places import READ_AS_NEEDED

EVERY = (
    "train.log_every",
    "train.eval_every",
    "train.sample_every",
    "train.evaluate_every",
    "checkpoint.every",
)
"""Settings that space work over the updates; it is also done after the last one."""


def idle_settings(
    config: Config,
    *,
    streamed: bool,
    held_out: int,
    devices: int,
    given: Collection[str] = (),
    has_no_class: bool = False,
) -> list[str]:
    """A line for each setting of `config` that has no effect in this run, or an unwanted one.

    `streamed` says whether images are read from files as they are needed, `held_out` how many are
    held out, `has_no_class` whether some images are labelled as of no class. Settings that suit the
    longer run of a config file are named only where the user gave them on the command line:
    `given`.
    """
    return [
        *_of_network(config),
        *_of_data(config, streamed),
        *_of_training(config, held_out, devices, given),
        *_of_classes(config, has_no_class),
    ]


def _of_network(config: Config) -> Iterator[str]:
    side = min(config.data.image_shape[:2])
    levels = [side >> level for level in range(len(config.model.channel_multipliers))]
    model = config.model
    if not model.num_classes and not model.no_class:
        yield "model.no_class: this model has no classes at all (model.num_classes)"
    none = [size for size in model.attention_resolutions if size not in levels]
    if none:
        yield (
            f"model.attention_resolutions: no level has the resolution {_words(none)}, so it adds "
            f"no attention; the levels have {_words(levels)}"
        )


def _of_data(config: Config, streamed: bool) -> Iterator[str]:
    data = config.data
    if data.class_names and not config.model.num_classes:
        yield "data.class_names: this model has no classes (model.num_classes)"
    default = Data()
    kinds = {data.source.partition(":")[0], (data.test or "").partition(":")[0]}
    for name in ("dir", "manual_dir"):
        if getattr(data, name) is not None and "tfds" not in kinds:
            yield f"data.{name}: only tfds data sets use it, not {data.source}"
    if data.workers != default.workers and not streamed:
        yield "data.workers: all images are in memory, so no process reads ahead"
    elif data.workers != default.workers and data.source.startswith("npy:"):
        yield "data.workers: a thread reads npy files ahead, whatever it says"
    if data.disk_cache_mb != default.disk_cache_mb and "folder" not in kinds:
        yield f"data.disk_cache_mb: only folders are kept there, not {data.source}"
    in_memory = not kinds & READ_AS_NEEDED
    if data.cache_mb != default.cache_mb and in_memory and not data.on_device:
        yield f"data.cache_mb: the images of {data.source} are in memory whatever it says"


def _of_training(
    config: Config, held_out: int, devices: int, given: Collection[str]
) -> Iterator[str]:
    train = config.train
    optim = config.optim
    if optim.warmup_steps > train.steps:
        rate = optim.learning_rate * train.steps / optim.warmup_steps
        yield (
            f"optim.warmup_steps: {optim.warmup_steps} is more than train.steps {train.steps}, so "
            f"the learning rate only rises to {rate:.2g}"
        )
    evaluates = train.eval_every > 0 and held_out > 0
    if "train.eval_every" in given and train.eval_every and not held_out:
        yield "train.eval_every: no images are held out (data.holdout), so no loss is measured"
    if "train.eval_images" in given and not evaluates:
        yield "train.eval_images: no held-out loss is measured"
    if not train.evaluate_every:
        for name in ("evaluate_images", "inception"):
            if getattr(train, name) != getattr(Train(), name):
                yield f"train.{name}: nothing is evaluated (train.evaluate_every is 0)"
    for name in EVERY:
        if name in given and value_of(config, name) > train.steps:
            yield (
                f"{name}: {value_of(config, name)} is more than train.steps {train.steps}, so it "
                "is done after the last step alone"
            )
    if config.parallel.mode == "pmap" and devices == 1:
        yield "parallel.mode: on one device, pmap computes what jit does"


def _of_classes(config: Config, has_no_class: bool) -> Iterator[str]:
    rate = config.train.label_dropout
    if rate == Train().label_dropout:
        return
    if not config.model.num_classes:
        yield "train.label_dropout: this model has no classes (model.num_classes), so no labels"
    elif not config.model.no_class:
        if rate:
            yield "train.label_dropout: model.no_class is off, so every image keeps its label"
    elif rate == 0 and not has_no_class:
        yield (
            "train.label_dropout: at 0 the row of no class is never trained, so guidance and "
            "samples without a label mean nothing; raise it, or pass --model.no-no-class"
        )
    elif rate == 1:
        yield "train.label_dropout: at 1 no image keeps its label, so no class is ever trained"


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
