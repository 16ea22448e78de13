"""Words of coaches: the moves and pieces that a text names, and the words that only suppose something.
Needs python-chess, for its numbers of squares and pieces. A fraction of a millisecond a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import chess


def any_of(words: str) -> str:
    """A pattern for any of the words; `threat*` stands for all words that begin so."""
    return r"\b(?:" + "|".join(word.replace("*", r"\w*") for word in words.split()) + r")\b"


KINDS = {name: kind for kind, name in enumerate(chess.PIECE_NAMES) if name}
PIECE = r"(?:pawn|knight|bishop|rook|queen|king)"
SQUARE = r"[a-h][1-8]"
SQUARES = rf"{SQUARE}(?:(?:, | and |, and | or ){SQUARE}\b)*"
SIDE = r"(?:[Ww]hite|[Bb]lack)"
PLAN = any_of("break push advance thrust sac* lever move capture")     # "the f5 pawn push"
# "the knight on f3", "White's pawns on d4 and e5", and the other way round: "the f7 pawn"
MENTION = re.compile(rf"(?:\b(?P<det>the|its|his|her|their|your|our|this|that|both|an?|another|no|any|one|{SIDE}['’]s) )?"
                     rf"(?P<adjective>(?:[a-z-]{{1,20}} )??)(?:(?P<kind>{PIECE})s? (?:on|at) (?P<squares>{SQUARES})\b"
                     rf"|(?P<square>{SQUARE})[- ](?P<kind2>{PIECE})\b(?! {PLAN}))", re.IGNORECASE)
CASTLING = "[O0]-[O0](?:-[O0])?"
SAN = (r"(?:[KQRBN][a-h]?[1-8]?x?[a-h][1-8]|[a-h]x[a-h][1-8](?:=?[QRBN])?|[a-h][18]=[QRBN]|" + CASTLING + ")"
       r"(?:[+#])?(?![\w-])")
PAWN_STEP = r"[a-h][1-8][+#]?(?![\w-])"     # a move only where a number or dots stand before; else it is a square
MOVE = re.compile(rf"(?:(?<![\w.])(?P<number>\d{{1,3}}) ?(?P<dots>\.\.\.|…|\.(?!\.)) ?|(?P<bare>(?<!\.)\.\.\.|…) ?)"
                  rf"(?P<numbered>{SAN}|{PAWN_STEP})|(?<![\w.-])(?P<plain>{SAN})")
CONTINUES = re.compile(rf"[!?]{{0,2}},? +(?P<san>{SAN}|{PAWN_STEP})")
# Words after which a sentence need not be about this move on this board: conditions, negations, plans, the past, hearsay.
SUPPOSES = ("if unless until would will shall suppos* imagin* example instance otherwise then next later soon after* when*"
            " before eventually ultimately follow* instead rather hop* plan* idea prepar* want* wants intend* dream* typical*"
            " usual* often always every earlier previous* last already better was were been had")
HEDGE = re.compile(
    any_of(SUPPOSES + " could can cannot may might must should threat* has have did does do not no never nor neither without"
           " nothing none nobody almost nearly look looks seem* appear* aim* allow* let lets think* thought believe*"
           " possib* perhaps maybe missed stronger alternative* avoid* prevent* stop* avert* ready about try* tries"
           " answer* repl* respond* whether how any sometimes")
    + r"|(?<!at )\bonce\b|n['’]t\b|['’](?:ll|d)\b|e\.g\.|i\.e\.", re.IGNORECASE)
# Words that move pieces, so that what is named on a square may come there later or have stood there in the past.
ELSEWHERE = re.compile(
    any_of(SUPPOSES + " once took gave went came left captured exchanged recaptur* retak* regain* put* plac* bring* get* plant*"
           " install* land* reach* rerout* rout* post* need* transfer* trad* exchang* swap* retreat* replac* without missing"
           " everywhere") + r"|n['’]t\b|['’](?:ll|d)\b", re.IGNORECASE)


class Mention(NamedTuple):
    """A piece named on a square."""

    start: int
    end: int
    kind: int
    square: int
    side: bool | None       # the colour in words, if it stands there
    definite: bool          # "the knight", not "a knight"


class Named(NamedTuple):
    """A move named in the text."""

    start: int
    end: int
    ply: int | None         # twice its number, one more for Black; None where no number is given or implied
    dots: bool              # written as Black's move with dots and no number: "...Rc8"
    san: str                # without check marks
    mark: str               # "+", "#" or nothing
    continues: bool         # stands right after another move, so that both are one line


def named_moves(text: str) -> Iterator[Named]:
    """All moves of the text in order. A move right behind a numbered one gets the number that follows."""
    position, ply = 0, None
    while match := MOVE.search(text, position):
        san = match["numbered"] or match["plain"]
        black = bool(match["dots"] and match["dots"] != ".")
        ply = 2 * int(match["number"]) + black if match["number"] else None
        glued = position > 0 and re.fullmatch(r"[!?]{0,2},? *", text[position:match.start()]) is not None
        yield Named(match.start(), match.end(), ply, bool(match["bare"]), san.rstrip("+#"), san[len(san.rstrip("+#")):], glued)
        position = match.end()
        while ply is not None and (more := CONTINUES.match(text, position)):
            san, ply = more["san"], ply + 1
            yield Named(more.start("san"), more.end(), ply, False, san.rstrip("+#"), san[len(san.rstrip("+#")):], True)
            position = more.end()


def piece_mentions(text: str) -> Iterator[Mention]:
    for match in MENTION.finditer(text):
        words = f"{match['det'] or ''} {match['adjective']}".lower()
        side = True if "white" in words else False if "black" in words else None
        definite = bool(match["det"]) and match["det"].lower() not in ("a", "an", "another", "no", "any", "one")
        kind = KINDS[(match["kind"] or match["kind2"]).lower()]
        for name in re.findall(SQUARE, (match["squares"] or match["square"]).lower()):
            yield Mention(match.start(), match.end(), kind, chess.parse_square(name), side, definite)
