"""The votes of a review: checked, appended one by one, taken back, and which of them stand.
Holds all votes, some hundred bytes each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loop.review.lines import append_line, read_lines
from loop.review.pairs import Pair

TAGS = ("wrong fact", "illegal move", "vague", "contradicts the engine", "repeats", "cut off", "great")
NO_WINNER = ("tie", "bad")  # instead of a letter: equally good; none of them good enough
MOST_NOTE = 4000  # characters
Vote = dict[str, Any]


class Refused(ValueError):
    """A vote that is not counted, with what to say."""


class Votes:
    """Votes in votes.jsonl. The last vote of a pair stands unless it was taken back; each token counts once."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, read_lines(path)

    @property
    def standing(self) -> dict[str, Vote]:
        """The vote of each pair, the last one last."""
        votes: dict[str, Vote] = {}
        for line in self.lines:
            if "undo" in line:
                votes.pop(line["undo"], None)
            elif "pair" in line:
                votes.pop(line["pair"], None)
                votes[line["pair"]] = line
        return votes

    def add(self, pair: Pair, given: dict[str, Any]) -> Vote:
        """Appends a vote; a token that is there already, as after an answer that was lost, changes nothing.

        Raises:
            Refused: the vote is not valid, or the pair has a vote.
        """
        standing = self.standing.get(pair.id)
        token = given.get("token")
        if not isinstance(token, str) or not 16 <= len(token) <= 64:
            raise Refused("the vote has no token; load the page again")
        if standing and standing["token"] == token:
            return standing
        if standing:
            raise Refused("this position has a vote already, perhaps from another tab; undo (u) takes it back")
        if any(line.get("token") == token for line in self.lines):
            raise Refused("this vote was taken back, perhaps in another tab; load the page again")
        vote = {"pair": pair.id, "token": token, **checked(pair, given), "systems": pair.by_letter,
                "again": any(line.get("pair") == pair.id for line in self.lines), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.append(vote)
        return vote

    def undo(self, pair_id: str) -> Vote | None:
        """Takes the vote of a pair back, and returns it if there was one."""
        vote = self.standing.get(pair_id)
        if vote:
            self.append({"undo": pair_id, "time": time.strftime("%Y-%m-%d %H:%M:%S")})
        return vote

    def look(self, num_votes: int) -> int:
        """Writes down that the verdict was computed; returns after how many votes it was before, but for this number."""
        if num_votes not in self.looks:
            self.append({"look": num_votes})
        return len(self.looks) - 1

    @property
    def looks(self) -> list[int]:
        return [line["look"] for line in self.lines if "look" in line]

    def append(self, line: Vote) -> None:
        append_line(self.path, line)
        self.lines.append(line)


def checked(pair: Pair, given: dict[str, Any]) -> Vote:
    """The fields of a vote, each of which the page may send wrong."""
    best, second, tags, note = (given.get(key) for key in ("best", "second", "tags", "note"))
    letters = pair.by_letter
    if best not in (*letters, *NO_WINNER):
        raise Refused("choose the best comment, a tie, or all bad")
    if second is not None and (second not in letters or second == best or best in NO_WINNER):
        raise Refused("the second best must be another comment than the best")
    if not isinstance(tags, dict) or any(letter not in letters or not isinstance(named, list) or set(map(str, named)) - {*TAGS}
                                         for letter, named in tags.items()):
        raise Refused("there are tags that are not known; load the page again")
    if not isinstance(note, str) or len(note) > MOST_NOTE:
        raise Refused(f"the note is longer than {MOST_NOTE:,} characters")
    note = note.encode("utf-8", "replace").decode()  # half of a character, which no file can hold
    named_once = {letter: sorted(set(named)) for letter, named in tags.items()}
    return {"best": best, "second": second, "tags": named_once, "note": note}
