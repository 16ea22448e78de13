"""Quiet facts about a move: openings, development, castling, files, pawns, squares in reach, material.
Needs python-chess. Well under a millisecond a move."""

from collections.abc import Iterator

import chess

from data.demo.exchange import retakes
from data.demo.games import CENTRE, opening_names
from data.demo.play import (
    EFFECT,
    HOMES,
    IDEA,
    NUMBERS,
    TAIL,
    WARNING,
    Fact,
    Play,
    ahead_words,
    is_passed,
    material_balance,
    named,
    squares,
)


def opening(play: Play) -> Iterator[Fact]:
    name = opening_names().get(play.after.epd())
    if name:
        yield Fact("opening", 60, EFFECT, {"name": name})


def pieces(play: Play) -> Iterator[Fact]:
    """Development, castling, open files and other good or bad places."""
    board, after, kind = play.board, play.after, play.piece_type
    rank = chess.square_rank(play.to) if play.us else 7 - chess.square_rank(play.to)
    from_rank = chess.square_rank(play.start) if play.us else 7 - chess.square_rank(play.start)
    file = chess.square_file(play.to)
    if board.is_castling(play.move):
        short = board.is_kingside_castling(play.move)
        rook = chess.square((5 if short else 3), 0 if play.us else 7)
        yield Fact("castles", 60, IDEA, {"wing": "kingside" if short else "queenside", "rook": chess.square_name(rook)})
        return
    if board.castling_rights & (chess.BB_RANK_1 if play.us else chess.BB_RANK_8) and kind == chess.KING:
        yield Fact("no_castling", 41, WARNING)
    if kind in (chess.KNIGHT, chess.BISHOP) and from_rank == 0 < rank and not play.is_capture:
        if chess.BB_SQUARES[play.start] & HOMES[kind]:
            centre = after.attacks_mask(play.to) & chess.SquareSet(CENTRE).mask
            if kind == chess.BISHOP and rank == 1 and file in (1, 6):
                yield Fact("fianchetto", 36)
            else:
                yield Fact("develops_centre" if centre else "develops", 35, IDEA,
                           {"centre": squares(centre) if centre else ""})
    if kind == chess.KNIGHT:
        yield from knights(play, rank, file)
    if kind == chess.ROOK and file != chess.square_file(play.start):
        if not after.pawns & chess.BB_FILES[file]:
            yield Fact("open_file", 34, IDEA, {"file": "abcdefgh"[file]})
        elif not after.pieces_mask(chess.PAWN, play.us) & chess.BB_FILES[file]:
            yield Fact("half_open_file", 32, IDEA, {"file": "abcdefgh"[file]})
    if kind == chess.ROOK and rank == 6 and from_rank != 6:
        yield Fact("seventh", 34, EFFECT)
    if kind == chess.KING and not after.queens and not board.is_check():
        if max(abs(2 * file - 7), abs(2 * rank - 7)) < max(abs(2 * chess.square_file(play.start) - 7),
                                                           abs(2 * from_rank - 7)):
            yield Fact("king_walk", 24)


def knights(play: Play, rank: int, file: int) -> Iterator[Fact]:
    if file in (0, 7):
        yield Fact("rim", 21, EFFECT, {"count": NUMBERS[chess.popcount(chess.BB_KNIGHT_ATTACKS[play.to])]})
    pawn_guard = play.after.attackers_mask(play.us, play.to) & play.after.pawns
    if rank in (3, 4, 5) and pawn_guard and 0 < file < 7 and play.safe:
        forward = range(chess.square_rank(play.to) + 1, 8) if play.us else range(chess.square_rank(play.to))
        enemy = play.after.pieces(chess.PAWN, play.them)
        if not any(chess.square(f, r) in enemy for f in (file - 1, file + 1) for r in forward):
            yield Fact("outpost", 40, EFFECT, {"guard": chess.square_name(chess.lsb(pawn_guard))})


