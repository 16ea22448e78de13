"""Turns the facts of a move into words: a coach's sentences, a thought, answers to follow-up questions, other voices.
Needs python-chess. The phrases are in `data/demo/phrases.py`."""

import random
import re

import chess

from data.demo.exchange import VALUE, captures_by_gain, mate_in_one
from data.demo.phrases import COACH, FORUM, GROUPS
from data.demo.play import EFFECT, IDEA, TAIL, WARNING, Fact, Play, ahead_words, listed, material_balance, named, spoils

PAWN_MOVE = re.compile(r"[a-h](x[a-h])?[1-8]")


def sentence(phrase: str, words: dict[str, str], opener: str = "") -> str:
    text = phrase.format(**words)
    text = re.sub(r"\ba (?=[aeiou])", "an ", opener + text)
    return text if PAWN_MOVE.match(text) else text[0].upper() + text[1:]


def without_repeats(facts: list[Fact]) -> list[Fact]:
    kept: list[Fact] = []
    for fact in facts:
        rivals = {kind for group in GROUPS if fact.kind in group for kind in group}
        if not any(other.kind in rivals for other in kept):
            kept.append(fact)
    return kept


def choose_facts(facts: list[Fact], rng: random.Random, num: int) -> list[Fact]:
    """At most `num` facts, at least one about what the move does, and sometimes a tail; in the order of a comment."""
    kept = without_repeats([fact for fact in facts if fact.order != TAIL])
    if any(fact.order == IDEA and fact.weight >= 20 or fact.order == EFFECT and fact.weight >= 45 for fact in kept):
        kept = [fact for fact in kept if fact.weight >= 20]
    about = next((fact for fact in kept if fact.order in (IDEA, EFFECT)), None)
    chosen = kept[:num]
    if about is not None and about not in chosen:
        chosen[-1] = about
    tails = [fact for fact in facts if fact.order == TAIL]
    if tails and rng.random() < (0.8, 0.5, 0.15, 0.0)[min(len(chosen), 4) - 1]:
        chosen.append(rng.choice(tails))
    return sorted(chosen, key=lambda fact: (fact.order, -fact.weight))


def comment(play: Play, facts: list[Fact], rng: random.Random, num: int = 3) -> str:
    """The coach's comment: one to `num` sentences."""
    parts: list[str] = []
    chosen = choose_facts(facts, rng, num)
    for i, fact in enumerate(chosen):
        contrast = i > 0 and fact.order == WARNING and chosen[i - 1].order < WARNING
        opener = rng.choice(("but ", "however, ")) if contrast else ""
        parts.append(sentence(rng.choice(COACH[fact.kind]), {**play.names(), **fact.words}, opener))
    return " ".join(parts)


def forum_comment(play: Play, facts: list[Fact], rng: random.Random) -> str:
    """At most two of the facts in the tone of a message board: no capitals, no full stops."""
    known = without_repeats([fact for fact in facts if fact.kind in FORUM])[:2]
    parts = [rng.choice(FORUM[fact.kind]).format(**{**play.names(), **fact.words}) for fact in known]
    return re.sub(r"\ba (?=[aeiou])", "an ", rng.choice((". ", "... ", ", ")).join(parts))


def engine_line(play: Play) -> str:
    """One terse line as of a chess engine: material, check, number of replies, best capture."""
    gain = play.replies[0][0] if play.replies else 0
    best = f"{play.after.san(play.replies[0][1])} ({gain:+d})" if play.replies else "none"
    return (f"{play.san} | material {material_balance(play.after):+d} | check {'yes' if play.after.is_check() else 'no'} | "
            f"replies {play.after.legal_moves.count()} | best capture {best}")


def thought(play: Play) -> str:
    """A short line of true statements: what moves, which pieces attack and guard it, what can be captured next."""
    words, after = play.names(), play.after
    victim = play.board.piece_type_at(play.to)
    taking = f", taking the {chess.piece_name(victim)}" if victim and play.is_capture else ""
    check = ", with check" if after.is_check() else ""
    mover = chess.piece_name(play.board.piece_type_at(play.start) or chess.PAWN)
    first = f"{words['side']}'s {mover} goes from {words['from']} to {words['to']}{taking}{check}."
    if after.is_checkmate():
        return f"{first} No legal reply: mate."
    hunters = [named(after, square) for square in after.attackers(play.them, play.to)]
    guards = [named(after, square) for square in after.attackers(play.us, play.to)]
    second = f"Attacked there by {listed(hunters) if hunters else 'nothing'}"
    second += f", guarded by {listed(guards) if guards else 'nothing'}." if hunters else "."
    return f"{first} {second} {best_capture(play)}"


def best_capture(play: Play) -> str:
    other = "White" if play.them else "Black"
    if not play.replies:
        return f"{other} has nothing to take."
    gain, reply = play.replies[0]
    if gain <= 0:
        return f"No capture wins material for {other}."
    return f"{other}'s best capture is {play.after.san(reply)}, worth {gain} point{'s' if gain > 1 else ''}."


def undefended(board: chess.Board, color: chess.Color) -> list[str]:
    """Knights, bishops, rooks and queens of `color` that no other piece of `color` guards."""
    mask = board.occupied_co[color] & ~board.pawns & ~board.kings
    return [named(board, square) for square in chess.scan_forward(mask) if not board.attackers_mask(color, square)]


def answer_undefended(play: Play) -> str:
    sides = []
    for name, color in (("White", chess.WHITE), ("Black", chess.BLACK)):
        loose = undefended(play.after, color)
        sides.append(f"{name}'s {listed(loose)}" if loose else f"none of {name}'s pieces")
    return f"Pawns and kings aside: {sides[0]}, and {sides[1]}."


def answer_watch(play: Play) -> str:
    after, other = play.after, "White" if play.them else "Black"
    if after.is_game_over():
        return "Nothing: the game is over."
    mate = mate_in_one(after)
    if mate:
        return f"Watch {after.san(mate)}: it is checkmate."
    winning = [(gain, reply) for gain, reply in captures_by_gain(after) if gain > 0]
    if winning:
        gain, reply = winning[0]
        if play.is_capture and reply.to_square == play.to:
            return f"{other} can take on {chess.square_name(play.to)} with {after.san(reply)}."
        return f"{other}'s capture {after.san(reply)}: the exchange on {chess.square_name(reply.to_square)} wins " \
               f"{spoils(after, reply, gain)}."
    giving = [after.san(move) for move in after.legal_moves if after.gives_check(move)]
    if giving:
        return f"No capture wins material for {other}, but look at the checks: {listed(giving[:3])}."
    return f"{other} has no check and no capture that wins material, so there is time for a plan."


def answer_material(play: Play) -> str:
    words = ahead_words(play.after)
    sums = [sum(VALUE[kind] * len(play.after.pieces(kind, color)) for kind in VALUE) for color in chess.COLORS]
    verdict = "level" if not material_balance(play.after) else f"{words['leader']} is {words['points']} {words['unit']} ahead"
    return f"Counting pawn 1, knight and bishop 3, rook 5, queen 9: White {sums[0]}, Black {sums[1]}, so {verdict}."


FOLLOW_UPS = (("Which pieces are undefended now?", answer_undefended),
              ("What should I watch for next?", answer_watch),
              ("Who is ahead in material?", answer_material))


def label(board: chess.Board) -> str:
    """The number of the move about to be played: `12. ` for White, `12... ` for Black."""
    return f"{board.fullmove_number}{'.' if board.turn else '...'} "
