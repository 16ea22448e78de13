"""Breaks tiny runs at random for some minutes: each run is resumed until it ends, and compared with the uninterrupted one.

python -m tests.soak --minutes N [--seed S] [--case K] [--log FILE]

A case follows from its seed and number alone. It stands in the log as one line of JSON, and the line that repeats a failure is
printed. A case takes a few seconds.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests import faults

PIPELINE = ("--split", "3")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Setup:
    """A kind of run: its entry point, its ranks and its model."""

    name: str
    script: str
    ranks: int
    arguments: tuple = ()
    is_35b: bool = False


OFTEN = (2, 2, 1)  # the 35B takes longest
SETUPS = (
    Setup("dense on 1 rank", "train.py", 1),
    Setup("dense on 2 ranks", "train.py", 2),
    Setup("35B in 2 stages", "pipeline_train.py", 2, PIPELINE, is_35b=True),
)


def make_place(directory, setup):
    """A place for runs of a setup; its uninterrupted run is `whole`."""
    from model.tiny.write import write_tiny
    from tests.runs import Place

    common = {"train__max_steps": faults.STEPS, "checkpoint__every": 3, "eval__every": 4,
              "distributed": {"timeout_s": faults.TIMEOUT_S}}
    if setup.is_35b:
        place = Place(directory, partial(write_tiny, layout="fp8", num_hidden_layers=4), **common, model__base="nf4",
                      lora__target=list(TARGETS), train__learning_rate=0.003, train__rows_per_step=2)
    else:
        place = Place(directory, **common)
    place.whole = place.start("whole", *setup.arguments, ranks=setup.ranks, script=setup.script)
    assert place.whole.wait(faults.WAIT_S) == [0] * setup.ranks, place.whole.said
    return place


class Soak:
    """Cases of one seed.

    Args:
        directory: for all files of the runs.
        seed: decides, with a case's number, what the case does.
        log: file to which a line of JSON is appended for each case.
    """

    def __init__(self, directory, seed, log):
        self.directory, self.seed, self.log, self.places = Path(directory), seed, Path(log), {}

    def place(self, setup):
        if setup.name not in self.places:
            self.places[setup.name] = make_place(self.directory / setup.name.replace(" ", "-"), setup)
        return self.places[setup.name]

    def case(self, number):
        """Runs one case; returns what is wrong, one sentence each."""
        rng = random.Random(f"{self.seed}/{number}")
        setup = rng.choices(SETUPS, OFTEN)[0]
        names = [rng.choice(sorted(faults.WHILE_RUNNING)), *rng.choices(sorted(faults.ALL), k=rng.randrange(3))]
        place, started = self.place(setup), time.monotonic()
        case = faults.Case(place, setup, f"case-{number}")
        try:
            for i, name in enumerate(names):
                case.did.append(f"{name}: {faults.ALL[name](case, random.Random(f'{self.seed}/{number}/{i}'))}")
            case.finish()
        except Exception as error:  # what the case did until then must stand in the log
            case.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            case.end()
        record = {"seed": self.seed, "case": number, "setup": setup.name, "did": case.did, "wrong": case.wrong,
                  "seconds": round(time.monotonic() - started, 1)}
        if case.wrong:
            record["said"] = [run.said[-4000:] for run in case.runs]
        with open(self.log, "a") as file:
            file.write(json.dumps(record) + "\n")
        return case.wrong

    def run(self, until, first=0):
        """Runs cases one after the other until a time; returns how many ran and the numbers of those that failed."""
        number, failed = first, []
        while time.monotonic() < until or number == first:
            wrong = self.case(number)
            if wrong:
                failed.append(number)
                print(f"case {number}: {'; '.join(wrong)}\n    python -m tests.soak --seed {self.seed} --case {number}",
                      flush=True)
            number += 1
        return number - first, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--case", type=int, help="run this case only")
    parser.add_argument("--log", default="soak.jsonl")
    asked = parser.parse_args()
    seed = int.from_bytes(os.urandom(3)) if asked.seed is None else asked.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which unmounts what is mounted
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak = Soak(directory, seed, asked.log)
        try:
            if asked.case is not None:
                num_cases, failed = soak.run(0, asked.case)
            else:
                print(f"seed {seed}, {asked.minutes:g} minutes, log {asked.log}", flush=True)
                num_cases, failed = soak.run(time.monotonic() + 60 * asked.minutes)
        finally:
            for place in soak.places.values():
                faults.unmount(place)
    counts = {}
    for line in Path(asked.log).read_text().splitlines()[-num_cases:]:
        for did in json.loads(line)["did"]:
            counts[did.partition(":")[0]] = counts.get(did.partition(":")[0], 0) + 1
    print(f"{num_cases} cases, {sum(counts.values())} faults (" + ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
          + f"), {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
