"""Asks Stockfish about a move, always with the same answer, and runs the checks that need it.
Needs python-chess and the program `stockfish` (Debian: apt-get install stockfish). Some 40 MiB; half a second a move."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import chess
import chess.engine

from loop.review.comment import Comment, Flag, pushed
from loop.review.strength import Verdict, false_best, false_mistake, false_only, false_winning

NODES, HASH_MIB = 200_000, 16
MATE_CP = 10_000
PLIES = 8                       # of the best line
DEBIAN = Path("/usr/games/stockfish")     # where Debian puts it; root's PATH often leaves this folder out

EngineCheck = Callable[[Comment, Verdict], Iterator[Flag]]
ENGINE_CHECKS: dict[str, EngineCheck] = {
    "false_best": false_best,
    "false_only": false_only,
    "false_mistake": false_mistake,
    "false_winning": false_winning,
}


def find_stockfish() -> str | None:
    return shutil.which("stockfish") or (str(DEBIAN) if DEBIAN.exists() else None)


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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.quit()

    def search(self, board: chess.Board, num_lines: int = 1) -> list[chess.engine.InfoDict]:
        # a new object for `game` makes python-chess send ucinewgame, which empties the hash
        return self.process.analyse(board, chess.engine.Limit(nodes=self.nodes), multipv=num_lines, game=object())

    def verdict(self, board: chess.Board, move: chess.Move) -> Verdict:
        """The two best moves in the position, and the position after the move, each by a search of its own."""
        us, after = board.turn, pushed(board, move)
        lines = [info for info in self.search(board, num_lines=2) if info.get("pv")]
        scores = {info["pv"][0]: info["score"].pov(us) for info in lines}
        line, played = lines[0]["pv"], ended(after, us)
        if played is None:
            reply = self.search(after)[0]
            played = reply["score"].pov(us)
            if played > scores[line[0]]:    # searched alone, the move turns out better than all others
                line = [move, *reply.get("pv", [])]
        before = played if line[0] == move else scores[line[0]]
        others = [chance(score) for other, score in scores.items() if other != move]
        return Verdict(line[0], board.variation_san(line[:PLIES]), chance(before), chance(played), max(others, default=None),
                       in_cp(before), in_cp(played))


def ended(board: chess.Board, color: chess.Color) -> chess.engine.Score | None:
    """The score of a game that is over, which is not searched."""
    if board.is_checkmate():
        return chess.engine.MateGiven if board.turn != color else -chess.engine.MateGiven
    return chess.engine.Cp(0) if board.is_stalemate() or board.is_insufficient_material() else None


def chance(score: chess.engine.Score) -> float:
    """Expected points from 0 to 1, by lichess' formula, which is the same for every version of Stockfish."""
    return score.wdl(model="lichess").expectation()


def in_cp(score: chess.engine.Score) -> int:
    return score.score(mate_score=MATE_CP)


def judge_strength(comment: Comment, verdict: Verdict) -> list[Flag]:
    """All flags of the checks that need an engine."""
    return sorted((flag for check in ENGINE_CHECKS.values() for flag in check(comment, verdict)),
                  key=lambda flag: (flag.start, flag.check))
