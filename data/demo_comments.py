"""A coach's words for the facts of a move: sentences, a thought, answers to follow-up questions, other voices.

Needs python-chess only through what it is given. `{side}` moved, `{other}` is to move. A phrase states no more than its
fact; sentences may open with a move in notation or in lower case, `sentence` sets the capital.
"""

import random
import re

import chess

from data.demo_exchange import VALUE, captures_by_gain, mate_in_one
from data.demo_play import EFFECT, IDEA, TAIL, WARNING, Fact, Play, ahead_words, balance, listed, named, spoils

COACH = {
    "mate": ("{san} is checkmate: the king on {king} is attacked and has no way out.",
             "checkmate. The king on {king} has no legal move and nothing can stop the check.",
             "{side} ends the game with {san}, which is checkmate."),
    "mate_guarded": ("the king cannot take the {piece}, because the {guard} guards it.",),
    "stalemate": ("{san} is stalemate: {other} is not in check and has no legal move, so the game is drawn.",),
    "missed_mate": ("{best} would have been checkmate.", "{side} missed {best}, which is checkmate at once."),
    "allows_mate": ("it allows {reply}, which is checkmate.", "now {reply} is checkmate, so it loses at once.",
                    "{other} can answer {reply}, and that is mate."),
    "mate_threat": ("{side} now threatens {threat}, which would be checkmate.",
                    "the threat is {threat}, checkmate.", "{other} must see the threat of {threat} mate."),
    "promotion": ("the pawn arrives on {to} and becomes a {new}.",
                  "{side} promotes: the pawn on {from} becomes a {new}.",
                  "the pawn has reached the last rank, and {side} takes a {new}."),
    "promotion_lost": ("the pawn becomes a {new} on {to}, but {reply} takes it at once.",
                       "{side} promotes to a {new}; {other} can remove it with {reply}."),
    "en_passant": ("{san} takes the pawn in passing, which is possible on this move only.",
                   "{side} captures en passant, a right that lasts for one move."),
    "takes_loose": ("{san} takes the {victim} on {to}, which nothing defended.",
                    "the {victim} on {to} was undefended, and the {piece} simply takes it.",
                    "{side} wins a {victim}: nothing protected {to}, so there is no way to take back.",
                    "a free {victim}. No {other} piece defended {to}, and the {piece} from {from} collects it."),
    "takes_loose_but": ("{san} takes the undefended {victim} on {to}.",
                        "the {victim} on {to} had no defender, so the {piece} takes it.",
                        "the {piece} picks up the {victim} on {to}, which nothing defended.",
                        "{side} takes a {victim} that no piece defended."),
    "takes_safe": ("{san} takes the {victim} on {to}, and {other} has no legal way to take back.",
                   "{side} wins a {victim}: {other} cannot legally take back on {to}."),
    "takes_safe_but": ("{san} takes the {victim} on {to}, and {other} cannot take back there.",),
    "wins": ("{san} wins {spoils}: even after {reply} the exchange on {to} favours {side}.",
             "{side} wins {spoils}, for {reply} only takes back part of it.",
             "the exchange on {to} is good for {side}, who wins {spoils} even if {reply} follows."),
    "wins_but": ("{san} takes the {victim}, and the exchange on {to} favours {side}.",
                 "the {piece} takes the {victim} on {to}, an exchange that is good for {side} even after {reply}."),
    "trade": ("{san} trades {piece}s, since {other} can take back with {reply}.",
              "{side} exchanges {piece}s on {to}; {reply} takes back.",
              "an even trade: a {piece} for a {piece}, once {reply} is played."),
    "trade_unlike": ("{san} takes the {victim} on {to}, and after {reply} the exchange comes out even.",
                     "the {piece} takes the {victim}; with {reply} to come the exchange on {to} is even."),
    "gives_up": ("{san} takes the {victim}, but {reply} takes the {piece}, and the exchange on {to} loses material.",
                 "the {piece} takes a defended {victim}: after {reply} the exchange on {to} is bad for {side}.",
                 "{side} gives more than it gets on {to}: a {victim} is taken, but {reply} removes the {piece}."),
    "hangs_mover": ("the {piece} is not safe on {to}: {reply} wins {spoils}.",
                    "on {to} the {piece} can be taken by the {hunter}, and {reply} wins {spoils}.",
                    "{other} can answer {reply}, which wins {spoils}."),
    "hangs_loose": ("the {target} is left undefended, and {reply} wins {spoils}.",
                    "nothing defends the {target}: {reply} wins {spoils}.",
                    "{side} forgets the {target}, which {other} can take for free with {reply}."),
    "hangs": ("the {target} is in danger: {reply} wins {spoils}.",
              "the {hunter} attacks the {target}, and {reply} wins {spoils}.",
              "{other} can now play {reply} and win {spoils}."),
    "hangs_mover_but": ("the {hunter} can take the {piece} on {to}, and the exchange there favours {other}.",
                        "on {to} the {piece} can be taken: {reply}."),
    "hangs_loose_but": ("nothing defends the {target}, and {reply} can take it.",
                        "the {target} is loose, and the {hunter} attacks it."),
    "hangs_but": ("the {hunter} attacks the {target}, and the exchange on {there} favours {other}.",
                  "the {target} needs care: {reply} is possible."),
    "missed_loose": ("{best} was better: the {target} is undefended, and taking it wins {spoils}.",
                     "{side} missed the undefended {target}; {best} wins {spoils}."),
    "missed": ("{best} was better, since it wins {spoils}.", "{side} missed {best}, which wins {spoils}."),
    "double_check": ("{san} is double check, from the {piece} and the {checker}, so the king must move.",),
    "discovered_check": ("the {piece} steps aside, and the {checker} gives a discovered check.",
                         "{san} uncovers a check from the {checker} to the king on {king}."),
    "check": ("{san} checks the king on {king}.", "the {piece} gives check from {to}.",
              "{side} checks the king on {king} and {other} must answer it."),
    "only_reply": ("{reply} is the only legal answer.", "{other} has just one legal reply, {reply}."),
    "king_must_move": ("only a king move gets out of it.", "{other} has to move the king."),
    "fork": ("the {piece} forks {targets}.", "it is a fork: the {piece} on {to} attacks {targets}.",
             "from {to} the {piece} attacks {targets} at once, a fork."),
    "threat": ("it attacks the {target}, which is worth more than the {piece}.",
               "the {target} has to react: the {piece} that attacks it is worth less.",
               "the {target} is under attack from the cheaper {piece}."),
    "threat_loose": ("it attacks the {target}, which is undefended.",
                     "the {piece} hits the undefended {target}.", "now the {target} is attacked and has no defender."),
    "hits_pawn": ("it attacks the {target}, which nothing defends.",
                  "the {piece} eyes the {target}, which has no defender."),
    "pressure": ("the {target} is now attacked {attacked} and defended {defended}.",
                 "it adds to the pressure on the {target}, attacked {attacked} and defended {defended}."),
    "pin": ("it pins the {front} to the {back}.", "the {front} is now pinned to the {back}."),
    "skewer": ("it skewers the {front}: behind it stands the {back}.",
               "a skewer: when the {front} moves, the {back} is next in line."),
    "discovered_attack": ("moving the {piece} away opens the {slider}, which now attacks the {target}.",
                          "a discovered attack: the {slider} now hits the {target}."),
    "evade_king": ("the king steps out of check.", "{side} answers the check by moving the king to {to}."),
    "evade_block": ("{san} blocks the check.", "the {piece} comes between and blocks the check."),
    "evade_take": ("it also ends the check.", "that deals with the check too."),
    "rescue": ("the {piece} was attacked by the {hunter} and moves to safety on {to}.",
               "{side} saves the {piece}, which the {hunter} was attacking.",
               "a needed retreat from the {hunter}: on {to} the {piece} is safe."),
    "guards": ("it protects the {target}, which could have been taken.",
               "it now guards the {target}, which was loose."),
    "castles": ("{side} castles {wing}: the king is tucked away and the rook comes to {rook}.",
                "castling {wing} brings the king to {to} and the rook to {rook}.",
                "the king goes to {to} and the rook joins the game on {rook}."),
    "no_castling": ("{side} gives up the right to castle.", "after this king move {side} can no longer castle."),
    "fianchetto": ("the bishop goes to {to}, the fianchetto, where it rules the long diagonal.",
                   "{side} fianchettoes the bishop on {to}, looking down the long diagonal."),
    "develops_centre": ("the {piece} develops to {to} and bears on {centre}.",
                        "{side} develops the {piece}, which from {to} watches {centre}.",
                        "a developing move: the {piece} on {to} covers {centre}."),
    "develops": ("the {piece} develops to {to}.", "{side} brings out the {piece} to {to}.",
                 "another piece comes out: the {piece} goes to {to}."),
    "outpost": ("on {to} the {piece} has an outpost: the pawn on {guard} supports it and no pawn can drive it away.",),
    "rim": ("a knight on the rim reaches {count} squares at most.",
            "at the edge of the board the knight covers only {count} squares."),
    "open_file": ("the rook takes the {file}-file, which has no pawns on it.",
                  "the rook moves to the open {file}-file."),
    "half_open_file": ("the rook goes to the {file}-file, where {side} has no pawn in its way.",
                       "the rook uses the half-open {file}-file."),
    "seventh": ("the rook has reached the seventh rank.", "on the seventh rank the rook is at its most active."),
    "king_walk": ("with the queens gone the king walks toward the centre.",
                  "the queens are off, so the king can come toward the centre."),
    "centre": ("the pawn takes its share of the centre and guards {guarded}.",
               "{side} puts a pawn in the centre, where it controls {guarded}.",
               "a central pawn move: from {to} the pawn covers {guarded}."),
    "passed_new": ("the pawn on {to} is passed: no enemy pawn can stop it, and it is {steps} step{s} from queening.",
                   "{side} has a passed pawn on {to}, {steps} step{s} from the last rank."),
    "passed_push": ("the passed pawn advances to {to}, {steps} step{s} from queening.",
                    "{side} pushes the passed pawn; {steps} more step{s} and it queens."),
    "doubled": ("the price is doubled pawns on the {file}-file.", "it leaves doubled pawns on the {file}-file."),
    "frees_bishop": ("this opens a way out for the bishop on {square}.",
                     "the bishop on {square} can move now."),
    "luft": ("it gives the king on {king} some air.", "the king on {king} gets {square} as a way out."),
    "pawn_step": ("the pawn goes to {to} and guards {guarded}.", "a quiet pawn move that covers {guarded}.",
                  "{side} advances the pawn to {to}, where it guards {guarded}."),
    "king_step": ("the king moves from {from} to {to}.", "{side} moves the king to {to}."),
    "wider": ("from {to} the {piece} reaches {new} square{s}, against {old} from {from}.",
              "the {piece} is more active on {to}: {new} square{s} instead of {old}."),
    "narrower": ("the {piece} is less active on {to}: {new} square{s} instead of {old}.",
                 "on {to} the {piece} reaches {new} square{s}, where it had {old}."),
    "same_reach": ("the {piece} moves from {from} to {to} and reaches {new} square{s}, as before.",),
    "opening": ("this is the {name}.", "the position is known as the {name}."),
    "can_castle": ("{side} is ready to castle.", "now {side} can castle."),
    "level": ("material is level.", "neither side is ahead in material."),
    "ahead": ("{leader} is {points} {unit} ahead in material.", "in material {leader} leads by {points} {unit}.",
              "the count of material: {leader} is {points} {unit} up."),
    "loose": ("keep an eye on the {target}, which nothing defends.", "note that the {target} has no defender."),
    "undeveloped": ("{side} still has {count} minor piece{s} at home.",
                    "{count} minor piece{s} of {side} still wait{verb} to be developed."),
}
FORUM = {
    "mate": ("lol {san} is just checkmate. gg", "and thats checkmate, {san} ends it"),
    "stalemate": ("nooo {san} is stalemate, thats a draw",),
    "missed_mate": ("bro {best} was checkmate right there", "you missed {best} mate"),
    "allows_mate": ("uh {reply} is checkmate now, ouch", "{other} just plays {reply} mate lol"),
    "mate_threat": ("careful, {threat} mate is the threat",),
    "promotion": ("new {new} on {to} haha", "pawn on {from} becomes a {new}, nice"),
    "takes_loose": ("free {victim} on {to}, nothing defends it", "{victim} on {to} was just sitting there undefended"),
    "takes_loose_but": ("grabs the undefended {victim} on {to}",),
    "wins": ("{san} wins {spoils}, {reply} doesnt fix it",),
    "trade": ("{piece} trade on {to}, {reply} takes back", "ok so {piece}s come off after {reply}"),
    "gives_up": ("hmm {reply} takes back and {side} loses material on {to}",),
    "hangs_mover": ("that {piece} on {to} just hangs, {reply} wins {spoils}", "{reply} and the {piece} is gone lol"),
    "hangs_loose": ("the {target} is hanging, {reply} wins {spoils}", "nobody defends the {target}... {reply}"),
    "hangs": ("{reply} wins {spoils} tho",),
    "hangs_loose_but": ("nothing defends the {target} btw, {reply}",),
    "missed_loose": ("why not {best}?? the {target} is free",),
    "missed": ("{best} wins {spoils} instead, just saying",),
    "check": ("{san} check!", "check on the {king} king"),
    "fork": ("fork!! {piece} hits {targets}", "haha the {piece} forks {targets}"),
    "pin": ("and the {front} is pinned to the {back} now",),
    "threat": ("{piece} attacks the {target} now",),
    "threat_loose": ("the {target} is attacked and has no defender fwiw",),
    "castles": ("castled {wing}, king is safer on {to} imo", "ok castles {wing}, rook on {rook}"),
    "develops_centre": ("{piece} out to {to}, looks at {centre}", "normal developing move, {piece} to {to}"),
    "develops": ("{piece} comes out to {to}, fine",),
    "centre": ("pawn in the center, guards {guarded}", "{san} grabs some center, hits {guarded}"),
    "passed_new": ("passed pawn on {to} btw",),
    "passed_push": ("passer goes to {to}, {steps} to go",),
    "rescue": ("{piece} had to move, the {hunter} was on it",),
    "opening": ("{name}, classic",),
    "wider": ("{piece} gets {new} square{s} instead of {old}, better",),
    "narrower": ("{piece} only has {new} squares there, had {old} before",),
    "same_reach": ("{piece} to {to}, not much changes",),
    "pawn_step": ("just a pawn move, guards {guarded}",),
    "king_step": ("king goes to {to} i guess",),
    "ahead": ("{leader} is up {points} btw",),
    "level": ("material is even",),
}
# Facts that say the same thing twice: of each group the weightiest is kept.
GROUPS = (("check", "fork"), ("fork", "threat", "threat_loose", "hits_pawn", "pressure", "pin", "skewer"),
          ("hangs_mover", "hangs_loose", "hangs", "hangs_mover_but", "hangs_loose_but", "hangs_but",
           "allows_mate"), ("missed", "missed_loose", "missed_mate"),
          ("develops", "develops_centre", "fianchetto", "rescue", "wider", "narrower", "same_reach", "open_file",
           "half_open_file", "rim"),
          ("centre", "pawn_step", "passed_new", "passed_push", "evade_block", "rescue"), ("level", "ahead"),
          ("king_step", "king_walk", "evade_king", "rescue"), ("only_reply", "king_must_move", "double_check"))
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
    """At most `num` facts in speaking order, one at least about what the move does; a tail only now and then."""
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
    """The same facts in the tone of a message board: no capitals, no full stops."""
    known = without_repeats([fact for fact in facts if fact.kind in FORUM])[:2]
    parts = [rng.choice(FORUM[fact.kind]).format(**{**play.names(), **fact.words}) for fact in known]
    return re.sub(r"\ba (?=[aeiou])", "an ", rng.choice((". ", "... ", ", ")).join(parts))


def engine_line(play: Play) -> str:
    """A terse line of counts."""
    gain = play.replies[0][0] if play.replies else 0
    best = f"{play.after.san(play.replies[0][1])} ({gain:+d})" if play.replies else "none"
    return (f"{play.san} | material {balance(play.after):+d} | check {'yes' if play.after.is_check() else 'no'} | "
            f"replies {play.after.legal_moves.count()} | best capture {best}")


def thought(play: Play) -> str:
    """A short line of reasoning, each step true: what moves, who attacks and guards it, what can be taken next."""
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
    """Knights, bishops, rooks and queens that no piece of their own guards."""
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
    verdict = "level" if not balance(play.after) else f"{words['leader']} is {words['points']} {words['unit']} ahead"
    return f"Counting pawn 1, knight and bishop 3, rook 5, queen 9: White {sums[0]}, Black {sums[1]}, so {verdict}."


FOLLOW_UPS = (("Which pieces are undefended now?", answer_undefended),
              ("What should I watch for next?", answer_watch),
              ("Who is ahead in material?", answer_material))


def label(board: chess.Board) -> str:
    """`12. ` or `12... `, the number of the move about to be played."""
    return f"{board.fullmove_number}{'.' if board.turn else '...'} "
