"""Checks what a comment claims of the board: moves, places, checks, mates, captures and castling.
Needs python-chess. Under a millisecond a comment. A claim is flagged only if it is false in the position and after the move."""

from __future__ import annotations

import re
from collections.abc import Iterator

import chess

from loop.review.comment import Comment, Flag, parsed, pushed
from loop.review.words import ELSEWHERE, KINDS, PIECE, SIDE, SQUARE, any_of, mentions_in

SAYS_ILLEGAL = re.compile(any_of("illegal impossible cannot") + r"|\bnot (?:possible|allowed)\b|n['’]t\b", re.IGNORECASE)
# Words right before a move that say it can be played at once. Plans for later are not among them.
AT_ONCE = re.compile(r"\b(?:can|could|may|might|should|must|to)(?: now| simply| just| also| even| still| always)*"
                     r" (?:answer|reply|respond|play|take|capture|recapture)(?: with| by)? $"
                     r"|\bthreat(?:ens|ening| is| of) $|\b(?:plays?|played|answers?|replies) (?:with )?$", re.IGNORECASE)
NO_DENIAL = r"(?!(?:in|not|no|never|hardly|almost|only) )"
CHECK = re.compile(rf"\b(?:(?:(?P<gives>gives|delivers)|giving|is|['’]s|with) (?:an? )?(?:{NO_DENIAL}\w+ )?check\b"
                   rf"(?![ -]?mate| away| next)|checks the (?:{SIDE} )?king\b|check!"
                   rf"|(?:{SIDE}|king)(?: on {SQUARE})? (?:is|stands) (?:now )?in check\b)", re.IGNORECASE)
MATE = re.compile(rf"(?:\b(?:is|['’]s|gives|delivers|giving|delivering) (?:an? )?(?:{NO_DENIAL}\w+ )?(?:check)?mate\b"
                  rf"|\bmates the (?:{SIDE} )?king\b)(?! (?:in|next|threat))", re.IGNORECASE)
NO_MATE = re.compile(r"\b(?:is not|isn['’]t|not) (?:a )?(?:check)?mate\b(?! (?:in|yet))", re.IGNORECASE)
# "takes the knight to e5" and "takes the bishop pair" capture nothing
CAPTURE = re.compile(rf"\b(?:captures|takes|capturing|taking|snatches|grabs) (?:(?:on )?(?P<square>{SQUARE})\b"
                     rf"|(?:(?:the|an?|its|{SIDE}['’]s) )?(?:[a-z-]+ )??(?P<kind>{PIECE})\b(?: on (?P<where>{SQUARE})\b)?"
                     r"(?!['’-])(?! " + any_of("to out back away off on under closer further onto toward* into from one pair"
                                               " majority structure ending endgame side") + "))", re.IGNORECASE)
# not "both castles", the rooks
CASTLES = re.compile(rf"(?:\b(?P<side>{SIDE}) )?\b(?<!the )(?<!both )(?<!two )castles\b"
                     r"(?: (?P<wing>kingside|queenside|short|long)\b)?(?! later| by hand| artificially)", re.IGNORECASE)


def illegal_move(comment: Comment) -> Iterator[Flag]:
    """A move that is illegal in the position, after the move, in every line named so far, and there for the other side as well.

    It is named as playable at once: as this turn, as the reply, as a line's next move, or by words that say so.
    """
    for at, named in enumerate(comment.followed):
        boards = comment.boards_at(named.start)
        if any(parsed(turn, named.san) is not None for board in boards for turn in (board, pushed(board, chess.Move.null()))):
            continue
        first, last = comment.sentence(named.start)
        lead = comment.text[first:named.start]
        if comment.text[first:last].rstrip().endswith("?") or SAYS_ILLEGAL.search(comment.text, first, last):
            continue
        if named.continues:
            previous = comment.followed[at - 1]
            meant = any(board.ply() == previous.ply and parsed(board, previous.san) is not None
                        for board in comment.boards_at(previous.start))
        elif named.ply is None:
            meant = not named.dots and bool(AT_ONCE.search(lead)) and not ELSEWHERE.search(lead)
        else:   # a reply may also be one to another move than the row's
            meant = named.ply == comment.before.ply() or named.ply == comment.after.ply() and not any(
                parsed(pushed(comment.before, move), named.san) is not None for move in comment.before.legal_moves)
        if meant:
            yield comment.flag("illegal_move", named.start, named.end,
                               f"{named.san} is legal neither before nor after {comment.san}")


