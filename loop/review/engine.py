"""Asks Stockfish about a move, always with the same answer, and runs the checks that need it.
Needs python-chess and the program `stockfish` (Debian: apt-get install stockfish). Some 40 MiB; half a second a move."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import chess
import chess.engine

from loop.review.comment import Comment, Flag
from loop.review.strength import Verdict, false_best, false_mistake, false_only, false_winning

NODES, HASH_MIB = 200_000, 16
MATE_CP = 10_000
PLIES = 8                       # of the best line
DEBIAN = "/usr/games"           # where Debian puts it; root's PATH often leaves this folder out

EngineCheck = Callable[[Comment, Verdict], Iterator[Flag]]
ENGINE_CHECKS: dict[str, EngineCheck] = {
    check.__name__: check for check in (false_best, false_only, false_mistake, false_winning)}


def find_stockfish() -> str | None:
    return shutil.which("stockfish", path=os.pathsep.join((os.environ.get("PATH", ""), DEBIAN)))


def left_out() -> str:
    """What to say where Stockfish is missing."""
    return (f"Stockfish is not on the PATH, so these checks are left out: {', '.join(ENGINE_CHECKS)}. "
            "On Debian: apt-get install stockfish")


class Stockfish:
    """A running Stockfish; the same position, move and number of nodes give the same verdict.

    That is so because it searches with one thread, empties its memory before each search and counts nodes, not time.
    Another version or another network may judge differently; `name` says which one it is.

    Args:
        nodes: positions searched for each of the two searches of a verdict.
        path: of the program; found on the PATH if left out.

    Raises:
        ValueError: if there is no such program.
    """

    def __init__(self, nodes: int = NODES, path: str | None = None) -> None:
        found = path or find_stockfish()
        if found is None:
            raise ValueError(left_out())
        self.nodes = nodes
        self.process = chess.engine.SimpleEngine.popen_uci(found, timeout=60)
        self.process.configure({"Threads": 1, "Hash": HASH_MIB})
        self.name = self.process.id.get("name", "unknown")

    def __enter__(self) -> Stockfish:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.quit()

    def search(self, board: chess.Board, moves: list[chess.Move]) -> chess.engine.InfoDict:
        """Looks for the best of `moves`."""
        # a new object for `game` makes python-chess send ucinewgame, which empties the hash
        return self.process.analyse(board, chess.engine.Limit(nodes=self.nodes), game=object(), root_moves=moves)

    def verdict(self, board: chess.Board, move: chess.Move) -> Verdict:
        """Compares the move with the best of all other moves, each by a search of its own."""
        searched = [self.search(board, moves) for moves in
                    ([move], [other for other in board.legal_moves if other != move]) if moves]
        scores = [info["score"].pov(board.turn) for info in searched]
        best = scores.index(max(scores))    # the move itself, if another one is as good
        line = searched[best]["pv"]
        chances = [score.wdl(model="lichess").expectation() for score in scores]    # a formula of its own, not Stockfish's
        return Verdict(line[0], board.variation_san(line[:PLIES]), chances[best], chances[0], max(chances[1:], default=None),
                       *(scores[which].score(mate_score=MATE_CP) for which in (best, 0)))


def judge_strength(comment: Comment, verdict: Verdict) -> list[Flag]:
    """All flags of the checks that need an engine."""
    return sorted((flag for check in ENGINE_CHECKS.values() for flag in check(comment, verdict)),
                  key=lambda flag: (flag.start, flag.check))
