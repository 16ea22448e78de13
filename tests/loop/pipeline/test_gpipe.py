"""The parts of a pipeline: where it is cut, what each stage is planned to cost, what is kept, measured and drawn."""

import gc
import json
import re
import sys
import weakref
from contextlib import ExitStack

import pytest
import torch

from data.batches import Microbatch, StepBatch
from loop.config import PipelineConfig, load_config
from loop.config.command_line import parse_command_line
from loop.distributed.groups import Ranks
from loop.distributed.launch import choose_ranks
from loop.distributed.preflight import check_split
from loop.distributed.watch import Watch
from loop.memory.phases import Memory
from loop.metrics import RunLog
from loop.pipeline.gpipe import Pipeline
from loop.pipeline.split import Cost, RowLengths, balance, reason, sublayer_costs, table
from loop.pipeline.timeline import Mark, busy_and_idle, draw, write
from loop.plan.fakes import nothing_sent, pretended_group
from model.build import build, skeleton
from model.config import LoraConfig
from model.tiny.write import write_tiny

CPU = torch.device("cpu")
MEMORY = Memory(CPU)


# The split


def test_split_is_read_from_the_file_the_flag_and_overrides(write_config, monkeypatch):
    config = write_config(pipeline={"split": [30, 60], "schedule": "1f1b"})
    assert load_config(config).pipeline == PipelineConfig([30, 60], "1f1b")
    assert load_config(write_config()).pipeline == PipelineConfig("auto", "gpipe")
    for text, expected in (("40", [40]), ("30,60", [30, 60]), ("[30, 60]", [30, 60]), ("auto", "auto")):
        assert load_config(config, [f"pipeline.split={text}"]).pipeline.split == expected
        monkeypatch.setattr(sys, "argv", ["pipeline_train.py", "--split", text, "--config", str(config), "run=other"])
        parsed = parse_command_line(splits=True)
        assert parsed.pipeline.split == expected and parsed.run == "other"
    for text in ("half", "4.5", "", "3,,4"):
        with pytest.raises(ValueError, match="expected sublayer numbers such as 40 or 30,60, or auto"):
            load_config(config, [f"pipeline.split={text}"])


@pytest.mark.parametrize("split", [[0], [80], [40, 40], [60, 30], [-1], [40, 81]])
def test_a_cut_that_leaves_a_stage_empty_says_how_many_sublayers_there_are(split):
    with pytest.raises(ValueError, match="the model has 80 sublayers.*from 1 to 79"):
        check_split(split, 80)
    check_split([1, 2, 79], 80)


def test_how_many_stages_and_processes():
    cut, auto = PipelineConfig([40]), PipelineConfig()
    assert choose_ranks(cut, world_size=1, num_gpus=0) == (2, 2)  # on the CPU, one process a stage
    assert choose_ranks(cut, world_size=1, num_gpus=1) == (1, 1)  # nothing to split
    assert choose_ranks(cut, world_size=1, num_gpus=2) == (2, 2)
    assert choose_ranks(cut, world_size=1, num_gpus=5) == (2, 4)  # two replicas, and a GPU left over
    assert choose_ranks(cut, world_size=4, num_gpus=4) == (2, 4)  # started by torchrun
    assert choose_ranks(auto, world_size=1, num_gpus=3) == (3, 3)
    assert choose_ranks(auto, world_size=3, num_gpus=0) == (3, 3)
    assert choose_ranks(auto, world_size=1, num_gpus=0) == (2, 2)
    with pytest.raises(ValueError, match="makes 4 stages, but 2 GPUs are visible"):
        choose_ranks(PipelineConfig([20, 40, 60]), world_size=1, num_gpus=2)


def test_ranks_that_make_no_whole_replica_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks for a model in 2 stages, expected a multiple of 2"):
        Ranks.from_launcher(num_stages=2)


def test_neighbouring_ranks_make_a_replica():
    ranks = [Ranks(rank, 6, 3) for rank in range(6)]
    assert [(r.replica, r.stage) for r in ranks] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert {r.num_replicas for r in ranks} == {2} and ranks[4].name == "rank 4 (stage 1)"


