"""Games for the demo's rows: a named opening line, then moves by a cheap heuristic with some noise and blunders.
Needs python-chess. A game is a list of legal moves; about half a millisecond a move, a few kilobytes."""

import random
from functools import lru_cache

import chess

from data.demo.exchange import VALUE, exchange, taken_value, value_at

# name | the moves that reach it | one usual continuation
OPENINGS = """
Italian Game | e4 e5 Nf3 Nc6 Bc4 | Bc5 c3 Nf6 d3 d6 O-O O-O
Two Knights Defence | e4 e5 Nf3 Nc6 Bc4 Nf6 | d3 Be7 O-O O-O Re1 d6
Ruy Lopez | e4 e5 Nf3 Nc6 Bb5 | a6 Ba4 Nf6 O-O Be7 Re1 b5 Bb3 d6
Berlin Defence | e4 e5 Nf3 Nc6 Bb5 Nf6 | O-O Nxe4 Re1 Nd6 Nxe5 Be7
Scotch Game | e4 e5 Nf3 Nc6 d4 | exd4 Nxd4 Nf6 Nxc6 bxc6
Four Knights Game | e4 e5 Nf3 Nc6 Nc3 Nf6 | Bb5 Bb4 O-O O-O d3 d6
Vienna Game | e4 e5 Nc3 | Nf6 f4 d5 fxe5 Nxe4
King's Gambit | e4 e5 f4 | exf4 Nf3 d6 d4 g5
Petroff Defence | e4 e5 Nf3 Nf6 | Nxe5 d6 Nf3 Nxe4 d4 d5 Bd3
Philidor Defence | e4 e5 Nf3 d6 | d4 exd4 Nxd4 Nf6 Nc3 Be7
Open Sicilian | e4 c5 Nf3 d6 d4 | cxd4 Nxd4 Nf6 Nc3 a6 Be2 e5
Sicilian Dragon | e4 c5 Nf3 d6 d4 cxd4 Nxd4 Nf6 Nc3 g6 | Be3 Bg7 f3 O-O Qd2 Nc6
Closed Sicilian | e4 c5 Nc3 Nc6 g3 | g6 Bg2 Bg7 d3 d6
Alapin Sicilian | e4 c5 c3 | d5 exd5 Qxd5 d4 Nf6 Nf3 e6
French Defence | e4 e6 | d4 d5 Nc3 Nf6 Bg5 Be7 e5 Nfd7
French Exchange | e4 e6 d4 d5 exd5 | exd5 Nf3 Nf6 Bd3 Bd6 O-O O-O
French Advance | e4 e6 d4 d5 e5 | c5 c3 Nc6 Nf3 Qb6
Caro-Kann Defence | e4 c6 | d4 d5 Nc3 dxe4 Nxe4 Bf5 Ng3 Bg6
Caro-Kann Advance | e4 c6 d4 d5 e5 | Bf5 Nf3 e6 Be2 c5
Scandinavian Defence | e4 d5 | exd5 Qxd5 Nc3 Qa5 d4 Nf6 Nf3 c6
Pirc Defence | e4 d6 d4 Nf6 Nc3 g6 | Nf3 Bg7 Be2 O-O O-O
Alekhine Defence | e4 Nf6 | e5 Nd5 d4 d6 Nf3 Bg4
Queen's Gambit | d4 d5 c4 | e6 Nc3 Nf6 Bg5 Be7 e3 O-O Nf3
Queen's Gambit Accepted | d4 d5 c4 dxc4 | Nf3 Nf6 e3 e6 Bxc4 c5 O-O
Slav Defence | d4 d5 c4 c6 | Nf3 Nf6 Nc3 dxc4 a4 Bf5
Nimzo-Indian Defence | d4 Nf6 c4 e6 Nc3 Bb4 | e3 O-O Bd3 d5 Nf3 c5
Queen's Indian Defence | d4 Nf6 c4 e6 Nf3 b6 | g3 Bb7 Bg2 Be7 O-O O-O
King's Indian Defence | d4 Nf6 c4 g6 Nc3 Bg7 e4 d6 | Nf3 O-O Be2 e5 O-O
Grünfeld Defence | d4 Nf6 c4 g6 Nc3 d5 | cxd5 Nxd5 e4 Nxc3 bxc3 Bg7
Catalan Opening | d4 Nf6 c4 e6 g3 | d5 Bg2 Be7 Nf3 O-O O-O
London System | d4 d5 Nf3 Nf6 Bf4 | e6 e3 Bd6 Bg3 O-O Bd3 c5 c3
Dutch Defence | d4 f5 | g3 Nf6 Bg2 e6 Nf3 Be7 O-O O-O
English Opening | c4 | e5 Nc3 Nf6 Nf3 Nc6 g3 Bb4
Symmetrical English | c4 c5 | Nc3 Nc6 g3 g6 Bg2 Bg7
Réti Opening | Nf3 d5 c4 | e6 g3 Nf6 Bg2 Be7 O-O O-O
"""
CENTRE = {chess.D4, chess.E4, chess.D5, chess.E5}


@lru_cache(maxsize=1)
def opening_lines() -> list[tuple[str, list[chess.Move], int]]:
    """(name, moves with their usual continuation, how many of these moves reach the opening)"""
    lines = []
    for text in OPENINGS.strip().splitlines():
        name, reach, rest = (part.strip() for part in text.split("|"))
        board = chess.Board()
        moves = [board.push_san(san) for san in (reach + " " + rest).split()]
        lines.append((name, moves, len(reach.split())))
    return lines


