"""Strict YAML and key=value overrides -> frozen dataclasses. Whatever is not known, or has another type, is an error."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.records import DataConfig
from loop.checkpoint import CheckpointConfig
from loop.evaluate import EvalConfig
from loop.fit import TrainConfig
from loop.ranks import DistributedConfig
from loop.split import PipelineConfig
from model.build import ModelConfig
from model.lora import LoraConfig


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Each section is explained in the module that uses it."""

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
    log: str = "/tmp/chess-train.log"  # the console's lines, appended

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.run) or self.run.startswith("."):
            raise ValueError(f"run is {self.run!r}, expected a name of letters, digits, '.', '_' and '-'")

    @property
    def run_dir(self) -> Path:
        return Path("checkpoints") / self.run


def parse_command_line(description: str, argv: list[str] | None = None) -> Config:
    """`--config FILE [key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    return load_config(args.config, args.overrides)


def parse_pipeline_command_line(description: str, argv: list[str] | None = None) -> Config:
    """The same, with `--split CUTS` short for `pipeline.split=CUTS`, and a configuration by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--split", metavar="CUTS", help="sublayers where stages 1, 2, ... begin: 40 | 30,60 | auto")
    add_config_arguments(parser, default="configs/35b.yaml")
    args = parser.parse_intermixed_args(argv)
    split = [] if args.split is None else [f"pipeline.split={args.split}"]
    return load_config(args.config, [*args.overrides, *split])


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--config", required=default is None, default=default, metavar="FILE", help="such as configs/4b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.learning_rate=2e-4")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies overrides.

    Raises:
        ValueError: names the file or override, the key, what was found and what was expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = OmegaConf.create(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}. Expected a configuration file, such as configs/4b.yaml") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path}: expected sections such as model: and train:, found {type(loaded).__name__}")
    if "${" in text:
        raise ValueError(f"{path}: ${{...}} is not supported: write the value itself")
    config = OmegaConf.structured(Config)
    config = attempt(str(path), lambda: OmegaConf.merge(config, loaded))
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r}: expected key=value, such as train.learning_rate=2e-4")
        nested: Any = convert(key, value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = attempt(override, lambda: OmegaConf.merge(config, nested))
    result: Config = attempt(str(path), lambda: OmegaConf.to_object(config))
    check_finite(result)
    return result


def convert(key: str, value: str) -> Any:
    """An override's text, ready for OmegaConf: lists at commas, null as None; the rest it converts by the field's type."""
    kind: Any = Config
    for part in key.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = fields.get(part)
    if "${" in value:
        raise ValueError(f"{key}: ${{...}} is not supported: write the value itself")
    if typing.get_origin(kind) is tuple:
        return [item.strip() for item in value.strip("[]() ").split(",") if item.strip()]
    if value in ("null", "None") and type(None) in typing.get_args(kind):
        return None
    return value


def attempt(where: str, action: Any) -> Any:
    """Turns what OmegaConf and the sections' own checks raise into one message that begins with its place."""
    try:
        return action()
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type", "reference_type"))]
    return "; ".join(kept).replace("full_key:", "key:")


def check_finite(section: Any, prefix: str = "") -> None:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{prefix}{item.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{item.name} is {value}, expected a finite number")


def to_yaml(config: Config) -> str:
    """The configuration as resolved, in the order of the file."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
