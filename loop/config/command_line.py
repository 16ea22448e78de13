"""The command lines of train.py, pipeline_train.py and of all commands that take a configuration: which file, which settings,
and a `--help` that explains them all. What it says of a setting is the comment beside its field, read from the source.

python -m loop.config.command_line    # prints docs/settings.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from typing import Any, Iterator

from loop.config import BOUNDS, MOST, Config, load_config

KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "list of numbers, or auto"}


def parse_command_line(splits: bool = False, arguments: list[str] | None = None) -> Config:
    """Reads the arguments of train.py, `--config FILE [key=value ...]`, or those of pipeline_train.py, which `splits`: there
    the file has a default, and `--split CUTS` is another form of `pipeline.split=CUTS`. This process's own by default."""
    over = "split over several devices" if splits else "on one device or, under torchrun, on several"
    script = "pipeline_train.py" if splits else "train.py"
    parser = argparse.ArgumentParser(prog=script, description=f"Train LoRA adapters on a model {over}.")
    if splits:
        parser.add_argument("--split", metavar="CUTS", help="sublayers where stages 1, 2, ... begin: 40 | 30,60 | auto")
    add_config_arguments(parser, default="configs/35b.yaml" if splits else None)
    args = parser.parse_intermixed_args(arguments)
    cuts = [f"pipeline.split={args.split}"] if splits and args.split is not None else []
    return load_config(args.config, args.overrides + cuts)


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--config", required=default is None, default=default, metavar="FILE", help="such as configs/4b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.learning_rate=2e-4")
    if {"-h", "--help"} & set(sys.argv):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = as_text()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, as a user reads of it."""

    name: str  # as in an override, such as train.seed
    default: str  # as in YAML; empty where a configuration must name it
    values: str  # which it may have
    meaning: str


def sections() -> Iterator[tuple[str, str, list[Setting]]]:
    """The name and the purpose of each section, and its settings; first those that stand outside of all sections."""
    kinds = typing.get_type_hints(Config)
    yield "", "Of the run itself.", settings_of(Config, "")
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            yield name, inspect.cleandoc(kind.__doc__ or ""), settings_of(kind, f"{name}.")


def settings_of(section: Any, prefix: str) -> list[Setting]:
    """The settings of a dataclass, but none that is a section itself."""
    comments = dict(re.findall(r"^    (\w+): .*?(?:  # (.*))?$", inspect.getsource(section), re.MULTILINE))
    kinds = typing.get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(kinds[field.name]):
            name = prefix + field.name
            default = "" if field.default is dataclasses.MISSING else as_yaml(field.default)
            found.append(Setting(name, default, values_of(name, kinds[field.name]), comments[field.name]))
    return found


def values_of(name: str, kind: Any) -> str:
    """Which values a setting of this type may have, in words."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(as_yaml(value) for value in inner)
    if typing.get_origin(kind) is tuple:
        return "list of names"
    if inner:
        return " | ".join("null" if one is type(None) else values_of(name, one) for one in inner)
    if name in BOUNDS and kind in (int, float):
        least, most, _ = BOUNDS[name]
        if most == MOST:
            return f"{least:,} or more"
        return f"{least:,} to {most:,}" if kind is int else f"{least:g} to {most:g}"
    return KINDS.get(kind, "")


def as_yaml(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def as_text() -> str:
    """All settings, for a terminal."""
    lines = ["settings, in the configuration file or as key=value; what has no default must be in the file:"]
    for name, purpose, settings in sections():
        lines += ["", *textwrap.wrap(f"{name or 'run'}: {purpose}", 100)]
        for setting in settings:
            lines.append(f"  {setting.name}{f'={setting.default}' * bool(setting.default)}    ({setting.values})"
                         if setting.values else f"  {setting.name}={setting.default}")
            lines += textwrap.wrap(setting.meaning, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def as_markdown() -> str:
    """All settings, as docs/settings.md."""
    lines = ["# Settings", "", "In a configuration file as sections (`configs/4b.yaml` is one), on a command line as "
             "`train.seed=7`. What has no default must be in the file.\nThis page is printed by "
             "`python -m loop.config.command_line` from the dataclasses that hold the settings, and `--help` of a command says "
             "the same."]
    for name, purpose, settings in sections():
        lines += ["", f"## {name or 'The run'}", "", " ".join(purpose.split()), "",
                  "| setting | default | values | meaning |", "|---|---|---|---|"]
        for setting in settings:
            default = f"`{setting.default}`" if setting.default else ""
            cells = [cell.replace("|", "\\|") for cell in (f"`{setting.name}`", default, setting.values, setting.meaning)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
