"""What both entry points do before and after training: ranks, the run's directory, its rows, this rank's model.
A run that is there already is found by `find_trained`.
Costs the model's weights, its adapters and their optimizer states, and 5 bytes a token of the rows."""

from __future__ import annotations

import fcntl
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence, TextIO

import torch
from torch import Tensor
from transformers import AutoTokenizer

from data.batches import Batches
from data.chat import ChatFormat
from data.files import open_regular, sync
from data.template import tokenizer_files
from data.tokenized import TokenizedRows, load_rows
from loop import checkpoint
from loop.config import Config, load_config
from loop.distributed.groups import Ranks
from loop.distributed.preflight import SHAPES
from loop.errors import record_exit, record_exits_in
from loop.identity import WEIGHTS, Course, agree_on_weights, course, digest
from loop.line_file import LOCK
from loop.memory.phases import Memory
from loop.metrics import LoadingBar, RunLog
from loop.optim import make_optimizer
from loop.planned import Plan, measured_gib
from loop.state import State, newest_checkpoint
from model.build import build_empty
from model.moe.usage import start_counting
from model.weights.fetch import from_cache, model_directory
from model.weights.header import parse_json_object
from model.weights.identity import quick_identity

TOKENIZER_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
                   "chat_template.jinja", "generation_config.json")
LOCKS: dict[Path, TextIO] = {}  # by the directory that this process has locked; kept open until the process ends


def start(config: Config, num_stages: int = 1) -> tuple[Ranks, Path, RunLog]:
    """Connects the ranks, finds the model's directory and opens the log, in which only rank 0 writes."""
    ranks = Ranks.from_launcher(deterministic=config.train.deterministic, num_stages=num_stages)
    model_dir = model_directory(config.model.path, quiet=ranks.local_rank != 0)
    ranks.connect(config.distributed.timeout_s, config)
    stage = 0 if ranks.replica else ranks.stage
    return ranks, model_dir, RunLog(config.run_dir, config.log, ranks.device, ranks.is_main, config.log_to, stage)


def prepare_directory(config: Config, say: Callable[[str], None]) -> None:
    """Makes the run's directory and locks it for this process; `resume: never` moves an earlier run of that name aside.

    Raises:
        ValueError: another process trains in the directory, or the directory cannot be written.
    """
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if run_dir.resolve() not in LOCKS:
            lock = open(run_dir / LOCK, "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases the lock when the process ends
            LOCKS[run_dir.resolve()] = lock
    except BlockingIOError:
        raise ValueError(f"{run_dir}: another process trains there. Wait for it, or choose another run=NAME") from None
    except OSError as error:
        raise ValueError(
            f"{error.filename or run_dir}: {error.strerror}. Results go to checkpoints/<run>/ below the current directory, "
            "which must be one that can be written"
        ) from None
    if config.resume == "never" and any(path.name != LOCK for path in run_dir.iterdir()):
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir.rename(aside)  # whole, in one step, and its lock with it
        say(f"resume=never: the earlier run is now {aside}")
        del LOCKS[run_dir.resolve()]
        return prepare_directory(config, say)
    sync(run_dir.parent)
    record_exits_in(run_dir)


def find_model(path: str) -> tuple[Path, bool]:
    """Where the model's shapes are, and whether its weights are there too.

    Raises:
        ValueError: the shapes are neither in a directory, nor in the cache, nor built in.
    """
    directory = Path(path).expanduser()
    if directory.is_dir() or directory.suffix == ".json":
        return directory, bool(list(directory.glob("*.safetensors")))
    if path.count("/") <= 1 and not path.startswith((".", "/", "~")):
        for weights in (True, False) if "/" in path else ():
            cached = from_cache(path, weights)
            if cached is not None and (cached / "config.json").is_file():
                return cached, weights
        built_in = SHAPES / f"{directory.name}.json"
        if built_in.is_file():
            return built_in, False
    known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
    raise ValueError(f"model.path: {path}: no such directory, and not in the cache. Give the directory of a config.json, or "
                     f"one of those whose shapes are built in: {known}")


def load_tokenizer(model_dir: Path) -> Any:
    """Reads the model's tokenizer.

    Raises:
        ValueError: the tokenizer is missing or damaged, or is not a fast one; names the file as far as it is known.
    """
    for file in (model_dir / name for name in TOKENIZER_FILES):
        if file.exists():  # a pipe would wait forever, and neither library says which file of its own is damaged
            with open_regular(file, "a file of the model's tokenizer") as opened:
                check_text(opened.read(), file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever a wrong setting leads to
        where = model_dir / "tokenizer.json" if type(error) is Exception else model_dir
        found = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: no tokenizer could be read ({found}). Expected tokenizer.json and tokenizer_config.json of "
                         "a chat model; download them again") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{model_dir}: its tokenizer has no tokenizer.json, which is needed")
    return tokenizer


def check_text(data: bytes, file: Path) -> None:
    """Raises unless a file of the tokenizer is text, and a JSON object where it is small; tokenizers parses its own file."""
    if file.suffix == ".json" and file.name != "tokenizer.json":
        parse_json_object(data, str(file))
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start} is not UTF-8"
        raise ValueError(f"{file}: {found}; download the file again") from None


