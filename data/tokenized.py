"""Rows of one split as flat token arrays, tokenized once and cached under a hash of all that determines the tokens.
Costs 5 bytes a token; tokenizing also holds the text of 256 rows."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from data.cache import read_tensors, write_tensors
from data.chat import ChatFormat, Example, Rendered
from data.config import DataConfig
from data.files import clear_partial
from data.limits import MAX_RENDERED
from data.records import MAX_SHOWN, OVERLONG, Dropped, Row, described, open_rows, read_split, refuse

FORMAT = 4  # increase FORMAT when ids or masks of the same rows change, so that old caches are not read
ROWS_AT_ONCE = 128
MAX_SOURCES_SHOWN = 5


@dataclass
class SourceCounts:
    """How many rows of one source were kept or dropped, and what was made of them."""

    rows: int = 0  # rows read
    kept: int = 0  # rows trained on
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: int = 0  # sequences made of the kept rows
    truncated: int = 0  # examples cut at max_tokens
    tokens: int = 0
    supervised_tokens: int = 0
    with_thought: int = 0  # kept rows with a supervised thought

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


@dataclass
class TokenizedRows:
    """All examples of one split, end to end. E examples, N tokens.

    Examples of one row are neighbours and have the same `lines` entry.
    """

    path: str
    ids_N: Tensor  # int32
    supervised_N: Tensor  # uint8
    starts_E1: Tensor  # int64: example e is ids_N[starts_E1[e] : starts_E1[e + 1]]
    lines_E: Tensor  # int32, from 1, in `path`
    sources_E: Tensor  # int32 index into `sources`
    sources: list[str]
    counts: dict[str, SourceCounts]
    problems: list[Dropped] = field(default_factory=list)  # rows that were left out and should not have been there

    def __len__(self) -> int:
        return len(self.lines_E)

    @property
    def lengths_E(self) -> Tensor:
        return self.starts_E1.diff()

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and supervised flags of one example."""
        span = slice(int(self.starts_E1[index]), int(self.starts_E1[index + 1]))
        return self.ids_N[span], self.supervised_N[span]

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, to be saved or sent; `from_tensors` is the inverse."""
        meta = {"path": self.path, "sources": self.sources, "counts": {k: asdict(v) for k, v in self.counts.items()},
                "problems": [asdict(problem) for problem in self.problems]}
        return {
            "ids": self.ids_N,
            "supervised": self.supervised_N,
            "starts": self.starts_E1,
            "lines": self.lines_E,
            "sources": self.sources_E,
            "meta": torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenizedRows:
        meta = json.loads(bytes(tensors["meta"].tolist()))
        counts = {name: SourceCounts(**counts) for name, counts in meta["counts"].items()}
        ids_N, supervised_N, starts_E1, lines_E, sources_E = (
            tensors[name] for name in ("ids", "supervised", "starts", "lines", "sources")
        )
        problems = [Dropped(**problem) for problem in meta["problems"]]
        return cls(meta["path"], ids_N, supervised_N, starts_E1, lines_E, sources_E, meta["sources"], counts, problems)


def load_rows(split: str, tokenizer: Any, config: DataConfig, cache_dir: Path) -> TokenizedRows:
    """Tokenizes the rows of a split (`train` or `eval`), or reads the cache of the same rows and settings.

    A damaged cache is said on stderr and made again.

    Raises:
        ValueError: what `tokenize` and `ChatFormat` raise; or the cache cannot be written.
    """
    ChatFormat(tokenizer, config.think)  # raises for an unsuitable tokenizer before it is used
    clear_partial(cache_dir)
    cached = cache_dir / f"{split}-{fingerprint(split, tokenizer, config)}.safetensors"
    rows = None
    try:
        tensors = read_tensors(cached)
        if tensors is not None:
            rows = replace(TokenizedRows.from_tensors(tensors), path=config.file(split))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # of `meta` not as it was written
        print(f"{cached}: damaged ({' '.join(str(error).split())[:200]}), so it is made again", file=sys.stderr)
    if rows is not None:
        refuse(config, split, rows.problems)
        return rows
    rows = tokenize(split, tokenizer, config)
    try:
        write_tensors(cached, rows.to_tensors(), replaces=f"{split}-*")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{cached}: could not be written ({error}). Make room, or run where it can be written") from None
    return rows


def fingerprint(split: str, tokenizer: Any, config: DataConfig) -> str:
    """A hash of all that determines ids and masks: data, tokenizer, chat template and settings."""
    with open_rows(config.file(split)) as file:
        digest = hashlib.file_digest(file, "sha256")
    # what a run refuses is left out of the tensors, as what it drops is
    policy = {"sources": config.sources, "think": config.think, "max_tokens": config.max_tokens,
              "truncate": config.overlong == "truncate", "held out": config.held_out, "split": config.held_out and split}
    for part in (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, json.dumps(policy), str(FORMAT)):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def tokenize(split: str, tokenizer: Any, config: DataConfig) -> TokenizedRows:
    """Reads, renders and tokenizes every row of a split, with a progress bar.

    Raises:
        ValueError: rows that cannot be read (`bad_rows: error`) or are over max_tokens (`overlong: error`), each with file and
            line; or no row was left.
    """
    flat = FlatExamples(split, config)
    for outcome in outcomes(split, ChatFormat(tokenizer, config.think), config):
        flat.add_dropped(outcome) if isinstance(outcome, Dropped) else flat.add_row(outcome)
    return flat.finish()


def outcomes(split: str, chat: ChatFormat, config: DataConfig) -> Iterator[list[Example] | Dropped]:
    """Each row's examples, or why the row is dropped; in file order, except that each batch begins with its unreadable rows.
    A batch is read and rendered while the one before is tokenized. After a row that the run refuses no more are tokenized; they
    are read, for the other rows that it refuses."""
    is_refused = False
    with ThreadPoolExecutor(1, "tokenize") as thread:
        before: Iterable[list[Example] | Dropped] = ()
        for batch in batched(with_progress(config.file(split), read_split(config, split))):
            dropped = [row for row in batch if isinstance(row, Dropped)]
            is_refused |= any(row.bad for row in dropped) and config.refuses(is_overlong=False)
            rows = [] if is_refused else [row for row in batch if isinstance(row, Row)]
            rendered = chat.render(rows)
            encoding = thread.submit(chat.encode, rendered)
            yield from before
            yield from dropped
            before = joined(chat, rows, rendered, encoding)
        yield from before


def joined(
    chat: ChatFormat, rows: list[Row], rendered: list[Rendered], encoding: Future[list[list[int]]]
) -> Iterator[list[Example] | Dropped]:
    """What comes of a batch, when it is tokenized."""
    yield from chat.join(rows, rendered, encoding.result())


def batched(rows: Iterable[Row | Dropped]) -> Iterator[list[Row | Dropped]]:
    """Batches of ROWS_AT_ONCE rows; of fewer where they are so long that their prompts would fill the memory."""
    batch: list[Row | Dropped] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += row.rendered_characters if isinstance(row, Row) else 0
        if len(batch) == ROWS_AT_ONCE or num_characters > MAX_RENDERED:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def with_progress(path: str, rows: Iterator[Row | Dropped]) -> Iterator[Row | Dropped]:
    """Passes rows on and shows a progress bar over the lines of the file, on terminals only."""
    with open_rows(path) as file:
        num_lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    with tqdm(total=num_lines, unit="row", desc=f"tokenizing {Path(path).name}", disable=None, leave=False) as bar:
        for row in rows:
            yield row
            bar.update(row.line - bar.n)


class FlatExamples:
    """Collects examples into flat arrays and counts what happens to each row."""

    def __init__(self, split: str, config: DataConfig) -> None:
        self.split, self.config, self.path = split, config, config.file(split)
        self.ids, self.supervised, self.starts = array("i"), array("B"), array("q", [0])
        self.lines, self.source_indices = array("i"), array("i")
        self.sources = list(config.sources or ())
        self.counts: dict[str, SourceCounts] = {source: SourceCounts() for source in self.sources}
        self.problems: list[Dropped] = []

    def source(self, name: str) -> SourceCounts:
        return self.counts.setdefault(name, SourceCounts())

    def add_dropped(self, dropped: Dropped) -> None:
        if dropped.bad:
            self.problems.append(dropped)
        counts = self.source(dropped.source)
        counts.rows += 1
        counts.drop(dropped.reason)

    def add_row(self, examples: list[Example]) -> None:
        row = examples[0].row
        counts = self.source(row.source)
        counts.rows += 1
        longest = max(len(example.ids) for example in examples)
        if longest > self.config.max_tokens and self.config.overlong != "truncate":
            counts.drop(OVERLONG)
            found = f"{longest:,} tokens, and data.max_tokens is {self.config.max_tokens:,}"
            self.problems.append(Dropped(row.line, row.source, OVERLONG, found, bad=True))
            return
        kept = [example for example in examples if True in example.supervised[: self.config.max_tokens]]
        if not kept:
            counts.drop("truncated before any answer")
            return
        counts.kept += 1
        counts.with_thought += any(turn.thought is not None for turn in row.turns)
        for example in kept:
            self.add_example(example, counts)

    def add_example(self, example: Example, counts: SourceCounts) -> None:
        ids, supervised = example.ids[: self.config.max_tokens], bytes(example.supervised[: self.config.max_tokens])
        self.ids += array("i", ids)  # three times as fast as extend()
        self.supervised.frombytes(supervised)
        self.starts.append(len(self.ids))
        self.lines.append(example.row.line)
        if example.row.source not in self.sources:
            self.sources.append(example.row.source)
        self.source_indices.append(self.sources.index(example.row.source))
        counts.examples += 1
        counts.truncated += len(ids) < len(example.ids)
        counts.tokens += len(ids)
        counts.supervised_tokens += supervised.count(1)

    def finish(self) -> TokenizedRows:
        refuse(self.config, self.split, self.problems)
        if not self.lines:
            read = []
            for name, counts in islice(self.counts.items(), MAX_SOURCES_SHOWN):
                dropped = (f", {number:,} {reason}" for reason, number in counts.dropped.items())
                read.append(f"{name[:80]}: {counts.rows:,} read{''.join(dropped)}")
            sources = "null" if self.config.sources is None else f"[{', '.join(self.config.sources)}]"
            raise ValueError("\n".join([
                f"{self.path}: no row is left of the {self.split} rows. data.sources is {sources}. Found {'; '.join(read)}",
                *(described(self.path, problem) for problem in self.problems[:MAX_SHOWN])]))
        return TokenizedRows(
            self.path,
            torch.frombuffer(self.ids, dtype=torch.int32),
            torch.frombuffer(self.supervised, dtype=torch.uint8),
            torch.frombuffer(self.starts, dtype=torch.int64),
            torch.frombuffer(self.lines, dtype=torch.int32),
            torch.frombuffer(self.source_indices, dtype=torch.int32),
            sources=self.sources,
            counts=self.counts,
            problems=self.problems,
        )
