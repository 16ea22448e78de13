"""What is true of a position and the move played in it: mates, captures, checks, forks, pins, threats.
Needs python-chess. A millisecond or two a move. The phrases for the facts are in `data/demo/phrases.py`."""

from collections.abc import Iterator

import chess

from data.demo.exchange import (
    VALUE,
    captures_by_gain,
    exchange,
    mate_in_one,
    net_gain,
    retakes,
    taken_value,
    value_at,
    winning_captures,
)
from data.demo.plans import opening, pawns, pieces, small_change, tails
from data.demo.play import (
    EFFECT,
    IDEA,
    NUMBERS,
    SLIDERS,
    TIMES,
    WARNING,
    Fact,
    Play,
    behind,
    listed,
    named,
    spoils,
    worth_attacking,
)


def mates(play: Play) -> Iterator[Fact]:
    if play.after.is_checkmate():
        king = play.after.king(play.them) or 0
        yield Fact("mate", 100, IDEA, {"king": chess.square_name(king)})
        guards = play.after.attackers(play.us, play.to)
        if guards and chess.square_distance(king, play.to) == 1 and len(play.after.checkers()) == 1:
            yield Fact("mate_guarded", 99, EFFECT, {"guard": named(play.after, guards.pop())})
        return
    if play.after.is_stalemate():
        yield Fact("stalemate", 100)
        return
    missed = mate_in_one(play.board)
    if missed:
        yield Fact("missed_mate", 92, WARNING, {"best": play.board.san(missed)})
    allowed = mate_in_one(play.after)
    if allowed:
        yield Fact("allows_mate", 90, WARNING, {"reply": play.after.san(allowed)})
    if play.after_passed and not missed and not allowed:
        threat = mate_in_one(play.after_passed)
        if threat:
            yield Fact("mate_threat", 72, EFFECT, {"threat": play.after_passed.san(threat)})


def captures(play: Play) -> Iterator[Fact]:
    if play.move.promotion:
        lost = [reply for gain, reply in play.replies if gain > 0 and reply.to_square == play.to]
        yield Fact("promotion_lost" if lost else "promotion", 85, IDEA,
                   {"new": chess.piece_name(play.move.promotion), "reply": play.after.san(lost[0]) if lost else ""})
        return
    if not play.is_capture:
        return
    board, after = play.board, play.after
    passant = board.is_en_passant(play.move)
    victim = chess.PAWN if passant else board.piece_type_at(play.to) or chess.PAWN
    words = {"victim": chess.piece_name(victim)}
    if passant:
        yield Fact("en_passant", 64)
        return
    gain = exchange(board, play.move)
    takers = retakes(after, play.to)
    if takers:
        words["reply"] = after.san(takers[0])
    keeps = net_gain(board, play.move)
    worth = 45 + 4 * VALUE[victim]
    if not takers:
        loose = not after.attackers_mask(play.them, play.to)
        sure = gain > 1 and keeps >= gain and not play.takes_back
        kind = ("takes_loose" if loose else "takes_safe") + ("" if sure else "_but")
        yield Fact(kind, worth, IDEA, words)
    elif gain > 0:
        words["spoils"] = spoils(board, play.move, gain)
        sure = gain > 1 and keeps >= gain and not play.takes_back
        yield Fact("wins" if sure else "wins_but", worth, IDEA, words)
    elif gain == 0:
        same = victim == play.piece_type
        yield Fact("trade" if same else "trade_unlike", worth - 2, IDEA, words)
    else:
        yield Fact("gives_up", 75, IDEA, words)


def hanging(play: Play) -> Iterator[Fact]:
    """The opponent's best capture in reply, if it wins material and does not retake."""
    ours = taken_value(play.board, play.move) if play.is_capture else 0
    for gain, sure, reply in winning_captures(play.after):
        retaken = reply.to_square == play.to and (play.is_capture or play.move.promotion)
        if retaken or gain < ours or play.after.is_en_passant(reply):
            continue
        loose = not play.after.attackers_mask(play.us, reply.to_square)
        kind = "hangs_mover" if reply.to_square == play.to else "hangs_loose" if loose else "hangs"
        kind += "" if sure else "_but"
        yield Fact(kind, 62 + 3 * gain if sure else 42, WARNING,
                   {"reply": play.after.san(reply), "target": named(play.after, reply.to_square),
                    "hunter": named(play.after, reply.from_square),
                    "there": chess.square_name(reply.to_square), "spoils": spoils(play.after, reply, gain)})
        return


def missed(play: Play) -> Iterator[Fact]:
    """A capture that would have won at least two pawns' worth more than the move played."""
    ours = net_gain(play.board, play.move)
    for gain, sure, best in winning_captures(play.board, at_least=max(2, ours + 2)):
        if sure and best != play.move and not play.board.is_en_passant(best):
            loose = not play.board.attackers_mask(play.them, best.to_square)
            yield Fact("missed_loose" if loose else "missed", 60 + 3 * gain, WARNING,
                       {"best": play.board.san(best), "target": named(play.board, best.to_square),
                        "spoils": spoils(play.board, best, gain)})
        return


def checks(play: Play) -> Iterator[Fact]:
    if not play.after.is_check() or play.after.is_checkmate():
        return
    checkers = play.after.checkers()
    words = {"king": chess.square_name(play.after.king(play.them) or 0)}
    others = [square for square in checkers if square != play.to]
    if len(checkers) > 1:
        yield Fact("double_check", 70, IDEA, {**words, "checker": named(play.after, others[0])})
    elif others and not play.board.is_castling(play.move):
        yield Fact("discovered_check", 66, IDEA, {**words, "checker": named(play.after, others[0])})
    else:
        yield Fact("check", 50, EFFECT if play.is_capture or play.move.promotion else IDEA, words)
    legal = list(play.after.legal_moves)
    if len(legal) == 1:
        yield Fact("only_reply", 44, EFFECT, {"reply": play.after.san(legal[0])})
    elif all(play.after.piece_type_at(move.from_square) == chess.KING for move in legal):
        yield Fact("king_must_move", 33, EFFECT, {"count": NUMBERS[len(legal)]})