def wrong_square(comment: Comment) -> Iterator[Flag]:
    """A piece named on a square where it stands neither before nor after the move, nor in a line."""
    flagged = set()
    for mention in mentions_in(comment.text):
        if mention.start not in flagged and not comment.there(mention) and comment.plain(mention.start, mention.end, ELSEWHERE):
            flagged.add(mention.start)
            yield comment.flag("wrong_square", mention.start, mention.end,
                               f"no such {chess.piece_name(mention.kind)} on {chess.square_name(mention.square)}")


def false_check(comment: Comment) -> Iterator[Flag]:
    """A check that this move does not give, or that is given by a piece of another kind."""
    if comment.before.is_check():
        return
    givers = {comment.after.piece_type_at(square) for square in comment.after.checkers()}
    mover = comment.before.piece_type_at(comment.played.from_square)    # is also said to give a check that it discovers
    if not givers:
        yield from false_marks(comment, "false_check", "+")
    for match in comment.said(CHECK):
        subject = comment.subject(match.start()) if match["gives"] else None
        if not givers or isinstance(subject, int) and subject not in (mover, *givers):
            yield comment.flag("false_check", *match.span(), f"{comment.san} gives no such check")


def false_marks(comment: Comment, name: str, mark: str) -> Iterator[Flag]:
    """The move itself, written with a mark that it does not deserve."""
    for named in comment.moves:
        if named.mark == mark and comment.is_played(named) and comment.plain(named.start, named.end):
            yield comment.flag(name, named.start, named.end, f"the move is {comment.before.san(comment.played)}")


def false_mate(comment: Comment) -> Iterator[Flag]:
    """A mate that is none, or a mate that is denied."""
    if comment.after.is_checkmate():
        for match in comment.said(NO_MATE):
            yield comment.flag("false_mate", *match.span(), f"{comment.san} is mate")
        return
    yield from false_marks(comment, "false_mate", "#")
    for match in comment.said(MATE):
        yield comment.flag("false_mate", *match.span(), f"{comment.san} is not mate")


def false_capture(comment: Comment) -> Iterator[Flag]:
    """A capture that neither the move nor, where the side is left open, any reply makes."""
    before, after, move = comment.before, comment.after, comment.played
    us, them = ("white", "black") if before.turn else ("black", "white")
    for match in comment.said(CAPTURE):
        subject = comment.subject(match.start())
        kind = KINDS[match["kind"].lower()] if match["kind"] else None
        square = match["where"] or match["square"]

        def is_meant(board: chess.Board, capture: chess.Move) -> bool:
            passant = board.is_en_passant(capture)
            victim = chess.PAWN if passant else board.piece_type_at(capture.to_square)
            return (kind in (None, victim)
                    and subject in ("white", "black", None, board.piece_type_at(capture.from_square), capture.promotion)
                    and (square is None or passant or chess.parse_square(square.lower()) == capture.to_square))

        if subject == them or before.is_capture(move) and is_meant(before, move):
            continue
        if subject == us or not any(is_meant(after, reply) for reply in after.generate_legal_captures()):
            yield comment.flag("false_capture", *match.span(), f"{comment.san} takes nothing of the kind")


def false_castling(comment: Comment) -> Iterator[Flag]:
    """Castling that this move is not, or to the other side."""
    before, after, move = comment.before, comment.after, comment.played
    for match in comment.said(CASTLES):
        side = match["side"] and match["side"].lower() == "white"
        if side is not None and side != before.turn:
            wrong = not any(after.generate_castling_moves())    # else the opponent may castle next
        else:
            long = (match["wing"] or "").lower() in ("queenside", "long")
            wrong = not before.is_castling(move) or bool(match["wing"]) and long != before.is_queenside_castling(move)
        if wrong:
            yield comment.flag("false_castling", *match.span(), f"the move is {comment.san}")