@lru_cache(maxsize=1)
def opening_names() -> dict[str, str]:
    """Position (as board.epd()) -> the name of its opening."""
    names = {}
    for name, moves, num_reach in opening_lines():
        board = chess.Board()
        for move in moves[:num_reach]:
            board.push(move)
        names[board.epd()] = name
    return names


def placement_score(board: chess.Board, move: chess.Move, piece_type: int, endgame: bool) -> float:
    """Rules of thumb: develop, castle, take the centre, push passed pawns, keep the king home until the endgame."""
    us, start, to = board.turn, move.from_square, move.to_square
    rank = chess.square_rank(to) if us else 7 - chess.square_rank(to)
    from_home = chess.square_rank(start) == (0 if us else 7)
    if piece_type == chess.PAWN:
        centre = 0.8 if to in CENTRE else 0.0
        return centre + (0.12 * rank * rank if endgame else 0.0) - (0.3 if chess.square_file(to) in (0, 7) else 0.0)
    if piece_type == chess.KING:
        if board.is_castling(move):
            return 1.8
        return 0.4 - 0.2 * abs(chess.square_file(to) - 3.5) + 0.1 * rank if endgame else -1.0
    if piece_type in (chess.KNIGHT, chess.BISHOP):
        rim = -0.6 if piece_type == chess.KNIGHT and chess.square_file(to) in (0, 7) else 0.0
        return rim + (1.0 if from_home and rank > 0 else 0.1 * rank)
    if piece_type == chess.QUEEN and board.fullmove_number < 9:
        return -0.5
    open_file = not board.pawns & chess.BB_FILES[chess.square_file(to)]
    return 0.5 if piece_type == chess.ROOK and open_file else 0.1


def risk(board: chess.Board, move: chess.Move, piece_type: int) -> float:
    """What the moved piece stands to lose where it lands, by counting attackers and defenders only."""
    attackers = board.attackers(not board.turn, move.to_square)
    if not attackers:
        return 0.0
    cheapest = min(VALUE[board.piece_type_at(square) or 6] or 99 for square in attackers)
    defended = len(board.attackers(board.turn, move.to_square)) > (1 if piece_type != chess.PAWN else 0)
    return VALUE[piece_type] if not defended else max(0, VALUE[piece_type] - cheapest)


def score(board: chess.Board, move: chess.Move, endgame: bool, hanging: dict[int, float]) -> float:
    piece_type = board.piece_type_at(move.from_square) or chess.PAWN
    total = placement_score(board, move, piece_type, endgame) + 0.9 * hanging.get(move.from_square, 0.0)
    if board.is_capture(move):
        total += exchange(board, move) + 0.2
    else:
        total -= risk(board, move, piece_type)
        total += VALUE[move.promotion] - 1 if move.promotion else 0
    if board.gives_check(move):
        board.push(move)
        total += 100.0 if board.is_checkmate() else 0.3
        board.pop()
    last = board.move_stack[-2] if len(board.move_stack) > 1 else None
    if last and last.to_square == move.from_square:
        total -= 1.2 if last.from_square == move.to_square else 0.4
    return total


def loose_pieces(board: chess.Board) -> dict[int, float]:
    """Squares of our pieces that a cheaper piece attacks, or any piece if nothing defends them, with what is at stake."""
    us, found = board.turn, {}
    for square in chess.scan_forward(board.occupied_co[us] & ~board.kings):
        attackers = board.attackers(not us, square)
        if attackers:
            cheapest = min(value_at(board, attacker) or 99 for attacker in attackers)
            stake = value_at(board, square) - (cheapest if board.attackers_mask(us, square) else 0)
            if stake > 0:
                found[square] = float(stake)
    return found


def choose_move(board: chess.Board, rng: random.Random, noise: float, blunders: float) -> chess.Move | None:
    """The best move by rules of thumb, or the best of three that leaves nothing to take; now and then a random move."""
    moves = [move for move in board.legal_moves if move.promotion in (None, chess.QUEEN)]
    if not moves:
        return None
    if rng.random() < blunders:
        return rng.choice(moves)
    endgame = chess.popcount(board.occupied & ~board.pawns) <= 8
    hanging = loose_pieces(board)
    scored = [(score(board, move, endgame, hanging) + noise * rng.random(), move) for move in moves]
    scored.sort(key=lambda pair: -pair[0])
    if rng.random() < 0.3:
        return scored[0][1]
    for _, move in scored[:3]:
        if loses_nothing(board, move):
            return move
    return scored[0][1]


def loses_nothing(board: chess.Board, move: chess.Move) -> bool:
    limit = taken_value(board, move)
    board.push(move)
    fine = all(exchange(board, reply) <= limit for reply in board.generate_legal_captures())
    board.pop()
    return fine


def play_game(rng: random.Random, max_plies: int = 100) -> list[chess.Move]:
    """One game: the beginning of an opening line, then heuristic moves until the game ends or has `max_plies` moves."""
    _, line, num_reach = rng.choice(opening_lines())
    book = line[:rng.randint(min(num_reach, 3), len(line))]
    noise = {True: rng.choice((0.4, 0.8, 1.4)), False: rng.choice((0.4, 0.8, 1.4))}
    blunders = {True: rng.choice((0.01, 0.03, 0.08)), False: rng.choice((0.01, 0.03, 0.08))}
    board = chess.Board()
    for move in book:
        board.push(move)
    while len(board.move_stack) < max_plies and board.halfmove_clock < 30:
        chosen = choose_move(board, rng, noise[board.turn], blunders[board.turn])
        if chosen is None or board.is_insufficient_material():
            break
        board.push(chosen)
    return list(board.move_stack)
