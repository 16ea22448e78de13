"""The settings of a run, read from YAML and key=value overrides; unknown names and wrong types are errors.
Imports no torch, so that a typing error is reported at once."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig
from data.limits import DEEPEST, check_nesting
from model.config import LoraConfig, ModelConfig

MOST = 1_000_000_000  # where nothing else bounds a number
MOST_STEPS = 10_000_000  # which take months; seeds are added to steps and ranks, and stay within 64 bits
BOUNDS: dict[str, tuple[float, float, str]] = {  # the least and the largest value of a setting, and what else it may be
    "train.epochs": (1, 100_000, ""), "train.rows_per_step": (1, MOST, ""),
    "train.microbatch_tokens": (128, 2**24, ""),  # positions in a packed stream are 32-bit numbers
    "train.learning_rate": (1e-12, 1, ""),  # AdamW moves a weight by about the rate: above 1 no weight keeps its meaning
    "train.warmup_fraction": (0, 1, ""),
    "train.weight_decay": (0, 100, ""),  # a step takes the share rate times decay from a weight
    "train.max_grad_norm": (1e-12, 1e12, ""),  # norms are float32, which ends at 3e38
    "train.keep_layers": (0, 1000, ""), "train.max_steps": (1, MOST_STEPS, ", or null"), "train.seed": (0, 2**63 - 1, ""),
    "train.memory_trace": (1, MOST_STEPS, ", or null"),
    "eval.every": (1, MOST, " steps"), "eval.samples": (0, 1000, " rows"), "eval.max_rows": (1, MOST, ", or null for all rows"),
    "checkpoint.every": (1, MOST, " steps"), "checkpoint.every_s": (1, MOST, " seconds"), "checkpoint.keep": (1, MOST, ""),
    "distributed.timeout_s": (1, 7 * 24 * 3600, " seconds"),
    "review.least_votes": (1, MOST, ""), "review.significance": (1e-6, 0.5, ""), "review.more_wrong": (0, 1, ""),
}
MOST_BYTES = 64 * 1024  # of a configuration; those in configs/ have 2,000
LONGEST = 240  # characters of what an error repeats


class Section:
    """A section of the configuration, such as `train`; checks the settings that BOUNDS names."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for key, value in vars(self).items():
            least, most, otherwise = BOUNDS.get(f"{section}.{key}", (0, 0, ""))
            if most and value is not None and not least <= value <= most:
                bounds = f"{least:,} to {most:,}" if isinstance(value, int) else f"a finite number from {least:g} to {most:g}"
                raise ValueError(f"{section}.{key} is {shortened(str(value))}, expected {bounds}{otherwise}")


@dataclass(frozen=True)
class TrainConfig(Section):
    """Length, rate, batch size and memory of the training."""

    epochs: int  # how often every row is trained on
    rows_per_step: int  # rows of one optimizer step, over all ranks
    microbatch_tokens: int  # most tokens of one forward and backward pass
    learning_rate: float  # at the end of the warmup
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after the warmup; cosine ends at 0
    warmup_fraction: float = 0.03  # share of all steps in which the learning rate rises from 0
    weight_decay: float = 0.01  # of AdamW: a step takes the share rate times decay from each weight
    max_grad_norm: float = 1.0  # a longer gradient, over all adapters, is scaled down to this length
    optimizer: Literal["adamw", "adamw8bit"] = "adamw8bit"  # states of 4 or of 1 byte a number
    recompute: bool = True  # recompute activations in the backward pass, decoder layer by decoder layer
    keep_layers: int = 0  # layers at the end of each stage that are not recomputed; `loop.plan --fit` says how many fit
    max_steps: int | None = None  # optimizer steps; null: as many as `epochs` take
    seed: int = 42  # of the order of rows, the adapters' first values and dropout
    deterministic: bool = False  # makes repeated runs on a GPU bit-equal, and slower; on the CPU they always are
    router_stats: bool = False  # record each step how evenly every layer's routed experts were used
    fast_paths: Literal["auto", "off", "require"] = "auto"  # switch off those that fail at the start, or all; or fail with them
    compile: Literal["auto", True, False] = "auto"  # elementwise work into one pass over memory; auto: where it pays
    plan: bool = True  # forecast the run's memory in another process, and compare at the end
    memory_trace: int | None = None  # optimizer step whose allocations are written as a page into the run's directory

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_layers and not self.recompute:
            raise ValueError("train.keep_layers keeps layers from being recomputed, but train.recompute is false: all are kept")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps or self.epochs * steps_per_epoch


