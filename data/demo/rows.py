"""Turns played moves into chat rows: the prompts, the share of each source, thoughts and follow-up questions.
Needs python-chess. Rows are made one at a time; only the positions already used are kept in memory."""

import random
from collections.abc import Iterator
from typing import Any

import chess

from data.demo.comments import FOLLOW_UPS, comment, engine_line, forum_comment, label, thought
from data.demo.exchange import VALUE
from data.demo.facts import facts_of
from data.demo.games import play_game
from data.demo.play import Fact, Play, listed, material_balance

JsonRow = dict[str, Any]

SOURCES = ("textbook",) * 16 + ("forum",) * 2 + ("engine",) * 2     # of every twenty rows, shuffled
THINK_SHARE, FOLLOW_UP_SHARE = 0.25, 0.06
SYSTEM_SHORT = "You are a chess coach. Comment on the move."
SYSTEM_LONG = ("You are a chess coach. Comment on the move that was played: the idea behind it, what it gains or gives "
               "away, and what was better. Then go through the moves before it. Be concrete.")
LONG_MIN_PLY = 24               # a long row tells the moves before its own
LONG_MEAN_CHARS, LONG_SPREAD_CHARS = 4_860, 750     # prompt and answer; 1,000 characters are some 365 Qwen3 tokens


