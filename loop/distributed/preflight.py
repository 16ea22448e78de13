"""Checks what a user can get wrong before anything is started, downloaded or imported: settings, rows, model, directory.
Imports no torch and reads a row of each data file; takes a tenth of a second.

python -m loop.distributed.preflight train.py --config configs/4b.yaml [key=value ...]
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Sequence

from data.config import DataConfig
from data.files import open_regular
from data.records import Dropped, read_rows, refuse
from loop.config import Config
from loop.config.command_line import parse_command_line
from loop.errors import ROOT, run_command
from model.architectures import LINEARS, WITH_EXPERTS, read_config
from model.config import check_keep_layers, check_targets, local_directory

SCRIPTS = {ROOT / "train.py": False, ROOT / "pipeline_train.py": True}  # the entry points, and whether they split the model
SHAPES = ROOT / "configs/models"  # config.json of the models that the configurations name
QUIET_S = 3  # how long a rank that prints nothing leaves the one that prints: launchers stop all ranks when the first ends


def preflight(splits: bool = False) -> Config:
    """Reads this process's command line and checks it. One rank of a host prints what is wrong, and only at its first start;
    the others exit with the same status.

    Raises:
        ValueError: something that the user has to change.
    """
    if is_first():
        return check(parse_command_line(splits), splits)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return check(parse_command_line(splits), splits)
    except (ValueError, OSError, SystemExit) as error:
        time.sleep(QUIET_S)
        sys.exit(error.code if isinstance(error, SystemExit) else 2)


def is_first() -> bool:
    """Whether no other rank of this host, and no earlier start of this rank, says the same."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 == int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def check_script(command: list[str], has_rows: bool = True) -> None:
    """Checks the command line of an entry point, the script first; does nothing for other scripts.

    Args:
        has_rows: False on a host that need not have the rows, as all but the first.

    Raises:
        ValueError: as `preflight`.
    """
    splits = SCRIPTS.get(Path(command[0]).resolve())
    if splits is not None:
        check(parse_command_line(splits, command[1:]), splits, has_rows)


def check(config: Config, splits: bool, has_rows: bool = True) -> Config:
    """Returns the configuration after all checks. The rows and the run's directory are checked where they have to be: on the
    first host."""
    if has_rows and int(os.environ.get("GROUP_RANK", os.environ.get("RANK", 0))) == 0:
        check_rows(config.data)
        check_place(config.run_dir)
        if config.log_to and not find_spec(config.log_to):
            raise ValueError(f"log_to is {config.log_to}, which is not installed: pip install {config.log_to}, or log_to=null")
    check_model(config, splits)
    if splits:
        check_ranks(launched_ranks(), config.pipeline.num_stages(otherwise=1))
    return config


def check_rows(config: DataConfig) -> None:
    """Raises:
        ValueError: a data file cannot be read, or begins with a row that cannot be trained on.
    """
    for name in ("train", "eval"):
        path, expected = config.file(name), f"a JSONL file of chat rows, one row a line; data.{name}=FILE names yours"
        open_regular(path, expected).close()
        first = next(read_rows(config, name), None)
        if first is None:
            raise ValueError(f"{path}: no rows. Expected {expected}")
        if isinstance(first, Dropped) and first.bad:
            refuse(config, name, [row for row in read_rows(config, name) if isinstance(row, Dropped) and row.bad])


def check_place(run_dir: Path) -> None:
    """Raises:
        ValueError: the run's directory cannot be made or written.
    """
    try:
        run_dir = Path.cwd() / run_dir
    except FileNotFoundError:
        raise ValueError("the working directory was removed. Change into one that is there") from None
    nearest = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        found = "cannot be written" if nearest.is_dir() else "not a directory"
        raise ValueError(f"{nearest}: {found}. Results go to checkpoints/<run>/ below the current directory, "
                         "which must be one that can be written")


def check_model(config: Config, splits: bool) -> None:
    """Checks what a model's config.json tells; a hub name has one here if its shapes are built in, and is passed over if not.

    Raises:
        ValueError: the model is not there, is not supported, or does not fit the settings.
    """
    directory = local_directory(config.model.path)
    file = directory / "config.json" if directory else SHAPES / f"{Path(config.model.path).name}.json"
    if directory is None and not file.is_file():
        return
    model = read_config(file)
    if directory is not None and not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory}: no *.safetensors files. Expected the weights beside config.json (model.path)")
    check_targets(config.lora, LINEARS[model["model_type"]], model["model_type"] in WITH_EXPERTS)
    num_sublayers = 2 * model["num_hidden_layers"]
    check_keep_layers(config.train.keep_layers, 0, num_sublayers)  # of the whole model: one GPU would train it whole
    if splits:
        check_split(config.pipeline.split, num_sublayers)


def check_split(split: Sequence[int] | Literal["auto"], num_sublayers: int) -> None:
    """Raises:
        ValueError: a stage would be empty, or begin outside the model.
    """
    if split != "auto" and any(start >= stop for start, stop in zip([0, *split], [*split, num_sublayers])):
        raise ValueError(
            f"pipeline.split {str(list(split))[:80]}: the model has {num_sublayers} sublayers, two a decoder layer; "
            f"expected ascending numbers from 1 to {num_sublayers - 1}, so that no stage is empty"
        )


def check_ranks(num_ranks: int, num_stages: int) -> None:
    """Raises:
        ValueError: the launcher started several ranks that do not make whole replicas.
    """
    if num_ranks > 1 and num_ranks % num_stages:
        raise ValueError(f"{num_ranks} ranks for a model in {num_stages} stages, expected a multiple of {num_stages}")


def launched_ranks() -> int:
    """How many processes the launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    run_command(lambda: check_script(sys.argv[1:]))
