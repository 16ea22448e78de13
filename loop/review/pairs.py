"""What is reviewed: held-out rows with their comments under shuffled letters, read from the files of a review alone.
Needs python-chess, no torch. Holds all rows and comments, some kilobytes a row."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import chess
import chess.svg

from data.files import write_text
from loop.checkpoint import read_json
from loop.config import ReviewConfig
from loop.review.checks import judge, normalized, position_of
from loop.review.comment import Comment, Flag, parsed
from loop.review.engine import MATE_CP, judge_strength
from loop.review.strength import Verdict
from loop.review.words import SAN, SQUARE

REVIEW, SECRET, RULES, VOTES, VERDICT = "review.json", "secret", "rules.json", "votes.jsonl", "verdict.json"
SYSTEMS = ("base", "tuned", "rival", "reference")  # rival: of the second run, where there is one
LETTERS = "ABCD"
NAMED = re.compile(rf"(?<![\w-]){SAN}|\b{SQUARE}-?{SQUARE}\b|\b{SQUARE}\b")
SHOWN = re.compile(r"\+?(?:[a-h][1-8]){1,2}")  # a square or a move; behind a plus on the board after the row's move


@dataclass(frozen=True)
class Pair:
    """One held-out row and the comments on it. What identifies a system stays on the server until the vote."""

    id: str
    line: int  # of the row in its file
    row: dict[str, Any]
    comments: dict[str, dict[str, Any]]  # by system: text, at_limit, and whether a training row has this text
    order: tuple[str, ...]  # the systems in the order of the letters
    engine: dict[str, Any] | None = None  # its name and its verdict on the row's move

    @cached_property
    def position(self) -> tuple[chess.Board, chess.Move] | tuple[None, None]:
        return position_of(self.row)

    @property
    def by_letter(self) -> dict[str, str]:
        """The system behind each letter."""
        return dict(zip(LETTERS, self.order))

    @property
    def prompt(self) -> str:
        """What was asked; the system message is the same for all rows."""
        return "\n\n".join(message["content"] for message in self.row["messages"] if message["role"] == "user")

    @cached_property
    def flags(self) -> dict[str, list[Flag]]:
        """What the automatic checks find, by system."""
        board, move = self.position
        metadata = self.row.get("metadata") or {}
        found = {}
        for system, given in self.comments.items():
            trained_on = frozenset([normalized(given["text"])] if given["trained_on"] else [])
            comment = Comment(given["text"], board, move, metadata, given["at_limit"], trained_on)
            found[system] = judge(comment) + (judge_strength(comment, self.strength) if self.strength else [])
        return found

    @property
    def strength(self) -> Verdict | None:
        given = self.engine["verdict"] if self.engine else None
        return Verdict(**{**given, "best": chess.Move.from_uci(given["best"])}) if given else None

    @property
    def strength_text(self) -> str:
        """What the engine thinks of the row's move. The numbers are the mover's, where chess programs show White's."""
        board, found = self.position[0], self.strength
        if self.engine is None or found is None or board is None:
            return ""
        before, after = in_words(found.before_cp), in_words(found.after_cp)
        return (f"{self.engine['engine']}, for {'White' if board.turn else 'Black'}: {before} with the best move, {after} with "
                f"the move played. Best line: {found.line}")

    def parts(self, text: str) -> list[tuple[str, str]]:
        """The text in pieces; beside a piece that names a move or a square stands what the board can show of it."""
        if self.position[0] is None:
            return [(text, "")]
        parts, end = [], 0
        for match in NAMED.finditer(text):
            parts += [(text[end: match.start()], ""), (match[0], self.shown(match[0]))]
            end = match.end()
        return [part for part in (*parts, (text[end:], "")) if part[0]]

    def shown(self, name: str) -> str:
        squares = re.findall(SQUARE, name)
        if len(squares) == 1 and name != squares[0] or not squares:  # a move in standard notation
            for prefix, board in zip(("", "+"), self.boards):
                move = parsed(board, name.rstrip("+#"))
                if move:
                    return prefix + move.uci()[:4]
        return "".join(squares)

    @cached_property
    def boards(self) -> tuple[chess.Board, chess.Board]:
        """The position before the row's move, and after it."""
        board, move = self.position
        assert board is not None and move is not None
        after = board.copy(stack=False)
        after.push(move)
        return board, after

    def board_text(self) -> str:
        """The board in words, for who cannot see it."""
        board, move = self.position
        if board is None or move is None:
            return ""
        side = "White" if board.turn else "Black"
        return f"{side} plays {board.san(move)}, the arrow from {move.uci()[:2]} to {move.uci()[2:4]}. Position: {board.fen()}"

    def board_svg(self, shown: str = "") -> str:
        """The board from the mover's side, with the row's move or with a move or square that a comment names."""
        before, move = self.position
        assert before is not None and move is not None
        squares = [chess.parse_square(name) for name in re.findall(SQUARE, shown)]
        arrows = [chess.svg.Arrow(move.from_square, move.to_square, color="#15781bb0")] if not shown else []
        if squares:  # a move, or a ring around a square, which python-chess draws for an arrow that goes nowhere
            arrows.append(chess.svg.Arrow(squares[0], squares[-1], color="#003088b0"))
        return chess.svg.board(self.boards[shown.startswith("+")], orientation=before.turn, arrows=arrows, size=480)


