"""Words of coaches: the moves and pieces that a text names, and words after which it need not speak of this move and board.
Needs python-chess, for its numbers of squares and pieces. A fraction of a millisecond a text."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import chess


def any_of(words: str) -> str:
    """A pattern for any of the words; `threat*` stands for all words that begin so."""
    return r"\b(?:" + "|".join(word.replace("*", r"\w*") for word in words.split()) + r")\b"


VALUE = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9, chess.KING: 99}
KINDS = {name: kind for kind, name in enumerate(chess.PIECE_NAMES) if name}
PIECE = r"(?:pawn|knight|bishop|rook|queen|king)"
SQUARE = r"[a-h][1-8]"
SIDE = r"(?:white|black)"
THE = rf"\b(?:the|its|his|her|their|your|our|this|that|{SIDE}['’]s)"
# "the knight on f3", "White's pawns on d4 and e5", and the other way round: "the f7 pawn", but not "the f5 pawn push"
MENTION = (rf"{THE} (?:[a-z-]{{1,20}} )?(?:{PIECE} (?:on|at) {SQUARE}\b"
           rf"|{PIECE}s (?:on|at) {SQUARE}(?:(?:, | and |, and | or ){SQUARE})*\b"
           rf"|{SQUARE}[- ]{PIECE}\b(?! (?:break|push|advance|move)))")
CASTLING = "[O0]-[O0](?:-[O0])?"
SAN = (rf"(?:[KQRBN][a-h]?[1-8]?x?{SQUARE}|[a-h]x{SQUARE}(?:=?[QRBN])?|[a-h][18]=[QRBN]|{CASTLING})(?:[+#])?(?![\w-])")
PAWN_STEP = r"[a-h][2-7][+#]?(?![\w-])"     # a move only where a number or dots stand before; else it is a square
MOVE = re.compile(rf"(?:(?<![\w.])(?P<number>\d{{1,3}}) ?(?P<dots>\.\.\.|…|\.(?!\.))|(?P<bare>(?<!\.)\.\.\.|…)) ?"
                  rf"(?P<behind>{SAN}|{PAWN_STEP})|(?<![\w.-])(?P<plain>{SAN}|{PAWN_STEP})")
# Words after which a sentence need not be about this move on this board: conditions, other times, other moves, what comes next.
SUPPOSES = ("if unless until would shall suppos* imagin* example instance otherwise will next later soon after* when* before"
            " eventually ultimately follow* then earlier previous* last already was were been had usual* typical* often always"
            " every want* intend* plan* idea hop* dream* prepar* instead rather better without missing missed")
# Words that deny or allow what is done, but not where a piece stands.
ALLOWS = (" could can cannot may might must should threat* do does did not no never nor neither nothing none nobody almost"
          " nearly look looks seem* appear* think* thought believe* possib* perhaps maybe about any whether how sometimes aim*"
          " ready try tries allow* let lets avoid* prevent* stop* avert* stronger alternative* answer* repl* respond*")
ONCE = r"|(?<!at )\bonce\b|\bha(?:s|ve) to\b|n['’]t\b|['’](?:ll|d)\b|e\.g\.|i\.e\."
ELSEWHERE = re.compile(any_of(SUPPOSES) + ONCE, re.IGNORECASE)
HEDGE = re.compile(any_of(SUPPOSES + ALLOWS) + ONCE, re.IGNORECASE)


class Mention(NamedTuple):
    """A piece named on a square."""

    start: int
    end: int
    kind: int
    square: int
    side: bool | None       # the colour in words, if it stands there


class Named(NamedTuple):
    """A move named in the text."""

    start: int
    end: int
    ply: int | None         # as python-chess counts; None where no number is given or implied
    dots: bool              # written as Black's move with dots and no number: "...Rc8"
    san: str                # without check marks
    mark: str               # "+", "#" or nothing
    continues: bool         # stands right after another move, so that both are one line


def named_moves(text: str) -> Iterator[Named]:
    """All moves of the text in order. A move right behind a numbered one gets the number that follows."""
    end, ply = 0, None
    for match in MOVE.finditer(text):
        continues = end > 0 and re.fullmatch("[!?]{0,2} *", text[end:match.start()]) is not None
        written = match["behind"] or match["plain"]
        if match["number"]:
            ply = 2 * int(match["number"]) - 1 - (match["dots"] == ".")
        else:
            ply = ply + 1 if continues and ply is not None and match["plain"] else None
        if ply is None and match["plain"] and re.fullmatch(PAWN_STEP, written):
            continue
        end, san = match.end(), written.rstrip("+#")
        yield Named(match.start(), end, ply, bool(match["bare"]), san, written[len(san):], continues)


def mentions_in(text: str, start: int = 0, end: int = sys.maxsize) -> Iterator[Mention]:
    for match in re.compile(MENTION, re.IGNORECASE).finditer(text, start, end):
        words = match[0].lower()
        side = True if "white" in words else False if "black" in words else None
        for name in re.findall(SQUARE, words):
            yield Mention(*match.span(), KINDS[re.findall(PIECE, words)[0]], chess.parse_square(name), side)
