"""Checks a coach's comment against the board, against its row and as a text; each check is a function that yields flags.
Needs python-chess. One to three milliseconds a comment, deterministic; `engine.py` has the checks that need Stockfish.

A flag must be right: whatever may be a plan, a line, a negation, a question or the past is let pass (`comment.py`, `words.py`).

    comment = Comment(text, *position_of(row), row["metadata"])
    for flag in judge(comment): print(flag.check, flag.quote, flag.why)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chess

from loop.review.claims import false_capture, false_castling, false_check, false_mate, illegal_move, wrong_square
from loop.review.comment import Comment, Flag, parsed
from loop.review.contacts import false_attack, false_defence, false_undefended
from loop.review.strength import contradicts_row
from loop.review.words import any_of

FEN = re.compile(r"\bFEN: *(\S+ [wb] \S+ \S+(?: \d+ \d+)?)")
PLAYED = re.compile(r"\b(?:play(?:s|ed)?|[Mm]ove(?: played)?)\b:? *(?:\d+ *(?:\.+|…) *)?([\w=-]+)")
THOUGHT = re.compile(r"\s*<think>(?:(?!<think>).)*?</think>\s*|\s*</think>\s*", re.DOTALL)

STRAY = re.compile(r"</?think(?:ing)?>|<\|[^|<>]{1,40}\|>|</?s>|<[be]os>|<pad>|<(?:start|end)_of_turn>|\[/?INST\]"
                   "|</?tool_(?:call|response)>|\ufffd", re.IGNORECASE)
WORD = re.compile(r"[\w'’+#=-]+")
OPEN = re.compile("(?:[,;:(—-]|" + any_of("a an the and or but of into from than as which whose because if while its their")
                  + ")$")
NUM_WORDS, MOST_REPEATED = 4, 0.3   # in true comments at most 0.27 of such runs of words repeat an earlier one
MIN_COPIED_WORDS = 8                # shorter comments, such as "White castles kingside.", may be equal by chance


def normalized(text: str) -> str:
    """The text's words in lower case, to compare texts whatever their spaces and punctuation."""
    return " ".join(WORD.findall(text.lower()))


def without_thought(text: str) -> str:
    """The answer behind a thought, also behind one that began in the prompt; the text as it is where no thought ends."""
    match = THOUGHT.match(text)
    return text[match.end():] if match else text


def position_of(row: Mapping[str, Any]) -> tuple[chess.Board, chess.Move] | tuple[None, None]:
    """The position before the row's move, and the move; two times None if the row does not say both.

    They are read from `metadata.fen` and `metadata.move_uci`, else from "FEN: ..." and "White plays 5. Nf3" in the prompt.
    """
    metadata = row.get("metadata") or {}
    prompt = "\n".join(message["content"] for message in row.get("messages", ()) if message.get("role") == "user")
    written = FEN.search(prompt)
    try:
        board = chess.Board(str(metadata.get("fen") or written and written[1]))
    except ValueError:
        return None, None
    moves = [read_move(board, str(name)) for name in (metadata.get("move_uci"), *PLAYED.findall(prompt))]
    move = next(filter(None, moves), None)
    return (board, move) if move and all(board.king(side) is not None for side in chess.COLORS) else (None, None)


def read_move(board: chess.Board, name: str) -> chess.Move | None:
    try:
        return board.parse_uci(name)
    except ValueError:
        return parsed(board, name)


def empty(comment: Comment) -> Iterator[Flag]:
    """No word at all."""
    if not any(character.isalpha() for character in comment.text):
        yield comment.flag("empty", 0, len(comment.text), "no words")


def stray_tags(comment: Comment) -> Iterator[Flag]:
    """Think tags and control tokens in the answer, each once."""
    matches = {match[0]: match for match in STRAY.finditer(comment.text)}
    for text, match in matches.items():
        why = "a character that was cut" if text == "\ufffd" else "a tag or control token in the answer"
        times = comment.text.count(text)
        yield comment.flag("stray_tags", *match.span(), why + (f", {times} times" if times > 1 else ""))


def cut_off(comment: Comment) -> Iterator[Flag]:
    """An answer that stops before its sentence does."""
    text = comment.text.rstrip()
    if OPEN.search(text) or comment.at_limit and text[-1:].isalnum():
        yield comment.flag("cut_off", max(text.rfind(" "), text.rfind("\n")) + 1, len(text), "no sentence ends with this")


def repetition(comment: Comment) -> Iterator[Flag]:
    """The same words again and again, measured as seq-rep-4 of Welleck et al. 2020, "... with Unlikelihood Training"."""
    found = list(WORD.finditer(comment.text))
    words = [match[0].lower() for match in found]
    runs = [tuple(words[i:i + NUM_WORDS]) for i in range(len(words) - NUM_WORDS + 1)]
    counts = Counter(runs)
    if len(runs) - len(counts) > MOST_REPEATED * len(runs):
        most, times = counts.most_common(1)[0]
        at = runs.index(most)
        yield comment.flag("repetition", found[at].start(), found[at + NUM_WORDS - 1].end(), f"said {times} times")


def copied(comment: Comment) -> Iterator[Flag]:
    """The text of a training row."""
    text = normalized(comment.text)
    if text in comment.trained_on and text.count(" ") + 1 >= MIN_COPIED_WORDS:
        yield comment.flag("copied", 0, len(comment.text), "equals the answer of a training row")


Check = Callable[[Comment], Iterator[Flag]]
TEXT_CHECKS: dict[str, Check] = {check.__name__: check for check in (empty, stray_tags, cut_off, repetition, copied)}
BOARD_CHECKS: dict[str, Check] = {check.__name__: check for check in (
    illegal_move, wrong_square, false_check, false_mate, false_capture, false_attack, false_defence, false_castling,
    false_undefended, contradicts_row)}
CHECKS = TEXT_CHECKS | BOARD_CHECKS


def judge(comment: Comment) -> list[Flag]:
    """All flags of all checks that can run, in the order of the text."""
    checks = TEXT_CHECKS if comment.board is None else CHECKS
    return sorted((flag for check in checks.values() for flag in check(comment)), key=lambda flag: (flag.start, flag.check))
