"""Checks which pieces a comment says attack or defend which others, and which it calls undefended or hanging.
Needs python-chess. Under a millisecond a comment. A claim is flagged only if it is false in the position and after the move."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import chess

from loop.review.claims import subject_of, there
from loop.review.comment import Comment, Flag
from loop.review.words import MENTION, SIDE, Mention, any_of

VALUE = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9, chess.KING: 99}
ADVERB = r"(?: both| again| now| at once)? "
ATTACK = re.compile(any_of("attacks attacking hits hitting forks forking") + ADVERB, re.IGNORECASE)
ATTACKED = re.compile(r"\battacked by ", re.IGNORECASE)
DEFENCE = re.compile(any_of("defends defending protects protecting guards guarding supports supporting") + ADVERB,
                     re.IGNORECASE)
DEFENDED = re.compile(any_of("defended protected guarded supported") + " by ", re.IGNORECASE)
IS = re.compile(r"(?:,? (?:which|that))?(?: (?:is|are|stands|remains))?(?: (?:now|only|also|still|both|well|again))* *")
LIST_GAP = re.compile(r"(?:,? and(?: also)?|,)(?: by)? ", re.IGNORECASE)
NEW_CLAUSE = re.compile(" (?:[a-z]+s|" + any_of("also now still then can could will would may might must are has had") + r")\b")
# the piece may act through another one, or on what stands behind
INDIRECT = re.compile(any_of("x-ray* xray* through behind indirect* pin* skewer* discover* batter*"), re.IGNORECASE)
HANGS = re.compile(rf"\bhangs (?=(?:the|its|{SIDE}['’]s) )", re.IGNORECASE)
LOOSE = re.compile(r"(?:,? (?:which|that))? (?:is|are|now|just|simply|left)(?: (?:now|left|just|simply|completely))* "
                   r"(?P<how>undefended|unprotected|unguarded|hanging|en prise)\b| hangs\b", re.IGNORECASE)


class Contact(NamedTuple):
    """ "A attacks B" or "B is attacked by A", or the same with defends."""

    start: int
    end: int
    actors: list[Mention]   # empty: a subject without a square, such as "the knight" or "White"
    targets: list[Mention]  # empty: an object without a square


def named_behind(comment: Comment, position: int) -> list[Mention]:
    """The pieces listed from `position` on: "the queen on d8 and the rook on h8"."""
    found: list[Mention] = []
    while match := MENTION.match(comment.text, position):
        found += [mention for mention in comment.mentions_before(match.end()) if mention.end == match.end()]
        gap = LIST_GAP.match(comment.text, match.end())
        if not gap:
            break
        position = gap.end()
    # in "attacks the queen on d8 and the rook on h8 is next" the last one begins a clause of its own
    return found[:-1] if len(found) > 1 and NEW_CLAUSE.match(comment.text, found[-1].end) else found


def named_ahead(comment: Comment, position: int) -> list[Mention]:
    """The piece named right before `position`, with no more than "is now" between, or first in a sentence up to its "and"."""
    first, _ = comment.sentence(position)
    mentions = [mention for mention in comment.mentions_before(position) if first <= mention.start]
    if comment.text[first:position].endswith(" and "):
        return [mention for mention in mentions if not comment.text[first:mention.start].strip()]
    return [mention for mention in mentions if IS.fullmatch(comment.text, mention.end, position)]


def contacts(comment: Comment, active: re.Pattern[str], passive: re.Pattern[str]) -> Iterator[Contact]:
    for match in active.finditer(comment.text):
        targets = named_behind(comment, match.end())
        if targets:
            yield Contact(match.start(), targets[-1].end, named_ahead(comment, match.start()), targets)
    for match in passive.finditer(comment.text):
        actors = named_behind(comment, match.end())
        if actors:
            yield Contact(match.start(), actors[-1].end, actors, named_ahead(comment, match.start()))


def reaches(board: chess.Board, start: int, target: int) -> bool:
    """Whether the piece on `start` attacks `target`, also through one piece that moves along the same line."""
    if board.attacks_mask(start) & chess.BB_SQUARES[target]:
        return True
    between = chess.SquareSet(chess.between(start, target) & board.occupied)
    if len(between) != 1 or board.piece_type_at(start) not in (chess.BISHOP, chess.ROOK, chess.QUEEN):
        return False
    through = between.pop()
    if not board.attacks_mask(through) & chess.BB_SQUARES[target] or board.piece_type_at(through) == chess.KING:
        return False
    other = board.copy(stack=False)
    other.remove_piece_at(through)
    return bool(other.attacks_mask(start) & chess.BB_SQUARES[target])


def holds_between(comment: Comment, contact: Contact, same_side: bool) -> bool:
    """Whether each of the actors acts on each of the targets, on a board where both stand."""
    subject = subject_of(comment, contact.start)

    def acts(board: chess.Board, start: int, target: int) -> bool:
        return reaches(board, start, target) and (board.color_at(start) == board.color_at(target)) == same_side

    if not contact.targets:     # what is acted upon has no square: only that the actors stand there can be judged
        return all(there(comment, actor) for actor in contact.actors)
    if not contact.actors:
        played = [named for named in comment.moves if 0 <= contact.start - named.end <= 1 and comment.is_played(named)]
        boards = [comment.after] if played else [*comment.boards, *comment.reached_before(contact.start)]
        kinds = [subject] if isinstance(subject, int) else chess.PIECE_TYPES
        return all(any(acts(board, start, target.square) for board in there(comment, target) if board in boards
                       for kind in kinds for color in chess.COLORS for start in board.pieces(kind, color))
                   for target in contact.targets)
    return all(any(acts(board, start, target.square) for board, start in places(comment, actor)
                   if board in there(comment, target)) for actor in contact.actors for target in contact.targets)


def places(comment: Comment, actor: Mention) -> list[tuple[chess.Board, int]]:
    """Where the named piece stands; a piece named on the square it left also acts from where it went."""
    move = comment.move
    assert move is not None
    found = [(board, actor.square) for board in there(comment, actor)]
    if actor.square == move.from_square:
        found.append((comment.after, move.to_square))
    elif comment.before.is_castling(move) and actor.kind == chess.ROOK:
        found += [(comment.after, square) for square in comment.after.pieces(chess.ROOK, comment.before.turn)]
    return found


def false_contacts(comment: Comment, name: str, active: re.Pattern[str], passive: re.Pattern[str]) -> Iterator[Flag]:
    same_side = name == "false_defence"
    for contact in contacts(comment, active, passive):
        first, last = comment.sentence(contact.start)
        if comment.plain(contact.start, contact.end) and not INDIRECT.search(comment.text, first, last) \
                and all(mention.definite for mention in contact.actors + contact.targets) \
                and not holds_between(comment, contact, same_side):
            yield comment.flag(name, contact.start, contact.end, "not so on the board, neither before nor after the move")


def false_attack(comment: Comment) -> Iterator[Flag]:
    """A piece said to attack another one that it does not attack."""
    yield from false_contacts(comment, "false_attack", ATTACK, ATTACKED)


def false_defence(comment: Comment) -> Iterator[Flag]:
    """A piece said to defend another one that it does not defend."""
    yield from false_contacts(comment, "false_defence", DEFENCE, DEFENDED)


def surely_defended(board: chess.Board, square: int) -> bool:
    """Whether a piece that is not pinned defends `square`; a king counts where nothing attacks."""
    color = board.color_at(square)
    assert color is not None
    attacked = board.is_attacked_by(not color, square)
    return any(not board.is_pinned(color, start) and not (attacked and board.piece_type_at(start) == chess.KING)
               for start in board.attackers(color, square))


def surely_safe(board: chess.Board, square: int) -> bool:
    """Whether nothing attacks the piece on `square`, or only what is worth more while the piece is defended."""
    color = board.color_at(square)
    hunters = [board.piece_type_at(start) or chess.KING for start in board.attackers(not color, square)]
    value = VALUE[board.piece_type_at(square) or chess.KING]
    return not hunters or surely_defended(board, square) and all(VALUE[kind] > value for kind in hunters)


def false_undefended(comment: Comment) -> Iterator[Flag]:
    """A piece called undefended that is defended, or called hanging while nothing can gain by taking it."""
    claims = []
    for mention in comment.mentions:
        match = LOOSE.match(comment.text, mention.end)
        if match:
            claims.append((mention, mention.start, match.end(), surely_safe if match["how"] in (None, "hanging", "en prise")
                           else surely_defended))
    for match in HANGS.finditer(comment.text):
        claims += [(mention, match.start(), mention.end, surely_safe) for mention in named_behind(comment, match.end())]
    for mention, start, end, proof in claims:
        boards = there(comment, mention)
        if boards and comment.plain(start, end) and all(proof(board, mention.square) for board in boards):
            square = chess.square_name(mention.square)
            yield comment.flag("false_undefended", start, end, f"the piece on {square} is defended, or nothing can take it")
