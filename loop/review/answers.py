"""Writes what the untuned and the tuned model answer to held-out rows, each answer once, and the review that is made of them.
Costs what decoding costs (model/decode), one run's model at a time; nothing where all answers are there already."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from tqdm import tqdm

from data.files import write_text
from data.records import Row, evenly, one_answer_rows, open_rows, read_split
from loop import checkpoint
from loop.config import Config
from loop.review.checks import normalized, position_of, without_thought
from loop.review.engine import NODES, Stockfish, find_stockfish, left_out
from loop.review.lines import append_line, read_lines
from loop.review.pairs import REVIEW, VOTES, directory_of
from loop.run import find_trained
from loop.state import load_adapters
from model.build import build
from model.decode.generate import Answer, generate
from model.lora import adapters_off

ANSWERS, ENGINE = "answers.jsonl", "engine.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """A held-out row, as it is trained on and as its file has it."""

    row: Row
    raw: dict[str, Any]

    @property
    def reference(self) -> str:
        return self.row.turns[-1].answer


class Source:
    """A run that is reviewed: its checkpoint, its model's directory and how it writes prompts."""

    def __init__(self, run_dir: Path, which: str, overrides: Sequence[str] = ()) -> None:
        trained = find_trained(run_dir, which, overrides)
        self.run_dir, self.config, self.path, self.chat = run_dir, trained.config, trained.path, trained.chat
        self.model_dir, self.identity = trained.model_dir, trained.identity
        self.adapter = checkpoint.read_json(self.path / checkpoint.MANIFEST)[checkpoint.ADAPTER]["sha256"]

    def prompt(self, row: Row) -> list[int]:
        text = self.chat.prompt(row.messages[:-1], thinking=row.turns[-1].thought is not None)
        return self.chat.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    def key(self, prompt: list[int], max_tokens: int, tuned: bool) -> str:
        """Names an answer by all that it depends on."""
        scale = (self.config.lora.rank, self.config.lora.alpha, self.config.lora.target) if tuned else None
        parts = (self.identity, self.config.model.base, self.adapter if tuned else None, scale, prompt, max_tokens)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def build(self) -> Any:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seed = self.config.train.seed
        stage = build(self.model_dir, self.config.model.base, self.config.lora, seed=seed, device=device, recompute=False)
        load_adapters(stage.adapters(), checkpoint.load(self.path).adapter)
        return stage


def held_out_rows(config: Config, num_rows: int) -> list[HeldOut]:
    """Evenly spread rows of one question and one answer, of those that give a position if any does.

    Raises:
        ValueError: there is none.
    """
    path, sources = config.data.file("eval"), ", ".join(config.data.sources or ())
    rows = one_answer_rows(config.data)
    with open_rows(path) as file:
        lines = file.read().split(b"\n")
    found = [HeldOut(row, json.loads(lines[row.line - 1].decode("utf-8-sig"))) for row in rows]
    found = [row for row in found if position_of(row.raw)[0] is not None] or found
    if len(found) < num_rows:
        num_held_out, with_position = sum(1 for _ in read_split(config.data, "eval")), position_of(found[0].raw)[0] is not None
        print(f"{path}: {len(found)} of {num_held_out} rows are compared, those of one question and one answer"
              + f" from {sources}" * bool(sources) + ", with a position" * with_position)
    return evenly(found, num_rows)


def write_review(directory: Path, sources: list[Source], num_rows: int, max_tokens: int | None) -> None:
    """Writes the answers that are missing, then review.json, from which all else is read.

    Raises:
        ValueError: there are votes, which were given to other comments.
    """
    first = sources[0]
    shared = directory_of(first.run_dir)
    rows = held_out_rows(first.config, num_rows)
    if max_tokens is None:  # a model that writes more than twice the longest reference does not do what it was trained for
        max_tokens = 2 * max(len(first.chat.tokenizer(row.row.messages[-1]["content"]).input_ids) for row in rows)
    keep_votes(directory, sources, len(rows), max_tokens)
    answers = {"base": answers_of(shared, first, rows, max_tokens, tuned=False)}
    systems = {"base": "the untuned model"}
    for system, source in zip(("tuned", "rival"), sources):
        answers[system] = answers_of(shared, source, rows, max_tokens, tuned=True)
        systems[system] = f"the tuned model ({source.path})"
    trained_on, pairs = training_texts(first.config), []
    for index, (row, engine) in enumerate(zip(rows, asked_engine(shared, rows))):
        comments = {system: answers[system][index] for system in answers}
        for comment in comments.values():
            comment["trained_on"] = normalized(comment["text"]) in trained_on
        comments["reference"] = {"text": row.reference, "at_limit": False, "trained_on": False}
        pairs.append({"line": row.row.line, "row": row.raw, "comments": comments, "engine": engine})
    described = {"systems": systems, "max_tokens": max_tokens, "eval": first.config.data.file("eval"), "pairs": pairs,
                 "checkpoints": [str(source.path) for source in sources], "model": first.config.model.path}
    write_text(directory / REVIEW, json.dumps(described, ensure_ascii=False, indent=1) + "\n")