def run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """A run's own configuration.

    Raises:
        ValueError: there is no run.
    """
    if not (run_dir / "config.yaml").is_file():
        runs = ", ".join(str(file.parent) for file in sorted(Path("checkpoints").glob("*/config.yaml"))) or "none"
        raise ValueError(f"{run_dir}: no run there. Expected the directory of a run; those in checkpoints: {runs}")
    return load_config(run_dir / "config.yaml", list(overrides))


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and the model and tokenizer that the run began with."""

    path: Path
    config: Config
    model_dir: Path
    identity: str  # of the base model, see model/weights/identity.py
    chat: ChatFormat

    @property
    def adapter(self) -> Path:
        return self.path / checkpoint.ADAPTER


def find_trained(source: Path, which: str, overrides: Sequence[str] = ()) -> Trained:
    """Finds a checkpoint that verifies, and the base model that it was trained on.

    Args:
        source: the directory of a run or of one of its checkpoints.
        which: of a run's checkpoints: best, newest, or the number of a step.
        overrides: settings that are others here, such as model.path=DIR.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the base model is another one now.
    """
    if (source / checkpoint.MANIFEST).is_file():
        source, which = source.resolve().parent, source.resolve().name.removeprefix("step-")
    config = run_config(source, overrides)
    path = checkpoint.find_checkpoint(source, which)
    model_dir = model_directory(config.model.path)
    known, found = checkpoint.read_json(path / checkpoint.STATE)["settings"].get("base model"), quick_identity(model_dir)
    if known not in (None, found):
        raise ValueError(f"{config.model.path}: another model than the one that {path} was trained on ({found}, expected "
                         f"{known}). Name that one with --set model.path=DIR")
    return Trained(path, config, model_dir, found, ChatFormat(load_tokenizer(model_dir), config.data.think))


def load_batches(config: Config, model_dir: Path, ranks: Ranks) -> tuple[Batches, Batches, ChatFormat | None]:
    """This rank's share of each step, of the training rows and of the held-out rows; on rank 0 also what has rendered them.
    Only rank 0 reads and tokenizes."""
    chat = ranks.on_main(lambda: ChatFormat(load_tokenizer(model_dir), config.data.think))

    def prepare() -> list[dict[str, Tensor]]:
        assert chat is not None
        cache = config.run_dir / "data"
        return [load_rows(split, chat.tokenizer, config.data, cache).to_tensors() for split in ("train", "eval")]

    prepared = ranks.on_main(prepare)
    train, held_out = [TokenizedRows.from_tensors(ranks.broadcast_tensors(tensors)) for tensors in prepared or (None, None)]
    shares = (config.train.rows_per_step, config.train.microbatch_tokens, ranks.replica, ranks.num_replicas)
    return Batches(train, *shares), Batches(held_out, *shares), chat


@dataclass(frozen=True)
class Earlier:
    """What a run is, and how far an earlier start of it came."""

    settings: Course  # on rank 0
    newest: Path | None  # the checkpoint to continue from, on rank 0
    done: int  # steps up to that checkpoint, on rank 0
    is_finished: bool  # the same on all ranks


def earlier_start(
    config: Config, model_dir: Path, batches: Batches, held_out: Batches, ranks: Ranks, say: Callable[[str], None]
) -> Earlier:
    """Finds the checkpoint from which the run continues, before anything of the model is read.

    Raises:
        ValueError: the run cannot be continued with these settings.
    """
    settings: Course = ranks.on_main(lambda: course(config, model_dir, batches.rows, held_out.rows)) or {}
    newest = ranks.on_main(lambda: newest_checkpoint(config, settings, say))
    state = checkpoint.read_json(newest / checkpoint.STATE) if newest else {"step": 0}
    total = config.train.total_steps(batches.steps_per_epoch)
    is_finished = state["step"] >= total and state["eval_loss"] is not None
    is_finished = bool(ranks.broadcast(torch.tensor([is_finished], dtype=torch.int64, device=ranks.device)))
    if is_finished:
        say(f"{config.run_dir} is finished already, {state['step']:,} of {total:,} steps. Train longer with train.epochs or "
            "train.max_steps, start anew with resume=never, or choose another run=NAME")
    return Earlier(settings, newest, state["step"], is_finished)


def load_state(
    config: Config, model_dir: Path, earlier: Earlier, chat: ChatFormat | None, ranks: Ranks, memory: Memory,
    say: Callable[[str], None],
) -> State:
    """Builds this rank's stage of the model, reads its weights, and makes the optimizer of its adapters."""
    files = ranks.on_main(lambda: tokenizer_files(chat) if chat else {}) or {}
    with memory.during("build"):
        stage, weights = build_empty(
            model_dir, config.model.base, config.lora, seed=config.train.seed, device=ranks.device,
            recompute=config.train.recompute, keep_layers=config.train.keep_layers, first=ranks.first, stop=ranks.stop,
        )
    gc.freeze()
    gc.unfreeze()  # all objects are in the oldest generation now, which is collected least often
    gc.enable()  # off since the entry point's imports
    memory.attach(stage.model)
    with memory.during("load"), LoadingBar(ranks.device, enabled=ranks.is_main) as bar:
        checksums = weights.load(model_dir, bar.advance)
    checksums = agree_on_weights(checksums, config.model.path, ranks)
    earlier.settings[WEIGHTS] = digest(checksums)
    if config.train.router_stats:
        start_counting(stage.model)
    adapters = stage.adapters()
    optimizer = make_optimizer(config.train.optimizer, adapters.values(), config.train.weight_decay)
    memory.attach(stage.model, adapters.values(), optimizer)
    samples = for_samples(config, chat, ranks, say)
    return State(stage, adapters, optimizer, earlier.settings, checksums, earlier.newest, samples, files)


