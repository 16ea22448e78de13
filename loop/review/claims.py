"""Checks what a comment claims of the board: moves, places, checks, mates, captures and castling.
Needs python-chess. Under a millisecond a comment. A claim is flagged only if it is false in the position and after the move."""

from __future__ import annotations

import re
from collections.abc import Iterator

import chess

from loop.review.comment import Comment, Flag, parsed, pushed, turned
from loop.review.words import ELSEWHERE, KINDS, PIECE, SIDE, SQUARE, Mention, Named, any_of

SAYS_ILLEGAL = re.compile(any_of("illegal legal impossible cannot") + r"|\bnot (?:possible|allowed)\b|n['’]t\b", re.IGNORECASE)
# Words right before a move that say it can be played at once. Plans for later are not among them.
AT_ONCE = re.compile(r"\b(?:can|could|may|might|should|must|to)(?: now| simply| just| also| even| still| always)*"
                     r"(?: (?:answer|reply|respond|meet it|play|take|capture|recapture))(?: with| by)? $"
                     r"|\bthreat(?:ens|ening| is| of) $|\b(?:plays?|played|answers?|repl(?:y|ies)) (?:with )?$", re.IGNORECASE)
LATER = re.compile(any_of("if then next later soon after* once when* follow* idea plan* prepar* will want* eventually had was"
                          " were before earlier previous* last unless until without hop* dream* line variation"), re.IGNORECASE)
MAY_COME = re.compile(any_of("with win wins take takes capture captures trap traps lose loses interpos* block blocks") + " $",
                      re.IGNORECASE)

NO_DENIAL = r"(?!(?:in|not|no|never|hardly|almost|only) )"
CHECK = re.compile(rf"\b(?:(?:gives|giving|is|['’]s|delivers|with) (?:an? )?(?:{NO_DENIAL}\w+ )?check\b"
                   r"(?![ -]?mate| away| next)|checks the (?:\w+ )?king\b|check!)", re.IGNORECASE)
IN_CHECK = re.compile(r"\b(?:is|stands|are) (?:now )?in check\b", re.IGNORECASE)
OTHER_CHECK = re.compile(any_of("discover* uncover* double perpetual keep keeps hold holds"), re.IGNORECASE)
MATE = re.compile(rf"(?:\b(?:is|['’]s|gives|delivers|giving|delivering) (?:an? )?(?:{NO_DENIAL}\w+ )?(?:check)?mate\b"
                  r"|\bmates the (?:\w+ )?king\b)(?! (?:in|next|threat))", re.IGNORECASE)
NO_MATE = re.compile(r"\b(?:is not|isn['’]t|not) (?:a )?(?:check)?mate\b(?! (?:in|yet))", re.IGNORECASE)

THE = rf"(?:the|an?|its|{SIDE}['’]s)"
# "takes the knight to e5" and "takes the bishop pair" capture nothing
NO_CAPTURE = any_of("to out back away off on under closer further onto toward* into from one pair majority"
                    " structure ending endgame side")
CAPTURE = re.compile(rf"\b(?:captures|takes|capturing|taking|snatches|grabs) (?:{THE} )?(?:[a-z-]+ )??"
                     rf"(?:(?P<kind>{PIECE})\b(?: on (?P<where>{SQUARE})\b)?(?! {NO_CAPTURE})(?!['’-])"
                     rf"|(?:on )?(?P<square>{SQUARE})\b)", re.IGNORECASE)
SUBJECT = re.compile(rf"\b(?:(?P<side>{SIDE})(?!['’])|{THE} (?:\w+ )?(?P<kind>{PIECE})(?! on)|(?P<it>it|this|that)) "
                     r"(?:now |simply |just |also |then )?$", re.IGNORECASE)
FIRST_SUBJECT = re.compile(rf"\s*{THE} (?:\w+ )?(?P<kind>{PIECE})\b(?! on)", re.IGNORECASE)     # "The bishop goes to g5 and"
LONGEST_SUBJECT = 60     # characters
WING = r"kingside|queenside|short|long|on the (?:king|queen)side"
CASTLES = re.compile(rf"(?:\b(?P<side>{SIDE}) )?\bcastles(?: (?P<wing>{WING}))?\b(?! later| by hand| artificially)",
                     re.IGNORECASE)


