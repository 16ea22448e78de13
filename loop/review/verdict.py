"""Counts votes and checks, and says whether they make a go by the rules that were fixed before; scipy computes the statistics.
A second for the checks of a hundred comments, and for scipy."""

from __future__ import annotations

import getpass
import json
import time
from collections import Counter
from itertools import combinations
from typing import Any

import chess
from scipy.stats import binomtest

from data.files import write_text
from loop.review.checks import BOARD_CHECKS
from loop.review.pairs import VERDICT, Pair, Review
from loop.review.seal import seal
from loop.review.strength import CLASS
from loop.review.votes import NO_WINNER, TAGS, Vote, Votes
from loop.review.words import VALUE

CALLED = {"base": "untuned", "tuned": "tuned", "rival": "second run", "reference": "reference"}
OPENING_MOVES, ENDGAME_POINTS = 12, 26  # an endgame: at most so many points of pieces on both sides, without pawns


def outcome(vote: Vote, first: str, second: str) -> int:
    """1 if the vote puts `first` above `second`, -1 below, 0 if it does not say: both are behind the one that was chosen."""
    for letter in (vote["best"], vote["second"]):
        if (system := vote["systems"].get(letter)) in (first, second):
            return 1 if system == first else -1
    return 0


def compared(votes: list[Vote], first: str, second: str) -> dict[str, Any]:
    """How often one system was better than another, with Wilson's 95 % interval of its share and the one-sided sign test."""
    counts = Counter(outcome(vote, first, second) for vote in votes)
    won, decided = counts[1], counts[1] + counts[-1]
    p = float(binomtest(won, decided, 0.5, alternative="greater").pvalue) if decided else 1.0
    return {"first": first, "second": second, "won": won, "lost": counts[-1], "even": counts[0], **share(won, decided), "p": p}


def share(number: int, of: int) -> dict[str, float]:
    """A share with Wilson's 95 % interval; of nothing it may be anything."""
    if not of:
        return {"share": 0.0, "low": 0.0, "high": 1.0}
    interval = binomtest(number, of).proportion_ci(method="wilson")
    return {"share": number / of, "low": float(interval.low), "high": float(interval.high)}


def phase(pair: Pair) -> str:
    board = pair.position[0]
    if board is None:
        return "no position"
    points = sum(VALUE[piece.piece_type] for piece in board.piece_map().values()
                 if piece.piece_type not in (chess.PAWN, chess.KING))
    if points <= ENDGAME_POINTS:
        return "endgame"
    return "opening" if board.fullmove_number <= OPENING_MOVES else "middlegame"


def classification(pair: Pair) -> str:
    return str((pair.row.get("metadata") or {}).get(CLASS, ""))


def is_wrong(pair: Pair, system: str) -> bool:
    return any(flag.check in BOARD_CHECKS for flag in pair.flags[system])


def checks_of(pairs: list[Pair], system: str) -> dict[str, Any]:
    """In how many comments of a system the checks find wrong facts, and how many comments each check flags."""
    wrong = sum(is_wrong(pair, system) for pair in pairs)
    flagged = Counter(check for pair in pairs for check in {flag.check for flag in pair.flags[system]})
    return {"comments": len(pairs), "wrong": wrong, **share(wrong, len(pairs)), "flagged": dict(sorted(flagged.items()))}