# What the stages are planned to cost


def published(tmp_path, write_config, kind, base):
    """Costs of the model as it was published: its config alone, no weights."""
    from model.tiny.shapes import text_config, wrapped_config

    text = text_config(kind, 1, 248_320)
    if kind == "qwen3_5_moe":
        text["layer_types"] = (["linear_attention"] * 3 + ["full_attention"]) * 10
        text = wrapped_config(text)
    (tmp_path / "config.json").write_text(json.dumps(text))
    settings = [f"model.base={base}", "lora.rank=8", "lora.target=q_proj,k_proj,v_proj,o_proj", "train.recompute=true"]
    lengths = RowLengths(longest=1800, mean=1800, context=900, supervised=0.25)
    return sublayer_costs(tmp_path, load_config(write_config(), settings), lengths)


def test_planned_costs_add_up_to_the_published_models(tmp_path, write_config):
    costs = published(tmp_path, write_config, "qwen3_5_moe", "nf4")
    whole = sum(costs, Cost())
    assert len(costs) == 80
    frozen = sum(parameter.numel() for parameter in skeleton(tmp_path, "nf4").parameters())
    assert whole.num_parameters == pytest.approx(frozen, rel=1e-3) and 34e9 < frozen < 36e9
    assert 17 * 2**30 < whole.num_bytes < 20 * 2**30
    # 3 B active parameters, three passes of 2 flops, and what experts, head and attention add or save
    assert 3e9 * 6 * 0.7 < whole.flops < 3e9 * 6 * 1.5
    assert balance(costs, 2)[0] in range(38, 43)


def test_the_head_counts_in_the_balance(tmp_path, write_config):
    """The 4B's head is as much work as several layers: without it the cut would be in the middle."""
    costs = published(tmp_path, write_config, "qwen3", "int8")
    (cut,) = balance(costs, 2)
    assert 32 <= cut <= 40
    even = [Cost(1, 1.0, 1.0)] * 12
    assert balance(even, 3) == [4, 8] and balance(even, 1) == []
    assert balance([*even[:-1], Cost(5, 5.0, 5.0)], 2) == [8]  # 8 against 3 + 5
    memory = [Cost(1, 9.0, 1.0), *even[1:]]
    assert balance(memory, 2) == [5]  # 13 of 20 bytes against 7 of 12 flops; in the middle it would be 14 of 20
    with pytest.raises(ValueError, match="5 stages for a model of 4 sublayers"):
        balance(even[:4], 5)


def test_an_automatic_cut_gives_its_reason():
    memory = [Cost(1, 9.0, 1.0), *[Cost(1, 1.0, 1.0)] * 11]
    assert reason(memory, balance(memory, 2)) == (
        "split auto, cut at 5, balances time and memory (shares of the flops and of the weights' bytes): "
        "stage 0 41.7 % and 65.0 %, stage 1 58.3 % and 35.0 %; the largest share is 65.0 %; "
        "with a cut one sublayer away it would be at least 66.7 %")
    assert reason(memory[:2], [1]).endswith("the largest share is 90.0 %"), "there is no other cut"


def test_the_cuts_as_a_table():
    text = table([Cost(10, 2.0**20, 1.0)] * 3 + [Cost(30, 2.0**22, 3.0)], [3], "cuda", num_replicas=2)
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert lines == [
        ["stage", "device", "sublayers", "parameters", "compute"],
        ["0", "cuda (rank 0, 2)", "0 to 2", "30", "50.0 %"],
        ["1", "cuda (rank 1, 3)", "3 to 3", "30", "50.0 %"],
    ]


# What runs


@pytest.fixture
def make_pipeline(tmp_path_factory, monkeypatch):
    """One stage of a model in two, the other of which is not there: messages lead nowhere."""
    model_dir = write_tiny(tmp_path_factory.mktemp("gpipe") / "llama", kind="llama", num_hidden_layers=2)
    with ExitStack() as stack:
        def make(rank=1, base="float32", schedule="1f1b", log=None):
            ranks = Ranks(rank, 2, 2, (2,))
            for context in (pretended_group(ranks), nothing_sent()):
                stack.enter_context(context)
            monkeypatch.setattr(ranks, "sum_stages", lambda tensor: tensor)
            lora = LoraConfig(4, 8, ("q_proj",))
            stage = build(model_dir, base, lora, seed=0, device=CPU, recompute=True, first=ranks.first, stop=ranks.stop)
            return Pipeline(stage, ranks, schedule, log or RunLog(model_dir, "", CPU, enabled=False), MEMORY)

        yield make