def illegal_move(comment: Comment) -> Iterator[Flag]:
    """A move that is illegal in the position, after the move, with the other side to move, and in every line named so far."""
    for named, line_holds in comment.read_lines[1]:
        first, last = comment.sentence(named.start)
        sentence, lead = comment.text[first:last], comment.text[first:named.start]
        talked_down = sentence.rstrip().endswith("?") or SAYS_ILLEGAL.search(sentence)
        if not talked_down and cannot_be_meant(comment, named, lead, line_holds):
            yield comment.flag("illegal_move", named.start, named.end,
                               f"{named.san} is legal neither before nor after {comment.san}")


def cannot_be_meant(comment: Comment, named: Named, lead: str, line_holds: bool) -> bool:
    """Whether a move that fits no board is named as playable at once: as this turn, as the reply, or as a line's next move."""
    if named.continues:
        return line_holds
    if named.ply is None:
        return not named.dots and bool(AT_ONCE.search(lead)) and not LATER.search(lead)
    if named.ply == comment.ply:
        return True
    if named.ply != comment.ply + 1:
        return False
    return not any(parsed(pushed(comment.before, move), named.san) is not None for move in comment.before.legal_moves)


def holds(board: chess.Board, kind: int, square: int, side: bool | None = None) -> bool:
    piece = board.piece_at(square)
    return piece is not None and piece.piece_type == kind and side in (None, piece.color)


def there(comment: Comment, mention: Mention) -> list[chess.Board]:
    """The boards on which the mentioned piece stands: before and after the move, and those of lines named so far."""
    return [board for board in (*comment.boards, *comment.reached_before(mention.start))
            if holds(board, mention.kind, mention.square, mention.side)]


def can_come(board: chess.Board, mention: Mention) -> bool:
    """Whether the mentioned piece can be on its square after one move of either side."""
    to = chess.BB_SQUARES[mention.square]
    return any(True for turn in (board, turned(board))
               for _ in turn.generate_legal_moves(turn.pieces_mask(mention.kind, turn.turn), to))


def wrong_square(comment: Comment) -> Iterator[Flag]:
    """A piece named on a square where it stands neither before nor after the move."""
    flagged = set()
    for mention in comment.mentions:
        if mention.start in flagged or not mention.definite or there(comment, mention) \
                or not comment.plain(mention.start, mention.end, ELSEWHERE):
            continue
        # "takes with the rook on d8" may mean a move to d8, "wins the queen on d8" follow one, and so may the rest of a line
        comes = list(comment.boards) if MAY_COME.search(comment.text, 0, mention.start) else []
        if any(can_come(board, mention) for board in comes + comment.reached_before(mention.start)):
            continue
        flagged.add(mention.start)
        name = f"{chess.COLOR_NAMES[mention.side]} " if mention.side is not None else ""
        yield comment.flag("wrong_square", mention.start, mention.end,
                           f"no {name}{chess.piece_name(mention.kind)} on {chess.square_name(mention.square)}")


def false_check(comment: Comment) -> Iterator[Flag]:
    """A check that this move does not give, or gives by another piece."""
    checked = comment.after.is_check()
    for named in comment.moves:
        if named.mark == "+" and not checked and comment.is_played(named) and comment.plain(named.start, named.end):
            yield comment.flag("false_check", named.start, named.end, f"{comment.san} gives no check")
    for match in CHECK.finditer(comment.text):
        if not comment.plain(*match.span()) or comment.before.is_check():
            continue
        first, last = comment.sentence(match.start())
        if not checked:
            yield comment.flag("false_check", *match.span(), f"{comment.san} gives no check")
        elif not OTHER_CHECK.search(comment.text, first, last) and not match[0].lower().startswith(("with", "check!")):
            kinds = {comment.after.piece_type_at(square) for square in comment.after.checkers()}
            subject = subject_of(comment, match.start())
            if isinstance(subject, int) and subject not in kinds:
                yield comment.flag("false_check", *match.span(), f"no {chess.piece_name(subject)} gives this check")
    for match in IN_CHECK.finditer(comment.text):
        if comment.plain(*match.span()) and not checked and not comment.before.is_check():
            yield comment.flag("false_check", *match.span(), "no king is in check")