@dataclass(frozen=True)
class EvalConfig(Section):
    """When the held-out loss is computed: at step 0, every `every` steps, at checkpoints and at the end; and on which rows."""

    every: int = 200  # optimizer steps
    max_rows: int | None = None  # the first so many rows; null: all
    samples: int = 0  # held-out rows whose answers are written to samples.jsonl at each evaluation, by a model on one rank


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = 500  # optimizer steps
    every_s: int = 1200  # seconds after which one is written in any case; it is not evaluated, and kept until the next one
    keep: int = 3  # checkpoints with the lowest held-out loss; the newest is always kept


@dataclass(frozen=True)
class DistributedConfig(Section):
    """How ranks communicate."""

    timeout_s: int = 600  # seconds after which a rank that hangs has ended the whole run


@dataclass(frozen=True)
class ReviewConfig(Section):
    """What makes the verdict of `python -m loop.review` a go; fixed before the first vote."""

    least_votes: int = 40  # pairs on which somebody must have voted
    significance: float = 0.05  # of the exact one-sided sign test that the tuned model beats the base where one is better
    more_wrong: float = 0.1  # how far the share of its comments with wrong facts may lie above the references'


@dataclass(frozen=True)
class PipelineConfig:
    """How pipeline_train.py splits the model; train.py ignores this section."""

    split: Any = "auto"  # sublayers at which the stages 1, 2, ... begin: 40 or [30, 60]; auto: one balanced stage a process
    schedule: Literal["gpipe", "1f1b"] = "gpipe"  # 1f1b: as fast, and each stage holds fewer microbatches at once

    def __post_init__(self) -> None:
        text = str(self.split).strip("[](), ")
        try:
            split = "auto" if text == "auto" else [int(cut) for cut in text.split(",")]
        except ValueError:
            raise ValueError(
                f"pipeline.split is {shortened(text)!r}, expected sublayer numbers such as 40 or 30,60, or auto") from None
        object.__setattr__(self, "split", split)

    def num_stages(self, otherwise: int) -> int:
        """The number of stages; `otherwise` where the split is automatic."""
        return otherwise if self.split == "auto" else len(self.split) + 1


@dataclass(frozen=True)
class Config:
    """All settings of a run. `data` is defined in data/records.py, `model` and `lora` in model/config.py."""

    run: str  # results go to checkpoints/<run>/
    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: Literal["auto", "never", "force"] = "auto"  # continue the run in its directory, start anew, or continue anyway
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)  # for pipeline_train.py
    review: ReviewConfig = field(default_factory=ReviewConfig)
    log: str = "/tmp/chess-train.log"  # the console's lines, appended
    log_to: Literal["tensorboard"] | None = None  # where else the numbers of metrics.jsonl are shown

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.run) or self.run.startswith("."):
            raise ValueError(f"run is {shortened(self.run)!r}, expected a name of letters, digits, '.', '_' and '-'")

    @property
    def run_dir(self) -> Path:
        return Path("checkpoints") / self.run


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies overrides.

    Raises:
        ValueError: names the file or override, the key, what was found and what was expected.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}. Expected a configuration file, such as configs/4b.yaml") from None
    if len(raw) > MOST_BYTES:
        raise ValueError(f"{path}: over {MOST_BYTES:,} bytes, expected a configuration file, such as configs/4b.yaml")
    try:
        text = raw.decode("utf-8-sig")
        check_nesting(text)
        loaded = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: thousands of digits
        raise ValueError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path}: expected sections such as model: and train:, found {type(loaded).__name__}")
    if "${" in text:
        raise ValueError(f"{path}: ${{...}} is not supported: write the value itself")
    for name in ("lora.target", "data.sources"):  # one name is a list of one
        if isinstance(OmegaConf.select(loaded, name), str):
            OmegaConf.update(loaded, name, convert(name, OmegaConf.select(loaded, name)))
    with errors_begin_with(path):
        merged: Any = OmegaConf.merge(OmegaConf.structured(Config), loaded)
    return overridden(merged, overrides or [], str(path))