def for_samples(config: Config, chat: ChatFormat | None, ranks: Ranks, say: Callable[[str], None]) -> ChatFormat | None:
    """What `eval.samples` needs, on the rank that writes the answers."""
    if config.eval.samples and ranks.num_stages > 1:
        say("no samples.jsonl is written: eval.samples needs the whole model on one rank")
        return None
    return chat if config.eval.samples else None


def headline(batches: Batches, held_out: Batches, state: State, ranks: Ranks) -> str:
    """The size of the run, in one line."""
    left_out = sum(counts.rows - counts.kept for counts in batches.rows.counts.values())
    without = f" ({left_out:,} left out: loop.inspect says why)" if left_out else ""
    num_trained = sum(parameter.numel() for parameter in state.adapters.values())
    of_stage = f" in stage 0 of {ranks.num_stages}" if ranks.num_stages > 1 else ""
    return (f"{batches.num_rows:,} rows{without}, {held_out.num_rows:,} held out, {batches.steps_per_epoch:,} steps an epoch, "
            f"{num_trained:,} trained parameters{of_stage}, {ranks.world_size} rank(s) on {ranks.device.type}")


def finish(config: Config, plan: Plan, memory: Memory, log: RunLog, ranks: Ranks) -> None:
    """Prints planned and measured memory and time and the run's directory, then disconnects the ranks."""
    measured = measured_gib(memory.most_bytes, ranks)  # waits for all ranks, so that the last checkpoint is written
    log.say(plan.comparison(measured, log.steps_s, memory.growth.found))
    leave(config, log, ranks)


def leave(config: Config, log: RunLog, ranks: Ranks) -> None:
    """Says that the run is finished, and disconnects the ranks."""
    ranks.signals.is_finished = True
    log.say(f"finished: {config.run_dir}")
    record_exit(0, "finished")
    log.close()
    ranks.disconnect()
