"""Where memory was, phase by phase: the names, the file with all ranks in it, the picture."""

import json
import shutil

import pytest
import torch

from loop.curves import draw_memory
from loop.distributed.groups import Ranks
from loop.line_file import read_metrics
from loop.memory.phases import Memory
from loop.metrics import RunLog

ALONE = Ranks()
CPU = torch.device("cpu")
STEP = {"forward", "loss", "backward", "sync", "update"}


def phases(records):
    """(step, rank, names of the phases) of each line."""
    return [(r["step"], r["rank"], {key for key in r if key not in ("step", "rank")}) for r in records]


def assert_sizes(records):
    for phase in (value for r in records for value in r.values() if isinstance(value, dict)):
        assert phase.keys() == {"gib", "peak_gib"} and 0.01 < phase["gib"] <= phase["peak_gib"] < 100


def test_phases_nest_and_after_an_error_the_innermost_name_stays():
    memory = Memory(torch.device("cpu"))
    with memory.during("communicate"):
        with memory.during("forward", 3):
            assert (memory.phase, memory.microbatch) == ("forward", 3)
        assert (memory.phase, memory.microbatch) == ("communicate", None)
    assert memory.phase == "" and set(memory.seen) == {"communicate", "forward"}
    with pytest.raises(MemoryError):
        with memory.during("communicate"), memory.during("backward", 5):
            raise MemoryError
    assert (memory.phase, memory.microbatch) == ("backward", 5)


def test_what_is_computed_for_held_out_rows_is_no_phase_of_a_step():
    memory = Memory(torch.device("cpu"))
    with memory.during("eval"):
        with memory.during("forward", 0):
            assert memory.phase == "eval"
    assert memory.phase == "" and set(memory.seen) == {"eval"}


def test_marks_are_given_once_and_only_of_phases_that_occurred():
    memory = Memory(torch.device("cpu"))
    memory.seen = {"build": (0, 0), "update": (2**30, 3 * 2**29)}  # on a GPU, what is built on meta takes nothing
    expected = {"built": {"gib": 0.0, "peak_gib": 0.0}, "update": {"gib": 1.0, "peak_gib": 1.5}}
    assert memory.marks(ALONE) == [expected] and memory.marks(ALONE) == [{}]


def test_every_rank_has_the_marks_of_all():
    class Two(Ranks):
        def all_reduce(self, tensor, group=None):
            sent.append(tensor.clone())
            return sum(sent)

    sent = []
    ranks = [Two(rank, 2) for rank in (0, 1)]
    memories = [Memory(torch.device("cpu")) for _ in ranks]
    memories[0].seen = {"forward": (2**30, 2**31)}
    memories[1].seen = {"loss": (2**29, 2**30), "sync": (0, 2**29)}
    memories[0].marks(ranks[0])
    assert memories[1].marks(ranks[1]) == [
        {"forward": {"gib": 1.0, "peak_gib": 2.0}},
        {"loss": {"gib": 0.5, "peak_gib": 1.0}, "sync": {"gib": 0.0, "peak_gib": 0.5}}]
    assert [tensor.nbytes for tensor in sent] == [2 * 144] * 2


def assert_is_picture(path):
    from matplotlib.image import imread
    height, width, _ = imread(path).shape
    assert height > 300 and width > 600


def test_a_resumed_run_goes_on_in_the_file(write_config, run_train, tmp_path):
    config = write_config(checkpoint__keep=9, eval__every=100)
    run_dir = tmp_path / "checkpoints/tiny"
    run_train(config)
    whole = read_metrics(run_dir / "memory.jsonl")
    assert_sizes(whole)
    for step in (8, 10):
        shutil.rmtree(run_dir / f"step-{step:08d}")
    with open(run_dir / "memory.jsonl", "a") as file:
        file.write('{"step": 11, "rank": 0, "forw')
    run_train(config)
    resumed = read_metrics(run_dir / "memory.jsonl")
    assert resumed[:6] == whole[:6] and whole[5]["step"] == 4 and "eval" in whole[5]
    assert phases(resumed[6:7]) == [(5, 0, STEP | {"built", "loaded"})]
    assert phases(resumed[7:]) == phases(whole[7:])
    assert_is_picture(run_dir / "memory.png")


def test_lines_after_the_checkpoint_are_cut_and_a_run_from_the_start_begins_anew(tmp_path):
    path = tmp_path / "memory.jsonl"
    lines = [{"step": step, "rank": rank, "update": {"gib": 1.0, "peak_gib": 2.0}} for step in (1, 2, 3) for rank in (0, 1)]
    for done, kept in ((2, lines[:4]), (0, [])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ra')
        log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=True)
        log.start(done, 5)
        log.memory(done + 1, [{"eval": {"gib": 1.0, "peak_gib": 1.0}}, {}])
        log.close()
        new = [{"step": done + 1, "rank": 0, "eval": {"gib": 1.0, "peak_gib": 1.0}}, {"step": done + 1, "rank": 1}]
        assert read_metrics(path) == kept + new


@pytest.mark.parametrize("num_ranks", [0, 1, 12])
def test_the_picture_of_any_number_of_ranks(tmp_path, num_ranks):
    records = [
        {"step": step, "rank": rank, "forward": {"gib": 1.0, "peak_gib": 2.0}, "update": {"gib": 1.0, "peak_gib": 1.5}}
        for step in (1, 2) for rank in range(num_ranks)]
    draw_memory(records, tmp_path / "memory.png", "run", "allocated", [3.0] * num_ranks)
    assert_is_picture(tmp_path / "memory.png")
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]