def judgement(review: Review, votes: Votes) -> dict[str, Any]:
    """The decision and all counts; the same for the same files."""
    pairs, rules = list(review.pairs.values()), review.rules
    standing = votes.standing
    by_pair = {pair.id: standing[pair.id] for pair in pairs if pair.id in standing}
    given = list(by_pair.values())
    systems = list(pairs[0].comments)
    checks = {system: checks_of(pairs, system) for system in systems}
    order = sorted(systems, key=["tuned", "rival", "base", "reference"].index)
    comparisons = [compared(given, first, second) for first, second in combinations(order, 2)]
    against_base = compared(given, "tuned", "base")
    most = checks["reference"]["share"] + rules.more_wrong

    def group(name: Any) -> dict[str, Any]:
        found: dict[str, list[Pair]] = {}
        for pair in pairs:
            found.setdefault(name(pair), []).append(pair)
        return {key: {**compared([by_pair[pair.id] for pair in some if pair.id in by_pair], "tuned", "base"),
                      "pairs": len(some), "wrong": {system: sum(is_wrong(pair, system) for pair in some) for system in systems}}
                for key, some in sorted(found.items()) if key}

    held = [
        {"rule": f"at least {rules.least_votes} votes", "found": f"{len(given)} of {len(pairs)} positions",
         "holds": len(given) >= rules.least_votes},
        {"rule": f"tuned better than untuned where one is better, exact one-sided sign test, p at most {rules.significance:g}",
         "found": f"{against_base['won']} better, {against_base['lost']} worse, {against_base['even']} even, "
                  f"p = {against_base['p']:.2g}", "holds": against_base["p"] <= rules.significance},
        {"rule": f"the checks find wrong facts in at most {most:.0%} of the tuned model's comments (the references' share plus "
                 f"{rules.more_wrong:.0%})", "found": f"in {checks['tuned']['share']:.0%}",
         "holds": checks["tuned"]["share"] <= most + 1e-9},
    ]
    tags = {system: dict.fromkeys(TAGS, 0) for system in systems}
    for vote in given:
        for letter, named in vote["tags"].items():
            for tag in named:
                tags[vote["systems"][letter]][tag] += 1
    unsaid = sum(vote["best"] not in NO_WINNER and not outcome(vote, "tuned", "base") for vote in given)
    return {"go": all(rule["holds"] for rule in held), "rules": held, "votes": len(given), "pairs": len(pairs),
            "again": sum(vote["again"] for vote in given), "unsaid": unsaid, "comparisons": comparisons, "checks": checks,
            "phases": group(phase), "classifications": group(classification), "tags": tags}


def conclude(review: Review, votes: Votes, reviewer: str | None) -> dict[str, Any]:
    """Computes the verdict and writes it with its seal."""
    judged = judgement(review, votes)
    judged["looks"] = votes.look(judged["votes"])
    verdict = {**judged, "reviewer": reviewer or getpass.getuser(), "date": time.strftime("%Y-%m-%d %H:%M:%S"),
               "systems": review.names, "seal": seal(review)}
    write_text(review.directory / VERDICT, json.dumps(verdict, ensure_ascii=False, indent=1) + "\n")
    return verdict


def as_lines(verdict: dict[str, Any]) -> list[str]:
    """The verdict in words: the decision, then what led to it."""
    lines = ["GO: all rules hold." if verdict["go"] else "NO GO: not all rules hold."]
    lines += [f"{'holds' if rule['holds'] else 'FAILS'}: {rule['rule']}: {rule['found']}" for rule in verdict["rules"]]
    if verdict["unsaid"]:
        lines.append(f"votes with neither tuned nor untuned as best or second best: {verdict['unsaid']}. They count as even.")
    for one in verdict["comparisons"]:
        lines.append(f"{CALLED[one['first']]} against {CALLED[one['second']]}: {one['won']} better, {one['lost']} worse, "
                     f"{one['even']} even; {one['share']:.0%} of those decided (95% interval: {one['low']:.0%} to "
                     f"{one['high']:.0%})")
    lines += [f"wrong facts of {CALLED[system]}: {one['wrong']} of {one['comments']} comments "
              f"(95% interval: {one['low']:.0%} to {one['high']:.0%})" for system, one in verdict["checks"].items()]
    if verdict["looks"]:
        lines.append(f"looks at the verdict before, after other numbers of votes: {verdict['looks']}. The sign test's level is "
                     "that of one look.")
    if verdict["again"]:
        lines.append(f"votes given again, after it was shown whose each comment is: {verdict['again']}. They are not blind.")
    return lines