def make_batch(num_microbatches, length=128):
    predict_N = torch.arange(4)
    microbatch = Microbatch(
        ids_T=torch.arange(length), positions_T=torch.arange(length), cu_seqlens_R1=torch.tensor([0, length]).int(),
        lengths=(length,), predict_N=predict_N, labels_N=predict_N + 1, sources_N=predict_N, lines=(1,), num_tokens=length,
    )
    return StepBatch(
        step=7, epoch=0, microbatches=[microbatch] * num_microbatches, length=length, slots=range(num_microbatches),
        lines_by_slot=[[1]] * num_microbatches, num_rows=1, num_tokens=length, num_supervised_tokens=4 * num_microbatches,
    )


def test_only_the_newest_schedule_and_its_buffers_are_kept(make_pipeline):
    pipeline = make_pipeline()
    gc.disable()  # nothing may wait for the garbage collector: on a GPU these are hundreds of MiB
    try:
        pipeline.forward_backward(make_batch(3))
        first = weakref.ref(pipeline.kept[1])
        pipeline.forward_backward(make_batch(3))
        assert pipeline.kept[1] is first()
        buffer = weakref.ref(pipeline.kept[1]._stage.args_recv_info[0][0].buffer)
        pipeline.forward_backward(make_batch(4))
        assert first() is None and buffer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("rank", [0, 1])
def test_boundaries_travel_in_the_compute_dtype(make_pipeline, rank):
    """A stage that holds no embedding once took the float32 of its first adapter for the model's dtype."""
    split = make_pipeline(rank, "bf16", "gpipe")
    split.forward_backward(make_batch(2))
    stage = split.kept[1]._stage
    travels = stage.args_recv_info[0][0] if rank else stage.grad_recv_info[0][0]
    assert travels.buffer.dtype == torch.bfloat16


def test_a_replica_without_microbatches_does_nothing(make_pipeline):
    pipeline = make_pipeline()
    assert pipeline.forward_backward(make_batch(0)).tolist() == []
    pipeline.record_timeline()
    assert not (pipeline.log.run_dir / "timeline.json").exists()


def test_what_a_stage_raises_comes_through_as_it_is(make_pipeline, monkeypatch):
    """torch wraps it in a RuntimeError that names every tensor."""
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("the device is full")

    pipeline = make_pipeline()
    monkeypatch.setattr(pipeline.stage, "losses", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="^the device is full$"):
        pipeline.forward_backward(make_batch(2))