def pawns(play: Play) -> Iterator[Fact]:
    if play.board.piece_type_at(play.start) != chess.PAWN or play.move.promotion:
        return
    board, after, file = play.board, play.after, chess.square_file(play.to)
    rank = chess.square_rank(play.to) if play.us else 7 - chess.square_rank(play.to)
    guarded = squares(after.attacks_mask(play.to))
    if play.to in CENTRE and not play.is_capture:
        yield Fact("centre", 36, IDEA, {"guarded": guarded})
    stays = not retakes(after, play.to) if play.is_capture else play.safe
    if stays and is_passed(after, play.to, play.us):
        kind = "passed_push" if is_passed(board, play.start, play.us) else "passed_new"
        yield Fact(kind, 40 + 2 * rank, EFFECT if play.is_capture else IDEA,
                   {"steps": NUMBERS[7 - rank], "s": "" if rank == 6 else "s"})
    own_file = chess.popcount(after.pieces_mask(chess.PAWN, play.us) & chess.BB_FILES[file])
    if play.is_capture and stays and own_file == 2:
        yield Fact("doubled", 28, WARNING, {"file": "abcdefgh"[file]})
    for square in chess.scan_forward(after.pieces_mask(chess.BISHOP, play.us)):
        free = ~after.occupied_co[play.us]
        if not board.attacks_mask(square) & ~board.occupied_co[play.us] and after.attacks_mask(square) & free:
            yield Fact("frees_bishop", 30, EFFECT, {"square": chess.square_name(square)})
            break
    king = after.king(play.us) or 0
    if not play.is_capture and chess.square_rank(king) == (0 if play.us else 7) and not board.is_check() and \
            chess.square_file(king) not in (3, 4, 5) and \
            len(flights(board, play.us)) <= 1 and play.start in flights(after, play.us):
        yield Fact("luft", 25, EFFECT, {"king": chess.square_name(king), "square": chess.square_name(play.start)})


def flights(board: chess.Board, color: chess.Color) -> list[int]:
    """Squares the king could step to."""
    around = chess.BB_KING_ATTACKS[board.king(color) or 0] & ~board.occupied_co[color]
    return [square for square in chess.scan_forward(around) if not board.attackers_mask(not color, square)]


def small_change(play: Play) -> Iterator[Fact]:
    """What can be said of any quiet move: which squares the piece guards or reaches."""
    kind = play.piece_type
    if kind == chess.PAWN and not play.is_capture:
        yield Fact("pawn_step", 12, IDEA, {"guarded": squares(play.after.attacks_mask(play.to))})
    elif kind == chess.KING and not play.board.is_castling(play.move) and not play.is_capture:
        yield Fact("king_step", 10)
    elif not play.is_capture and not play.move.promotion and not play.board.is_castling(play.move):
        old = chess.popcount(play.board.attacks_mask(play.start) & ~play.board.occupied_co[play.us])
        new = chess.popcount(play.after.attacks_mask(play.to) & ~play.after.occupied_co[play.us])
        name = "wider" if new > old else "narrower" if new < old else "same_reach"
        words = {"new": str(new), "old": str(old), "s": "" if new == 1 else "s"}
        yield Fact(name, 14 if new > old else 12, IDEA, words)


def tails(play: Play) -> Iterator[Fact]:
    """Remarks that fit at the end: material, loose pieces, development."""
    board, after = play.board, play.after
    if after.is_game_over():
        return
    yield Fact("ahead" if material_balance(after) else "level", 9, TAIL, ahead_words(after))
    kings, corners = after.kings, chess.BB_CORNERS
    for square in chess.scan_forward(after.occupied_co[play.us] & ~after.pawns & ~kings & ~corners):
        touched = after.attackers_mask(play.us, square) | after.attackers_mask(play.them, square)
        if square != play.to and not touched:
            yield Fact("loose", 8, TAIL, {"target": named(after, square)})
            break
    home = chess.BB_RANK_1 if play.us else chess.BB_RANK_8
    at_home = sum(chess.popcount(after.pieces_mask(kind, play.us) & home & HOMES[kind]) for kind in HOMES)
    if board.fullmove_number <= 12 and at_home:
        yield Fact("undeveloped", 7, TAIL, {"count": NUMBERS[at_home], "s": "" if at_home == 1 else "s",
                                            "verb": "s" if at_home == 1 else ""})
    if play.after_passed and any(play.after_passed.generate_castling_moves()) \
            and not any(board.generate_castling_moves()):
        yield Fact("can_castle", 29, EFFECT)
