"""What ranks say of themselves, and how a difference is told. Whole runs over several hosts are in tests/test_hosts.py."""

import os
import threading

import pytest
from torch.distributed import HashStore

from loop.config import load_config
from loop.distributed.roll_call import choose_interface, difference, open_store, sign_in, wait_for_entries
from loop.distributed.watch import Watch


@pytest.fixture
def entry(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return sign_in(load_config("configs/4b.yaml", ["log=mine.log", "data.train=here.jsonl"]))


def changed(entry, kind, **values):
    return entry | {"host": "hostB", kind: entry[kind] | values}


def test_a_rank_signs_in_with_all_that_must_agree(entry):
    assert {"train.py", "pipeline_train.py", "data/records.py", "model/lora.py", "loop/run.py"} <= entry["code"].keys()
    assert entry["libraries"].keys() == {"torch", "transformers"}
    assert {"run", "resume", "train.seed", "model.base", "distributed.timeout_s"} <= entry["settings"].keys()
    assert not {"log", "data.train", "data.eval", "model.path"} & entry["settings"].keys()
    assert len(str(entry)) < 15_000, "bytes a rank in the store"


def test_the_first_difference_is_told_with_both_values_and_what_to_do(entry):
    assert difference({0: entry, 1: entry | {"host": "hostB"}}) == ""
    told = difference({0: entry, 1: entry, 2: changed(entry, "settings", **{"train.seed": "7", "lora.rank": "8"})})
    assert told == (f"rank 2 on hostB has other settings than rank 0 on {entry['host']}: lora.rank (8, on rank 0 64), "
                    "train.seed (7, on rank 0 42). Give all hosts the same file and arguments")
    told = difference({0: entry, 1: changed(entry, "libraries", torch="1.0")})
    assert f"rank 1 on hostB has other libraries than rank 0 on {entry['host']}: torch (1.0, on rank 0 2." in told
    told = difference({0: entry, 1: changed(entry, "code", **{f"loop/new{i}.py": "0" for i in range(5)})})
    assert "loop/new0.py (0, on rank 0 None), loop/new1.py" in told and "and 2 more. Bring all hosts to the same commit" in told


def test_who_is_late_is_said_again_only_when_somebody_came(monkeypatch, capsys):
    monkeypatch.setattr("loop.distributed.roll_call.SAID_AFTER_S", 0.3)
    store, entries = HashStore(), {}
    threading.Timer(1.0, lambda: store.set("roll/2", '{"host": "hostC"}')).start()
    threading.Timer(2.0, lambda: [store.set(f"roll/{rank}", '{"host": "hostB"}') for rank in (1, 3)]).start()
    wait_for_entries(store, 0, 4, {"host": "hostA"}, entries, says=True)
    assert capsys.readouterr().out == ("waiting for ranks 1, 2, 3 of 4 (signed in: rank 0 on hostA)\n"
                                       "waiting for ranks 1, 3 of 4 (signed in: rank 0 on hostA; rank 2 on hostC)\n")
    assert sorted(entries) == [0, 1, 2, 3]


@pytest.mark.parametrize("address, port", [("", "29500"), ("host0", ""), ("host0", "first")])
def test_ranks_without_a_store_are_told_how_to_start(monkeypatch, address, port):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=f"MASTER_ADDR is '{address}' and MASTER_PORT '{port}', expected rank 0's host"):
        open_store(1, 1, Watch(), None)


def test_ranks_on_one_host_leave_the_interface_to_gloo(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    choose_interface(["127.0.0.1", "127.0.1.1", ""])
    assert "GLOO_SOCKET_IFNAME" not in os.environ