def keep_votes(directory: Path, sources: list[Source], num_rows: int, max_tokens: int) -> None:
    """Refuses to replace what votes were given to.

    Raises:
        ValueError: other checkpoints, rows or longest answers are asked for.
    """
    if not (directory / VOTES).exists() or not (directory / REVIEW).exists():
        return

    given = checkpoint.read_json(directory / REVIEW)
    was = (given["checkpoints"], len(given["pairs"]), given["max_tokens"])
    now = ([str(source.path) for source in sources], num_rows, max_tokens)
    if [Path(path).resolve() for path in was[0]] != [Path(path).resolve() for path in now[0]] or was[1:] != now[1:]:
        said = ["{}, {} rows, answers of at most {} tokens".format(", ".join(paths), *counts) for paths, *counts in (was, now)]
        raise ValueError(f"{directory}: votes were given to {said[0]}; asked for is {said[1]}. Choose the same with "
                         f"--checkpoint, --rows and --max-tokens, or move {directory} away and vote anew")


def asked_engine(directory: Path, rows: list[HeldOut]) -> list[dict[str, Any] | None]:
    """What Stockfish thinks of each row's move, asked once; None where the row has no move, or Stockfish is missing."""
    if find_stockfish() is None:
        print(left_out())
        return [None] * len(rows)
    positions = [position_of(row.raw) for row in rows]
    keys = [f"{board.fen()} {move.uci()} {NODES}" if board and move else "" for board, move in positions]
    written = {line["key"]: line for line in read_lines(directory / ENGINE)}
    missing = [index for index, key in enumerate(keys) if key and key not in written]
    if missing:
        with Stockfish() as engine:
            for index in tqdm(missing, unit="move", desc="Stockfish"):
                board, move = positions[index]
                assert board is not None and move is not None
                found = engine.verdict(board, move)
                line = {"key": keys[index], "engine": engine.name, "verdict": {**found._asdict(), "best": found.best.uci()}}
                append_line(directory / ENGINE, line)
                written[keys[index]] = line
    return [written.get(key) for key in keys]


def training_texts(config: Config) -> frozenset[str]:
    """The answers of the training rows, if they are here."""
    data = config.data
    if not Path(data.train).expanduser().is_file():
        return frozenset()
    return frozenset(normalized(turn.answer) for row in read_split(data, "train") if isinstance(row, Row) for turn in row.turns)


def answers_of(directory: Path, source: Source, rows: list[HeldOut], max_tokens: int, tuned: bool) -> list[dict[str, Any]]:
    """The answer to each row; those that answers.jsonl does not have are written to it as they are finished."""
    prompts = [source.prompt(row.row) for row in rows]
    keys = [source.key(prompt, max_tokens, tuned) for prompt in prompts]
    written = {line["key"]: line for line in read_lines(directory / ANSWERS)}
    missing = [index for index, key in enumerate(keys) if key not in written]
    if missing:
        stage = source.build()
        with tqdm(total=len(missing), unit="answer", desc=f"{'tuned' if tuned else 'untuned'} model") as bar:

            def finished(place: int, answer: Answer) -> None:
                text = source.chat.tokenizer.decode(answer.text_ids)
                line = {"key": keys[missing[place]], "text": text, "at_limit": not answer.stopped}
                append_line(directory / ANSWERS, line)
                written[line["key"]] = line
                bar.update()

            with nullcontext() if tuned else adapters_off(stage):
                generate(stage, [prompts[index] for index in missing], stop_id=source.chat.stop_id, max_tokens=max_tokens,
                         finished=finished)
    keep = source.config.data.think == "keep"  # then a thought is no part of what the player reads
    return [{"text": (without_thought(written[key]["text"]) if keep else written[key]["text"]).strip(),
             "at_limit": written[key]["at_limit"]} for key in keys]
