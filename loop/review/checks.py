"""Checks a coach's comment against the board, against its row and as a text; each check is a function that yields flags.
Needs python-chess. One to three milliseconds a comment, deterministic; `engine.py` has the checks that need Stockfish.

A flag must be right: whatever may be a plan, a line, a negation, a question or the past is let pass (`comment.py`, `words.py`).

    comment = Comment(text, *position_of(row), row["metadata"])
    for flag in judge(comment): print(flag.check, flag.quote, flag.why)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chess

from loop.review.claims import false_capture, false_castling, false_check, false_mate, illegal_move, wrong_square
from loop.review.comment import Comment, Flag, parsed
from loop.review.contacts import false_attack, false_defence, false_undefended
from loop.review.strength import contradicts_classification, contradicts_loss
from loop.review.words import any_of

RANK = "[1-8pnbrqkPNBRQK]{1,8}"
FEN = re.compile(rf"\bFEN: *(?P<fen>{RANK}(?:/{RANK}){{7}} [wb] (?:-|[KQkqA-Ha-h]{{1,4}}) (?:-|[a-h][36])(?: \d+ \d+)?)")
PLAYED = re.compile(r"\b(?:play(?:s|ed)?|[Mm]ove(?: played)?)\b:? *(?:\d+ *(?:\.+|…) *)?"
                    r"(?P<move>[a-h][1-8][a-h][1-8][qrbn]?\b|[A-Za-h0O][\w=-]*[+#]?)")
THOUGHT = re.compile(r"\s*<think>(?:(?!<think>).)*?</think>\s*|\s*</think>\s*", re.DOTALL)

STRAY = re.compile(r"</?think(?:ing)?>|<\|[^|<>]{1,40}\|>|</?s>|<[be]os>|<pad>|<(?:start|end)_of_turn>|\[/?INST\]"
                   "|</?tool_(?:call|response)>|\ufffd", re.IGNORECASE)
WORD = re.compile(r"[\w'’+#=-]+")
CLOSED = re.compile(r"[.!?…][\"')\]’”*]*$|[:;]-?[)(]$|[^\w\s\"']$")
OPEN = re.compile("(?:[,;:(—-]|" + any_of("a an the and or but of into from than as which whose because if while its their")
                  + ")$")
OPEN_IN_PRINT = re.compile(any_of("for with to by on at in is are was were be who then when his her") + "$")
MOVE_AT_END = re.compile(r"(?:[KQRBN][a-h]?[1-8]?x?[a-h][1-8]|[a-h]x[a-h][1-8]|\.[a-h][1-8]|O-O(?:-O)?)(?:=[QRBN])?[+#]?$")
INFORMAL = ("forum", "engine")      # sources whose references end without a full stop
MAX_PERIOD = 30                     # words; what is said again may be this long
MUCH = 0.3                          # of all words, in a sentence said three times or more
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
    found = FEN.search(prompt)
    fen = metadata.get("fen") or (found["fen"] if found else None)
    names = [metadata.get("move_uci"), *(match["move"] for match in PLAYED.finditer(prompt))]
    if not isinstance(fen, str):
        return None, None
    try:
        board = chess.Board(fen)
    except ValueError:
        return None, None
    if board.king(chess.WHITE) is None or board.king(chess.BLACK) is None:
        return None, None
    for name in names:
        move = read_move(board, name) if isinstance(name, str) else None
        if move:
            return board, move
    return None, None


def read_move(board: chess.Board, name: str) -> chess.Move | None:
    try:
        move = chess.Move.from_uci(name)
        return move if board.is_legal(move) else None
    except ValueError:
        return parsed(board, name.rstrip("+#!?.")) or None


def empty(comment: Comment) -> Iterator[Flag]:
    """No word at all."""
    if not any(character.isalpha() for character in comment.text):
        yield comment.flag("empty", 0, len(comment.text), "no words")


def stray_tags(comment: Comment) -> Iterator[Flag]:
    """Think tags and control tokens in the answer."""
    for match in STRAY.finditer(comment.text):
        yield comment.flag("stray_tags", *match.span(), "a tag or control token in the answer")


def cut_off(comment: Comment) -> Iterator[Flag]:
    """An answer that stops before its sentence does."""
    text = comment.text.rstrip()
    start = max(text.rfind(" "), text.rfind("\n")) + 1
    if not text:
        return
    if comment.at_limit and not CLOSED.search(text):
        yield comment.flag("cut_off", start, len(text), "the longest answer was reached")
    elif OPEN.search(text) or comment.metadata.get("source") not in INFORMAL and OPEN_IN_PRINT.search(text):
        yield comment.flag("cut_off", start, len(text), "no sentence ends with this")
    elif len(comment.sentences) > 1 and text[0].isupper() and not CLOSED.search(text) and not MOVE_AT_END.search(text) \
            and comment.metadata.get("source") not in INFORMAL and re.search(r"[a-z0-9#+)][.!?]\s", text):
        yield comment.flag("cut_off", start, len(text), "the last sentence has no end")


def repetition(comment: Comment) -> Iterator[Flag]:
    """The same sentence or the same run of words again and again."""
    found = list(WORD.finditer(comment.text))
    words = [match[0].lower() for match in found]
    for period in range(1, MAX_PERIOD + 1):
        repeated = 0                        # words in a row that equal the word one period later
        for i, (word, again) in enumerate(zip(words, words[period:])):
            repeated = repeated + 1 if word == again else 0
            if repeated >= max(2 * period, 4) or repeated >= period >= 6:
                start, end = found[i + 1 - repeated].start(), found[i + period].end()
                yield comment.flag("repetition", start, end, f"{period} words again and again")
                return
    spoken = [normalized(comment.text[start:end]) for start, end in comment.sentences]
    for said, (start, end) in zip(spoken, comment.sentences):
        num, length = spoken.count(said), said.count(" ") + 1
        if num >= 3 and length >= 4 and num * length >= MUCH * len(words):
            yield comment.flag("repetition", start, end, f"the same sentence {num} times")
            return


def copied(comment: Comment) -> Iterator[Flag]:
    """The text of a training row."""
    text = normalized(comment.text)
    if text in comment.trained_on and text.count(" ") + 1 >= MIN_COPIED_WORDS:
        yield comment.flag("copied", 0, len(comment.text), "equals the answer of a training row")


Check = Callable[[Comment], Iterator[Flag]]
TEXT_CHECKS: dict[str, Check] = {
    "empty": empty,
    "stray_tags": stray_tags,
    "cut_off": cut_off,
    "repetition": repetition,
    "copied": copied,
    "contradicts_classification": contradicts_classification,
    "contradicts_loss": contradicts_loss,
}
BOARD_CHECKS: dict[str, Check] = {
    "illegal_move": illegal_move,
    "wrong_square": wrong_square,
    "false_check": false_check,
    "false_mate": false_mate,
    "false_capture": false_capture,
    "false_attack": false_attack,
    "false_defence": false_defence,
    "false_castling": false_castling,
    "false_undefended": false_undefended,
}
CHECKS = TEXT_CHECKS | BOARD_CHECKS


def judge(comment: Comment) -> list[Flag]:
    """All flags of all checks that can run, in the order of the text."""
    checks = TEXT_CHECKS if comment.board is None else CHECKS
    return sorted((flag for check in checks.values() for flag in check(comment)), key=lambda flag: (flag.start, flag.check))
