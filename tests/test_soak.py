"""Half a minute of the soak; `python -m tests.soak --minutes 10` goes on for longer."""

import json
import time

import pytest

from tests import faults
from tests.soak import Soak

SECONDS = 30


@pytest.mark.slow
def test_half_a_minute_of_faults_leaves_no_run_that_ends_otherwise(tmp_path, capsys):
    soak = Soak(tmp_path / "runs", seed=11, log=tmp_path / "soak.jsonl")
    try:
        num_cases, failed = soak.run(time.monotonic() + SECONDS)
    finally:
        for place in soak.places.values():
            faults.unmount(place)
    assert failed == [], capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    assert [record["case"] for record in records] == list(range(num_cases))
    assert all(record["did"] for record in records)
