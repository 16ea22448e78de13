"""Checks which pieces a comment says attack or defend which others, and which it calls undefended or hanging.
Needs python-chess. Under a millisecond a comment. A claim is flagged only if it is false in the position and after the move."""

from __future__ import annotations

import re
from collections.abc import Iterator

import chess

from loop.review.comment import Comment, Flag
from loop.review.words import MENTION, VALUE, Mention, any_of, mentions_in

# in "attacks the queen on d8 and the rook on h8 is next" the last one begins a clause of its own
MENTIONS = (rf"{MENTION}(?:(?:,? and(?: also)?|,)(?: by)? {MENTION}"
            rf"(?! (?:[a-z]+s|{any_of('also now still then can could will would may might must are had')})\b))*")
IS = r"(?:,? (?:which|that))?(?: (?:is|are|stands|remains))?(?: (?:now|only|also|still|both|well|again))* "
# the piece may act through another one, or on what stands behind
INDIRECT = re.compile(any_of("x-ray* xray* through behind indirect* pin* skewer* discover* batter*"), re.IGNORECASE)
LOOSE = re.compile(rf"(?P<piece>{MENTION})(?:,? (?:which|that))?(?: hangs\b| (?:(?:is|are|now|left|just|simply|completely) )+"
                   r"(?:hanging|en prise|(?P<bare>undefended|unprotected|unguarded))\b)"
                   rf"|\bhangs (?P<hung>{MENTION})", re.IGNORECASE)


def contact(active: str, passive: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns for "A attacks B", also without an A that has a square, and for "B is attacked by A"."""
    return (re.compile(rf"(?:(?P<actors>{MENTIONS}){IS})?{any_of(active)}(?: both)? (?P<targets>{MENTIONS})",
                       re.IGNORECASE),
            re.compile(rf"(?P<targets>{MENTIONS}){IS}{any_of(passive)} by (?P<actors>{MENTIONS})", re.IGNORECASE))


ATTACK = contact("attacks attacking hits hitting forks forking", "attacked")
DEFENCE = contact("defends defending protects protecting guards guarding supports supporting",
                  "defended protected guarded supported")


def false_attack(comment: Comment) -> Iterator[Flag]:
    """A piece said to attack another one that it does not attack."""
    return false_contact(comment, "false_attack", ATTACK, same_side=False)


def false_defence(comment: Comment) -> Iterator[Flag]:
    """A piece said to defend another one that it does not defend."""
    return false_contact(comment, "false_defence", DEFENCE, same_side=True)


def false_contact(comment: Comment, name: str, patterns: tuple[re.Pattern[str], ...], same_side: bool) -> Iterator[Flag]:
    for match in (match for pattern in patterns for match in comment.said(pattern)):
        actors = list(mentions_in(comment.text, *match.span("actors"))) if match["actors"] else [None]
        targets = mentions_in(comment.text, *match.span("targets"))
        holds = all(any(reaches(board, start, target.square, same_side) for board in comment.there(target)
                        for start in starts(comment, board, actor, match.start())) for target in targets for actor in actors)
        if not holds and not INDIRECT.search(comment.text, *comment.sentence(match.start())):
            yield comment.flag(name, *match.span(), "not so on the board, neither before nor after the move")


def starts(comment: Comment, board: chess.Board, actor: Mention | None, position: int) -> list[int]:
    """The squares from which a named piece acts, or what the words before `position` name without a square."""
    if actor:
        return [actor.square] if board in comment.there(actor) else []
    if any(named.end + 1 == position for named in comment.moves) and not comment.before.is_castling(comment.played):
        return [comment.played.to_square] if board is comment.after else []     # "Bb5 attacks"
    subject = comment.subject(position)
    return [square for square, piece in board.piece_map().items()
            if subject in (None, piece.piece_type, chess.COLOR_NAMES[piece.color])]


def reaches(board: chess.Board, start: int, target: int, same_side: bool) -> bool:
    """Whether the piece on `start` attacks or defends that on `target`, also through one that does so along the same line."""
    color = board.color_at(target)
    assert color is not None
    between = chess.between(start, target) & board.occupied
    if between.bit_count() != 1 or target not in board.attacks(chess.lsb(between)):
        between = 0
    return start in board.attackers(color if same_side else not color, target, board.occupied ^ between)


def defended(board: chess.Board, square: int) -> bool:
    """Whether a piece that is not pinned defends `square`; a king counts where nothing attacks."""
    color = board.color_at(square)
    assert color is not None
    attacked = board.is_attacked_by(not color, square)
    return any(not board.is_pinned(color, start) and not (attacked and board.piece_type_at(start) == chess.KING)
               for start in board.attackers(color, square))


def safe(board: chess.Board, square: int) -> bool:
    """Whether nothing attacks the piece on `square`, or only what is worth more while the piece is defended."""
    piece = board.piece_at(square)
    assert piece is not None
    hunters = [VALUE[board.piece_type_at(start) or chess.KING] for start in board.attackers(not piece.color, square)]
    return not hunters or defended(board, square) and min(hunters) > VALUE[piece.piece_type]


def false_undefended(comment: Comment) -> Iterator[Flag]:
    """A piece called undefended that is defended, or called hanging while nothing can gain by taking it."""
    for match in comment.said(LOOSE):
        proof = defended if match["bare"] else safe
        for mention in mentions_in(comment.text, *match.span("hung" if match["hung"] else "piece")):
            boards = comment.there(mention)
            if boards and all(proof(board, mention.square) for board in boards):
                yield comment.flag("false_undefended", *match.span(),
                                   f"{chess.square_name(mention.square)} is defended, or nothing can take there")
                break
