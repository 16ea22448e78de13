"""Checks what a comment says of a move's strength, against the row's metadata and against an engine's verdict.
Needs python-chess. A fraction of a millisecond a comment; the verdict itself, of `engine.py`, takes half a second."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import chess

from loop.review.comment import Comment, Flag
from loop.review.words import PIECE, SIDE, VALUE, any_of

# A row's metadata may have the move's class, and by how many centipawns the move is worse than the best one.
CLASS, LOSS = "classification", "centipawn_loss"
GOOD = frozenset(("best", "excellent", "good", "great", "brilliant", "book", "forced"))
BAD = frozenset(("mistake", "blunder", "miss"))
SMALL_LOSS, LARGE_LOSS = 30, 250    # centipawns; what lies between contradicts nothing

# Margins in expected points of a game, from 0 to 1. A claim is flagged only beyond them.
CLEARLY_WORSE, AS_GOOD = 0.12, 0.03
NOT_WINNING, NOT_AHEAD, BEHIND = 0.60, 0.62, 0.40
OPEN_GAME = (0.10, 0.97)            # outside, the game is decided, and what a mistake is becomes a matter of taste

# A verdict begins a sentence or clause, or stands behind "is", and names nobody: "a mistake by White" is another move's.
OPENS = (r"(?:^\s*|[.!,;:…] ?|\b(?:is|(?:it|that|this|here)['’]?s) )(?:"
         + any_of("really simply clearly just probably objectively arguably") + " )?")
ENDS = (r"\b(?! " + any_of("by(?!\\sfar) of from would was were often if to when")
        + r"| is (?:to|not)\b| here (?:was|is|would)\b)")
SIDES = rf"{SIDE}['’]s"


def call(words: str) -> re.Pattern[str]:
    return re.compile(rf"{OPENS}(?P<words>{words}{ENDS})", re.IGNORECASE | re.MULTILINE)


BEST = rf"(?:the |{SIDES} )(?:very |absolutely )?(?:best|strongest) (?:move|choice|reply|continuation)"
FINE = (r"an? (?:absolutely |very |really )?(?:excellent|brilliant|superb|perfect|great|fine|accurate|precise)"
        r"(?: and \w+)? (?:\w+ )?(?:move|choice|reply|retreat|decision)")
CALLS_BAD, CALLS_BEST, CALLS_GOOD = call(r"an? (?:\w+ )?(?:blunder|mistake)"), call(BEST), call(f"(?:{BEST}|{FINE})")
CALLS_ONLY = call(rf"(?:the |{SIDES} )?only (?:good |playable |sensible |correct )?(?:move|reply|defence)"
                  "(?: to (?:avoid|keep|hold|save))?")
WINNING = re.compile(rf"\b(?P<side>{SIDE}) is (?:now |already |clearly |completely |simply |totally |objectively )?"
                     r"(?:(?P<wins>winning)|(?P<loses>lost|losing))(?! "
                     + any_of("a an the back material chances time control two three one his her its their some more") + ")",
                     re.IGNORECASE)
WINS = re.compile(rf"\bwins (?:the|an?|{SIDES}) (?:clean |whole |full |free )?(?P<what>{PIECE}|piece)\b"
                  r"(?! (?:ending|endgame|back|for))(?!['’-])", re.IGNORECASE)


class Verdict(NamedTuple):
    """What an engine thinks of a move; expected points are the mover's, from 0 to 1."""

    best: chess.Move
    line: str               # the best line, as it is written in books
    before: float           # expected points with the best move
    after: float            # with the move played
    other: float | None     # with the best of all moves but the one played; None where there is no other
    before_cp: int          # the same as `before` in centipawns for the mover; mate counts 10,000
    after_cp: int


def calls(comment: Comment, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    for match in pattern.finditer(comment.text):
        start, end = match.span("words")
        if comment.plain(start, comment.clause_end(end)):   # what follows in the clause says why, and does not take it back
            yield start, end


def contradicts_row(comment: Comment) -> Iterator[Flag]:
    """Blame for a move that the row calls good, by its class or its loss in centipawns, or praise for one that it calls bad."""
    label, loss = str(comment.metadata.get(CLASS, "")).strip().lower(), comment.metadata.get(LOSS)
    good, bad = label in GOOD, label in BAD
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        good, bad = good or loss <= SMALL_LOSS, bad or loss >= LARGE_LOSS
    if good != bad:
        for start, end in calls(comment, CALLS_BAD if good else CALLS_GOOD):
            yield comment.flag("contradicts_row", start, end, f"the row says {label or loss}")


def false_best(comment: Comment, verdict: Verdict) -> Iterator[Flag]:
    """The best move, where another one is clearly better."""
    if verdict.best != comment.move and verdict.before - verdict.after >= CLEARLY_WORSE:
        for start, end in calls(comment, CALLS_BEST):
            yield comment.flag("false_best", start, end, f"better is {verdict.line}")


def false_only(comment: Comment, verdict: Verdict) -> Iterator[Flag]:
    """The only move, where another one is as good."""
    if verdict.other is not None and verdict.other >= verdict.after - AS_GOOD:
        for start, end in calls(comment, CALLS_ONLY):
            yield comment.flag("false_only", start, end, "another move is as good")


def false_mistake(comment: Comment, verdict: Verdict) -> Iterator[Flag]:
    """A mistake or blunder, where no move is better."""
    decided = not OPEN_GAME[0] <= verdict.before <= OPEN_GAME[1]
    if verdict.best == comment.move or not decided and verdict.before - verdict.after <= AS_GOOD:
        for start, end in calls(comment, CALLS_BAD):
            yield comment.flag("false_mistake", start, end, f"no move is better; the best line is {verdict.line}")


def false_winning(comment: Comment, verdict: Verdict) -> Iterator[Flag]:
    """A side said to be winning or lost that is not, or material said to be won while nothing is."""
    us = comment.before.turn
    for match in comment.said(WINNING):
        points = verdict.after if (match["side"].lower() == "white") == us else 1 - verdict.after
        if (points if match["wins"] else 1 - points) <= NOT_WINNING:
            yield comment.flag("false_winning", *match.span(), f"expected points of the mover: {verdict.after:.2f}")
    balance = sum(VALUE[piece.piece_type] * (1 if piece.color == us else -1) for piece in comment.before.piece_map().values())
    if balance < 0:
        return      # who is behind may win a piece and still not be ahead
    for match in comment.said(WINS):
        least = BEHIND if match["what"].lower() == "pawn" else NOT_AHEAD
        if comment.subject(match.start()) != chess.COLOR_NAMES[not us] and verdict.after <= least:
            yield comment.flag("false_winning", *match.span(), f"expected points of the mover: {verdict.after:.2f}")