@dataclass(frozen=True)
class Review:
    """A review as its directory describes it; `described` is review.json, which answers.py writes."""

    directory: Path
    described: dict[str, Any]
    secret: bytes
    pairs: dict[str, Pair]
    rules: ReviewConfig

    @property
    def names(self) -> dict[str, str]:
        """What each system is called after the vote."""
        return {**self.described["systems"], "reference": "the reference of the row"}


def directory_of(run_dir: Path, second: Path | None = None) -> Path:
    """Where a review is. A comparison with a second run is a review of its own: its votes are no votes on the run alone."""
    return run_dir / (f"review-{second.resolve().name}" if second else "review")


def open_review(run_dir: Path, second: Path | None = None) -> Review:
    """Reads what was written for a review.

    Raises:
        ValueError: there is none.
    """
    directory = directory_of(run_dir, second)
    if not (directory / REVIEW).exists():
        raise ValueError(f"{directory}: no review there. Begin one: python -m loop.review {run_dir} {second or ''}".rstrip())
    described = read_json(directory / REVIEW)
    secret = bytes.fromhex((directory / SECRET).read_text())
    pairs = [shuffled(secret, item["line"], item["row"], item["comments"], item.get("engine")) for item in described["pairs"]]
    return Review(directory, described, secret, {pair.id: pair for pair in pairs},
                  ReviewConfig(**read_json(directory / RULES)))


def shuffled(
    secret: bytes, line: int, row: dict[str, Any], comments: dict[str, dict[str, Any]], engine: dict[str, Any] | None = None
) -> Pair:
    """A pair in an order that only who has the secret can compute. Other comments make another pair: its votes start anew."""
    described = json.dumps([line, row, [comments[system] for system in sorted(comments)]], sort_keys=True)
    identity = keyed(secret, described)
    order = sorted(comments, key=SYSTEMS.index)
    random.Random(keyed(secret, f"order {identity}")).shuffle(order)
    return Pair(identity[:20], line, row, comments, tuple(order), engine)


def in_words(centipawns: int) -> str:
    """An evaluation for the mover in pawns, or as a mate."""
    moves = MATE_CP - abs(centipawns)
    return f"{'mate' if centipawns > 0 else 'mated'} in {moves}" if moves < 1000 else f"{centipawns / 100:+.2f}"


def keyed(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def begin(directory: Path, rules: ReviewConfig) -> None:
    """Makes a review's directory with its secret, and writes down what a go is before the first vote.

    Raises:
        ValueError: there are votes, which were given under other rules.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / SECRET).exists():
        write_text(directory / SECRET, os.urandom(32).hex())
        (directory / SECRET).chmod(0o600)
    fixed = read_json(directory / RULES) if (directory / RULES).exists() else asdict(rules)
    if fixed != asdict(rules) and (directory / VOTES).exists():
        changed = [key for key, value in asdict(rules).items() if fixed.get(key) != value]
        was = "; ".join(f"review.{key} was {fixed.get(key)}, is {getattr(rules, key)}" for key in changed)
        back = " ".join(f"--set review.{key}={fixed.get(key)}" for key in changed)
        raise ValueError(f"{directory / RULES}: votes were given under other rules: {was}. Go on with {back}, or move "
                         f"{directory} away and vote anew")
    write_text(directory / RULES, json.dumps(asdict(rules), indent=1) + "\n")