def subject_of(comment: Comment, position: int) -> int | str | None:
    """What the words before a verb name as its subject: a kind of piece, "White", "Black", "it", or None."""
    first, _ = comment.sentence(position)
    lead = comment.text[first:position]
    for mention in comment.mentions_before(position):
        if mention.end <= position and not comment.text[mention.end:position].strip():
            return mention.kind
    match = SUBJECT.search(lead[-LONGEST_SUBJECT:])
    if match and not match["kind"]:
        return str(match["side"] or match["it"]).capitalize()
    match = match or (FIRST_SUBJECT.match(lead) if lead.endswith(" and ") else None)
    kind = KINDS[match["kind"].lower()] if match else None
    assert comment.move is not None
    # the pawn that promotes acts as a queen, the king that castles with the rook
    acts_as_other = chess.PAWN if comment.move.promotion else chess.KING if comment.before.is_castling(comment.move) else None
    return None if kind == acts_as_other else kind


def false_mate(comment: Comment) -> Iterator[Flag]:
    """A mate that is none, or a mate that is denied."""
    mated = comment.after.is_checkmate()
    for named in comment.moves:
        if named.mark == "#" and not mated and comment.is_played(named) and comment.plain(named.start, named.end):
            yield comment.flag("false_mate", named.start, named.end, f"{comment.san} is not mate")
    for match in MATE.finditer(comment.text):
        if not mated and comment.plain(*match.span()):
            yield comment.flag("false_mate", *match.span(), f"{comment.san} is not mate")
    for match in NO_MATE.finditer(comment.text):
        if mated and comment.plain(*match.span()):
            yield comment.flag("false_mate", *match.span(), f"{comment.san} is mate")


def false_capture(comment: Comment) -> Iterator[Flag]:
    """A capture, told as this move, of what it does not take."""
    move, before = comment.move, comment.before
    assert move is not None
    takes = before.is_capture(move)
    victim = chess.PAWN if before.is_en_passant(move) else before.piece_type_at(move.to_square) if takes else None
    mover, us = before.piece_type_at(move.from_square), chess.COLOR_NAMES[before.turn].capitalize()
    for match in CAPTURE.finditer(comment.text):
        subject = subject_of(comment, match.start())
        if not comment.plain(*match.span()) or isinstance(subject, str) and subject in ("White", "Black") and subject != us:
            continue
        square = match["where"] or match["square"]
        kind = KINDS[match["kind"].lower()] if match["kind"] else None
        if subject != us and is_reply(comment, subject, kind, square):
            continue
        elsewhere = square is not None and chess.parse_square(square.lower()) != move.to_square
        passant = before.is_en_passant(move) and kind is not None
        wrong = not takes or elsewhere and not passant or kind not in (None, victim)
        if wrong or isinstance(subject, int) and subject not in (mover, move.promotion) and square is not None:
            did = f"takes a {chess.piece_name(victim)} on {chess.square_name(move.to_square)}" if victim else "takes nothing"
            yield comment.flag("false_capture", *match.span(), f"{comment.san}, by a {chess.piece_name(mover or 0)}, {did}")


def is_reply(comment: Comment, subject: int | str | None, kind: int | None, square: str | None) -> bool:
    """Whether a capture that is told can be the opponent's answer."""
    after, move = comment.after, comment.move
    assert move is not None
    # nobody says of a piece that it takes itself
    if square is not None and holds(after, kind or 0, move.to_square) and chess.parse_square(square.lower()) == move.to_square:
        return True
    return any((kind is None or after.piece_type_at(reply.to_square) == kind)
               and (square is None or reply.to_square == chess.parse_square(square.lower()))
               and (not isinstance(subject, int) or after.piece_type_at(reply.from_square) == subject)
               for reply in after.generate_legal_captures())


def false_castling(comment: Comment) -> Iterator[Flag]:
    """Castling that this move is not, or to the other side."""
    before, after, move = comment.before, comment.after, comment.move
    assert move is not None
    for match in CASTLES.finditer(comment.text):
        if not comment.plain(*match.span()):
            continue
        side = match["side"] and match["side"].lower() == "white"
        if side is not None and side != before.turn:
            wrong = not any(after.generate_castling_moves())    # else the opponent may castle next
        elif not before.is_castling(move):
            wrong = True
        else:
            wing = (match["wing"] or "").lower()
            queenside = wing in ("queenside", "long") or "queen" in wing
            wrong = bool(wing) and queenside != before.is_queenside_castling(move)
        if wrong:
            yield comment.flag("false_castling", *match.span(), f"the move is {comment.san}")