class Game:
    """A played game with its plays and comments, each computed when first needed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.moves = play_game(rng)
        self.boards = [chess.Board()]
        for move in self.moves:
            after = self.boards[-1].copy()
            after.push(move)
            self.boards.append(after)
        self.sans = [board.san(move) for board, move in zip(self.boards, self.moves)]
        self.found: dict[int, tuple[Play, list[Fact]]] = {}
        self.lines: dict[int, str] = {}

    def look(self, ply: int) -> tuple[Play, list[Fact]]:
        if ply not in self.found:
            play = Play(self.boards[ply], self.moves[ply])
            self.found[ply] = play, facts_of(play)
        return self.found[ply]

    def line(self, ply: int) -> str:
        """`12... Nf6: ` and a comment of one to three sentences."""
        if ply not in self.lines:
            play, facts = self.look(ply)
            self.lines[ply] = f"{label(self.boards[ply])}{self.sans[ply]}: {comment(play, facts, self.rng, num=3)}"
        return self.lines[ply]


def worth_a_row(game: Game, ply: int, long: bool) -> bool:
    """Chooses at random, but skips most lopsided positions and many moves of which little can be said."""
    board = game.boards[ply]
    if long and ply < LONG_MIN_PLY:
        return False
    chance = (0.9 if long else 0.35) * (0.3 if ply < 4 else 1.0) * (0.2 if abs(material_balance(board)) > 8 else 1.0)
    if game.rng.random() >= chance:
        return False
    return game.look(ply)[1][0].weight >= 20 or game.rng.random() < 0.5


def short_prompt(game: Game, ply: int) -> str:
    board = game.boards[ply]
    return f"FEN: {board.fen()}\n{'White' if board.turn else 'Black'} plays {label(board)}{game.sans[ply]}"


def diagram(board: chess.Board) -> str:
    rows = str(board).splitlines()
    return "\n".join(["  a b c d e f g h"] + [f"{8 - i} {row}" for i, row in enumerate(rows)])


def contacts(board: chess.Board) -> str:
    """One line for each attacked piece: from which squares it is attacked and guarded."""
    lines = []
    for square, piece in sorted(board.piece_map().items()):
        hunters = board.attackers(not piece.color, square)
        if hunters:
            guards = board.attackers(piece.color, square)
            lines.append(f"{piece.symbol()}{chess.square_name(square)}: attacked from {places(hunters)}, "
                         f"{'guarded from ' + places(guards) if guards else 'not guarded'}")
    return "\n".join(lines) or "none"


def places(squares: chess.SquareSet) -> str:
    return " ".join(chess.square_name(square) for square in squares)


def material(board: chess.Board) -> str:
    sides = []
    for name, color in (("White", chess.WHITE), ("Black", chess.BLACK)):
        counts = [(len(board.pieces(kind, color)), chess.piece_name(kind)) for kind in VALUE if kind != chess.KING]
        parts = [f"{num} {word}{'s' if num > 1 else ''}" for num, word in reversed(counts) if num]
        sides.append(f"{name} {listed(parts) if parts else 'bare king'}")
    return "; ".join(sides)


def long_prompt(game: Game, ply: int) -> str:
    board = game.boards[ply]
    numbered = " ".join(f"{i // 2 + 1}. {san}" if i % 2 == 0 else san for i, san in enumerate(game.sans[:ply]))
    legal = " ".join(board.san(move) for move in board.legal_moves)
    return (f"Board before the move:\n{diagram(board)}\nFEN: {board.fen()}\nGame so far: {numbered}\n"
            f"Material: {material(board)}\nLegal moves: {legal}\nAttacked pieces:\n{contacts(board)}\n"
            f"{'White' if board.turn else 'Black'} plays {label(board)}{game.sans[ply]}\n\nExplain this move.")


def long_answer(game: Game, ply: int, first: str, room: int) -> str:
    """The comment, then the moves before it, newest first, while they fit into `room` characters."""
    lines, used = [], len(first)
    for earlier in range(ply - 1, -1, -1):
        line = game.line(earlier)
        used += len(line) + 1
        if used > room:
            break
        lines.append(line)
    return first + ("\n\nThe moves before it:\n" + "\n".join(lines) if lines else "")


def make_row(game: Game, ply: int, source: str, long: bool) -> JsonRow:
    rng = game.rng
    play, facts = game.look(ply)
    prompt = long_prompt(game, ply) if long else short_prompt(game, ply)
    thinks = source == "textbook" and rng.random() < THINK_SHARE
    follows = source == "textbook" and rng.random() < FOLLOW_UP_SHARE
    if source == "forum":
        answer = forum_comment(play, facts, rng)
    elif source == "engine":
        answer = engine_line(play)
    else:
        answer = comment(play, facts, rng)
    thoughts = f"<think>\n{thought(play)}\n</think>\n\n" if thinks else ""
    if long:
        chars = LONG_MEAN_CHARS + int(LONG_SPREAD_CHARS * (rng.random() + rng.random() - 1))
        answer = long_answer(game, ply, answer, chars - len(prompt) - len(thoughts))
    messages = [{"role": "system", "content": SYSTEM_LONG if long else SYSTEM_SHORT},
                {"role": "user", "content": prompt}, {"role": "assistant", "content": thoughts + answer}]
    if follows:
        question, reply = rng.choice(FOLLOW_UPS)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply(play)}]
    return {"messages": messages,
            "metadata": {"source": source, "fen": game.boards[ply].fen(), "move_uci": game.moves[ply].uci()}}


def position(board: chess.Board) -> str:
    """The FEN without its move counters."""
    return " ".join(board.fen().split()[:4])


def make_rows(num_rows: int, seed: str, long: bool, used: set[str]) -> Iterator[JsonRow]:
    """`num_rows` rows from as many games as they need; skips positions in `used` and adds the rows' own to them.

    Each seed plays games of its own, so rows made from two seeds share no game.
    """
    num_made = game_number = 0
    deal = random.Random(f"{seed}/sources")
    hand: list[str] = []
    while num_made < num_rows:
        game = Game(random.Random(f"{seed}/{game_number}"))
        game_number += 1
        for ply in range(len(game.moves)):
            where = position(game.boards[ply])
            if num_made == num_rows or where in used or not worth_a_row(game, ply, long):
                continue
            if not hand:
                hand = deal.sample(SOURCES, len(SOURCES))
            used.add(where)
            yield make_row(game, ply, hand.pop(), long)
            num_made += 1
