"""What captures win: exchanges on one square, the best capture, mate in one; claims of the rows rest on these numbers.
Needs python-chess. Values are whole pawns: knight and bishop 3, rook 5, queen 9, king 0."""

from collections.abc import Callable, Iterator

import chess

VALUE = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9, chess.KING: 0}


def value_at(board: chess.Board, square: int) -> int:
    return VALUE[board.piece_type_at(square) or chess.KING]


def taken_value(board: chess.Board, move: chess.Move) -> int:
    """What `move` takes, plus what a promotion adds."""
    value = 1 if board.is_en_passant(move) else value_at(board, move.to_square)
    return value + (VALUE[move.promotion] - 1 if move.promotion else 0)


def retakes(board: chess.Board, square: int) -> list[chess.Move]:
    """Legal captures on `square`, the cheapest piece first, promotions to a queen only."""
    from_mask = board.attackers_mask(board.turn, square)
    if not from_mask:
        return []
    moves = board.generate_legal_moves(from_mask, chess.BB_SQUARES[square])
    found = [move for move in moves if move.promotion in (None, chess.QUEEN)]
    return sorted(found, key=lambda move: (value_at(board, move.from_square) or 99, move.from_square))


def exchange(board: chess.Board, move: chess.Move) -> int:
    """Static exchange: what `move` wins on its target square if both sides retake there as long as retaking pays.

    Every capture of the sequence is legal, so pinned defenders do not count.
    """
    won = taken_value(board, move)
    board.push(move)
    answers = retakes(board, move.to_square)
    lost = max(0, exchange(board, answers[0])) if answers else 0
    board.pop()
    return won - lost


def captures_by_gain(board: chess.Board) -> list[tuple[int, chess.Move]]:
    """All legal captures with what their exchange wins, the best first."""
    found = [(exchange(board, move), move) for move in board.generate_legal_captures()
             if move.promotion in (None, chess.QUEEN)]
    return sorted(found, key=lambda pair: (-pair[0], pair[1].uci()))


def may_check(board: chess.Board) -> Callable[[chess.Move], bool]:
    """A cheap test that every checking move passes: the piece lands where it reaches the king, or leaves a line to the king."""
    king, occupied = board.king(not board.turn) or 0, board.occupied
    diagonal = chess.BB_DIAG_ATTACKS[king][chess.BB_DIAG_MASKS[king] & occupied]
    straight = chess.BB_RANK_ATTACKS[king][chess.BB_RANK_MASKS[king] & occupied] \
        | chess.BB_FILE_ATTACKS[king][chess.BB_FILE_MASKS[king] & occupied]
    seen_from = {chess.PAWN: chess.BB_PAWN_ATTACKS[not board.turn][king], chess.KNIGHT: chess.BB_KNIGHT_ATTACKS[king],
                 chess.BISHOP: diagonal, chess.ROOK: straight, chess.QUEEN: diagonal | straight, chess.KING: 0}

    def test(move: chess.Move) -> bool:
        kind = board.piece_type_at(move.from_square) or chess.PAWN
        lands = seen_from[kind] & chess.BB_SQUARES[move.to_square]
        leaves = (diagonal | straight) & chess.BB_SQUARES[move.from_square]
        special = move.promotion or move.to_square == board.ep_square or kind == chess.KING and board.is_castling(move)
        return bool(lands or leaves or special)
    return test


def mate_in_one(board: chess.Board) -> chess.Move | None:
    maybe = may_check(board)
    for move in board.generate_legal_moves():
        if maybe(move):
            board.push(move)
            mated = board.is_checkmate()
            board.pop()
            if mated:
                return move
    return None


def best_gain(board: chess.Board) -> int:
    return max((exchange(board, move) for move in board.generate_legal_captures()), default=0)


def answer_gain(board: chess.Board) -> int:
    """What the side to move can still win by a capture; in check, what its best move wins less the best capture in reply."""
    if not board.is_check():
        return max(0, best_gain(board))
    best = -99
    for move in board.generate_legal_moves():
        won = taken_value(board, move)
        board.push(move)
        best = max(best, won - max(0, best_gain(board)))
        board.pop()
    return best


def net_gain(board: chess.Board, move: chess.Move) -> int:
    """What `move` wins, less what the opponent's best capture, promotion or check in reply wins after our answer."""
    won = taken_value(board, move)
    lost = 0
    board.push(move)
    maybe = may_check(board)
    for reply in board.generate_legal_moves():
        if board.is_capture(reply) or reply.promotion or maybe(reply) and board.gives_check(reply):
            taken = taken_value(board, reply)
            board.push(reply)
            lost = max(lost, taken - answer_gain(board))
            board.pop()
            if lost > won + 9:
                break
    board.pop()
    return won - lost


def winning_captures(board: chess.Board, at_least: int = 1) -> Iterator[tuple[int, bool, chess.Move]]:
    """(gain, sure, capture) for captures whose exchange wins material that no forcing reply wins back.

    `sure`: at least two pawns' worth, none of which is won back. A single pawn is often won back by quiet moves.
    """
    for gain, move in captures_by_gain(board):
        if gain < at_least:
            return
        net = net_gain(board, move)
        if net >= 1:
            yield gain, gain > 1 and net >= gain, move


def passed_turn(board: chess.Board) -> chess.Board | None:
    """The same position with the other side to move; None where that side could then take the king."""
    if board.is_check():
        return None
    other = board.copy(stack=False)
    other.push(chess.Move.null())
    return other