def overridden(config: Config | DictConfig, overrides: list[str], where: str = "the configuration") -> Config:
    """Returns the configuration with some settings changed.

    Raises:
        ValueError: as `load_config`.
    """
    merged: Any = config
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"{shortened(override)!r}: expected key=value, such as train.learning_rate=2e-4")
        if name.count(".") > DEEPEST:
            raise ValueError(f"{shortened(override)}: no such setting, expected a section and a name, such as train.seed")
        nested: Any = convert(name, text)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        with errors_begin_with(override):
            merged = OmegaConf.merge(merged, nested)
    try:
        result: Any = OmegaConf.to_object(OmegaConf.create(merged))
    except (OmegaConfBaseException, ValueError) as error:  # of a value: it stands in an override or in the file
        named = [override for override in overrides if f"{override.partition('=')[0]} is " in str(error)]
        raise ValueError(f"{shortened([where, *named][-1])}: {one_line(error)}") from None
    for name, value in by_name(result).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
    return result


def by_name(config: Config) -> dict[str, Any]:
    """The settings of all sections by their names in overrides, such as `train.seed`."""
    return {f"{section}.{key}": value for section, settings in dataclasses.asdict(config).items()
            if isinstance(settings, dict) for key, value in settings.items()}


def convert(key: str, value: str) -> Any:
    """Splits lists at commas and turns null into None; OmegaConf converts other texts to the type of their field."""
    kind: Any = Config
    for name in key.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = fields.get(name)
    if "${" in value:
        raise ValueError(f"{key}: ${{...}} is not supported: write the value itself")
    kinds = (kind, *typing.get_args(kind))
    if value in ("null", "None") and type(None) in kinds:
        return None
    if any(typing.get_origin(one) is tuple for one in kinds):
        return [item.strip() for item in value.strip("[]() ").split(",") if item.strip()]
    if value in ("true", "false") and True in kinds:
        return value == "true"
    return value


@contextmanager
def errors_begin_with(where: str | Path) -> Iterator[None]:
    """Turns errors of OmegaConf and of the sections' own checks into one line that begins with a file or an override."""
    try:
        yield
    except (OmegaConfBaseException, ValueError) as error:
        name = str(where).partition("=")[0]  # of an override
        said = one_line(error).removesuffix(f"; key: {name}")
        elsewhere = sections_with(name.rpartition(".")[2]) if "not in" in said and "Did you mean" not in said else []
        meant = f". Did you mean: {' or '.join(elsewhere)}?" if elsewhere else ""
        raise ValueError(f"{shortened(str(where))}: {said}{meant}") from None


def sections_with(key: str) -> list[str]:
    """The settings of any section that have this name."""
    sections = {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    return [f"{name}.{key}" for name, kind in sections.items() if key in {field.name for field in dataclasses.fields(kind)}]


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type", "reference_type"))]
    return shortened("; ".join(kept).replace("full_key:", "key:"))


def shortened(text: str) -> str:
    """The beginning and the end of a text that a user may have made very long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST // 3]} ... {text[-LONGEST * 2 // 3:]}"


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