def forks_and_threats(play: Play) -> Iterator[Fact]:
    if not play.safe or play.piece_type == chess.KING or play.after.is_pinned(play.us, play.to):
        return
    after = play.after
    targets = [square for square in chess.scan_forward(play.attacked) if worth_attacking(play, play.to, square)]
    targets.sort(key=lambda square: -(value_at(after, square) or 99))
    fresh = [square for square in targets if not play.board.attacks_mask(play.start) & chess.BB_SQUARES[square]]
    if len(targets) > 1 and fresh:
        yield Fact("fork", 71, EFFECT, {"targets": listed([f"the {named(after, square)}" for square in targets[:3]])})
    elif fresh and after.piece_type_at(fresh[0]) != chess.KING:
        loose = not after.attackers_mask(play.them, fresh[0])
        yield Fact("threat_loose" if loose else "threat", 37, EFFECT, {"target": named(after, fresh[0])})
    elif not targets:
        yield from pressure(play)


def pressure(play: Play) -> Iterator[Fact]:
    """A pawn newly attacked: nothing defends it, or it is attacked more than once."""
    new = play.attacked & play.after.pawns & ~play.board.attacks_mask(play.start)
    for square in chess.scan_forward(new if play.piece_type != chess.PAWN else 0):
        num_us = len(play.after.attackers(play.us, square))
        num_them = len(play.after.attackers(play.them, square))
        words = {"target": named(play.after, square), "attacked": TIMES[num_us], "defended": TIMES[num_them]}
        if not num_them:
            yield Fact("hits_pawn", 31, EFFECT, words)
        elif num_us > 1:
            yield Fact("pressure", 26, EFFECT, words)


def lines(play: Play) -> Iterator[Fact]:
    """Pins, skewers and discovered attacks."""
    after, board = play.after, play.board
    if play.piece_type in SLIDERS and play.safe:
        for square in chess.scan_forward(play.attacked & ~after.kings):
            back = behind(after, play.to, square)
            front_value = value_at(after, square)
            if back is None or after.color_at(back) != play.them or after.piece_type_at(square) == chess.PAWN:
                continue
            words = {"front": named(after, square), "back": named(after, back)}
            if board.attacks_mask(play.start) & chess.BB_SQUARES[square] and behind(board, play.start, square) == back:
                continue
            if after.piece_type_at(back) == chess.KING:
                yield Fact("pin", 49, EFFECT, words)
            elif value_at(after, back) > max(front_value, VALUE[play.piece_type]):
                yield Fact("pin", 45, EFFECT, words)
            elif front_value > VALUE[play.piece_type] and worth_attacking(play, play.to, back):
                yield Fact("skewer", 52, EFFECT, words)
    if board.is_castling(play.move) or after.is_check():
        return
    ours = after.occupied_co[play.us] & (after.bishops | after.rooks | after.queens) & ~chess.BB_SQUARES[play.to]
    for slider in chess.scan_forward(ours):
        new = after.attacks_mask(slider) & ~board.attacks_mask(slider) & after.occupied_co[play.them]
        for target in chess.scan_forward(new):
            if worth_attacking(play, slider, target) and not after.is_pinned(play.us, slider):
                yield Fact("discovered_attack", 51, EFFECT,
                           {"slider": named(after, slider), "target": named(after, target)})


def defence(play: Play) -> Iterator[Fact]:
    """Answers to a check, pieces saved from an attack, pieces newly guarded."""
    if play.board.is_check():
        king_moves = play.board.piece_type_at(play.start) == chess.KING
        kind = "evade_king" if king_moves else "evade_take" if play.is_capture else "evade_block"
        yield Fact(kind, 48 if kind != "evade_take" else 20, IDEA if kind != "evade_take" else EFFECT)
        return
    assert play.before_passed is not None
    loose_now = {reply.to_square for gain, reply in play.replies if gain > 0}
    for square in {move.to_square: gain for gain, move in captures_by_gain(play.before_passed) if gain > 0}:
        if square == play.start and play.safe and not play.is_capture and not play.move.promotion:
            hunters = list(play.board.attackers(play.them, square))
            yield Fact("rescue", 46, IDEA, {"hunter": named(play.board, hunters[0])})
        elif square not in loose_now and square != play.start and not play.is_capture:
            guard = chess.BB_SQUARES[play.to] & play.after.attackers_mask(play.us, square)
            if guard and not play.board.attackers_mask(play.us, square) & chess.BB_SQUARES[play.start]:
                yield Fact("guards", 43, EFFECT, {"target": named(play.after, square)})


FINDERS = (mates, captures, hanging, missed, checks, forks_and_threats, lines, defence, pieces, pawns, opening,
           small_change, tails)


def facts_of(play: Play) -> list[Fact]:
    """Every fact found, the weightiest first."""
    if play.after.is_game_over():
        found = [fact for finder in (mates, captures, checks, small_change) for fact in finder(play)]
        found = [fact for fact in found if fact.weight > 40 or not play.after.is_checkmate()]
    else:
        found = [fact for finder in FINDERS for fact in finder(play)]
    return sorted(found, key=lambda fact: -fact.weight)