def test_at_an_evaluation_the_step_before_is_recorded_once_and_can_be_drawn(make_pipeline, tmp_path):
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=True)
    log.start(0, 9)
    pipeline = make_pipeline(log=log)
    pipeline.ranks.rank = 1
    pipeline.forward_backward(make_batch(3))
    for _ in range(2):
        pipeline.forward_only(make_batch(2))
    log.close()
    (recorded,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert recorded["step"] == 7 and len(recorded["stage_busy_s"]) == len(recorded["stage_idle_s"]) == 2
    assert recorded["stage_busy_s"][1] > 0 and recorded["stage_peak_gib"][1] > 0
    written = json.loads((tmp_path / "timeline.json").read_text())
    assert (written["step"], written["schedule"]) == (7, "1f1b")
    assert torch.tensor(written["seconds_SM22"]).shape == (2, 3, 2, 2)
    draw(tmp_path / "timeline.json", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="Expected the directory of a run that was trained in stages"):
        draw(tmp_path / "elsewhere.json", tmp_path / "timeline.png")


def test_an_ideal_pipeline_idles_as_gpipe_says(tmp_path):
    num_stages, num_microbatches = 2, 4
    times_SM22 = torch.zeros(num_stages, num_microbatches, 2, 2, dtype=torch.float64)
    for stage in range(num_stages):
        for m in range(num_microbatches):
            times_SM22[stage, m, 0] = 100 + stage + m + torch.tensor([0.0, 1.0])
            times_SM22[stage, m, 1] = 105 + 2 * (num_stages - 1 - stage + m) + torch.tensor([0.0, 2.0])
    busy, idle = busy_and_idle(times_SM22)
    assert busy == [12, 12] and idle == [3, 3]  # 1 / (M + S - 1) of the time
    write(tmp_path / "t.json", 1, "gpipe", times_SM22)
    assert json.loads((tmp_path / "t.json").read_text())["seconds_SM22"][0][0] == [[0, 1], [7, 9]]


def test_what_a_rank_waits_for_is_said_with_the_peers_rank(make_pipeline):
    second_replica = Pipeline(make_pipeline().stage, Ranks(4, 6, 3), "gpipe", None, MEMORY)
    second_replica.batch = make_batch(1)
    say = second_replica.waits_for
    assert say(2, "output", sends=False) == "stage 0 (rank 3) to send the output of microbatch 2 in step 7"
    assert say(2, "output", sends=True) == "stage 2 (rank 5) to take the output of microbatch 2 in step 7"
    assert say(0, "gradient", sends=False) == "stage 2 (rank 5) to send the gradient of microbatch 0 in step 7"
    assert say(0, "gradient", sends=True) == "stage 0 (rank 3) to take the gradient of microbatch 0 in step 7"


def test_only_an_error_while_waiting_is_a_peers(monkeypatch):
    watch, ended = Watch(), []
    watch.name = "rank 0"
    monkeypatch.setattr(watch, "end", ended.append)
    with pytest.raises(RuntimeError, match="mine"), watch.ends_when_peers_are_gone():
        raise RuntimeError("mine")
    with watch.waiting("rank 1"):
        raise RuntimeError("connection reset")
    assert ended == ["the connection is gone"]


def test_on_a_gpu_the_watch_stays_armed_while_the_host_goes_on(make_pipeline, monkeypatch):
    """NCCL's `wait` returns at once, and the host may block in any line that reads a number from the device: what the GPU
    has not reached says what is missing. Events that stand in for CUDA's play the device."""
    pipeline = make_pipeline()
    seen = []

    class Event:
        def __init__(self, reached):
            self.query = lambda: reached

    def hangs(x_1TD, predict_N, labels_N):  # such as a `.tolist()` of routed experts
        marks = pipeline.timeline.marks
        marks[:] = [Mark(mark.microbatch, mark.is_backward, Event(False)) for mark in marks[-1:]]
        seen.append((pipeline.ranks.watch.awaited(), pipeline.ranks.watch.queued))
        raise RuntimeError("an edit's own error")

    monkeypatch.setattr(pipeline.timeline, "now", lambda: 0.0)
    monkeypatch.setattr(pipeline.ranks, "wait_for_device", lambda: None)
    monkeypatch.setattr(pipeline.stage, "losses", hangs)
    monkeypatch.setattr(pipeline, "on_gpu", True)
    pipeline.batch = make_batch(2)
    with pytest.raises(RuntimeError, match="an edit's own error"):
        pipeline.forward_backward(make_batch(2))
    assert seen == [("stage 0 (rank 0) to send the output of microbatch 0 in step 7", True)]


def test_while_messages_are_queued_only_errors_of_communication_are_a_peers(monkeypatch):
    watch, ended = Watch(), []
    watch.name = "rank 0"
    monkeypatch.setattr(watch, "end", ended.append)
    watch.begin(lambda: "rank 1", queued=True)
    with pytest.raises(RuntimeError, match="mine"), watch.ends_when_peers_are_gone():
        raise RuntimeError("mine")
    with pytest.raises(torch.AcceleratorError), watch.waiting("rank 1"):  # of a kernel before, which shows in the next wait
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert not ended
    watch.begin(lambda: "rank 1", queued=True)
    with watch.ends_when_peers_are_gone():
        raise torch.distributed.DistBackendError("NCCL communicator was aborted")
    assert ended == ["the connection is gone"]
