"""Time from work: the queue of a card, the pipeline's idle time, shapes of steps, and what the planner and a run say of it."""

import json

import pytest
import torch

from loop import planned as beside
from loop.config import load_config
from loop.memory.counter import PURPOSES, Operation
from loop.pipeline.split import RowLengths
from loop.plan import __main__ as plan
from loop.plan.seconds import Forecast, Shape
from loop.plan.workload import Workload
from loop.rates import CARDS, Rates, kind_of, measure, timed
from model.ops.work import Work
from model.tiny.write import write_tiny

CPU = torch.device("cpu")


def operation(purpose, flops=0.0, num_bytes=0.0, name="aten::mm", dtype=torch.bfloat16, launches=1.0):
    return Operation(purpose, name, dtype, Work(flops, num_bytes, launches), 0.0)


def card(waits=False):
    speeds = {"matmul": (100.0, 10.0), "float32 matmul": (50.0, 10.0), "attention forward": (80.0, 10.0),
              "attention backward": (40.0, 10.0), "other": (50.0, 10.0)}
    return Rates("a card", speeds, call_s=1.0, link=5.0, kernel_s=0.25, waits=waits)


@pytest.mark.parametrize("made, seconds", [
    (operation("base matmul", 500, 10), 5.0), (operation("base matmul", 500, 100), 10.0),
    (operation("experts", 500, 1, dtype=torch.float32), 10.0), (operation("attention", 80, 1, "x_backward"), 2.0),
    (operation("attention", 80, 1, "x"), 1.0), (operation("elementwise", 0, 20), 2.0), (operation("elementwise", 0, 1), 0.25)])
def test_an_operation_takes_what_limits_it(made, seconds):
    assert card().seconds(made) == seconds


def test_calls_wait_on_a_cpu_and_a_card_works_through_a_queue():
    small, large = operation("elementwise", 0, 1), operation("base matmul", 1000, 1)
    assert card(waits=True).total([small, large, small]) == {"elementwise": 2.5, "base matmul": 11.0}
    # the first is called at 1 and done at 1.25; the second is called at 2 and done at 12; the third waits in the queue
    assert card().total([small, large, small]) == {"elementwise": 1.25 + 0.25, "base matmul": 10.75}
    # nothing to do but to wait for calls
    assert card().total([small] * 10) == {"elementwise": 10.25}
    assert card().total([small._replace(work=Work(0, 1, 4))]) == {"elementwise": 5.0}


class Step:
    """Of 20 elementwise operations at 1 GB/s and 20 matmuls at 10 GFLOP/s; each call takes 10 microseconds of its own."""

    device, most_tokens = CPU, 1000

    def operations(self, lengths):
        small, large = 4 * sum(lengths), 1000 * sum(lengths)
        return 20 * [operation("elementwise", 0, small)._replace(seconds=1e-5 + small / 1e9),
                     operation("base matmul", large, 1)._replace(seconds=1e-5 + large / 1e10)]

    def seconds(self, lengths):
        return sum(made.seconds for made in self.operations(lengths))


def test_what_a_call_takes_is_no_part_of_a_rate():
    rates = timed(Step(), [600, 600], 1)
    assert rates.by_kind["elementwise"][1] == pytest.approx(1e9, rel=0.03)
    assert rates.by_kind["base matmul"][0] == pytest.approx(1e10, rel=0.03)
    assert rates.call_s == pytest.approx(1e-5, rel=0.03)
    assert sum(rates.total(Step().operations([500])).values()) == pytest.approx(Step().seconds([500]), rel=0.02)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("qwen3") / "model", kind="qwen3", num_hidden_layers=6)


@pytest.fixture
def make_forecast(write_config, qwen3):
    def make(*settings, num_ranks=1, split=(), rates=CARDS["rtx5090"], rows_per_step=8):
        config = load_config(write_config(), [f"train.rows_per_step={rows_per_step}", "train.microbatch_tokens=256", *settings])
        workload = Workload(config, qwen3, "cuda", num_ranks, len(split) + 1, None, RowLengths(100, 100, 50, 0.5), split)
        return Forecast(workload, rates)
    return make


def test_a_pipeline_waits_for_its_first_microbatch_and_for_the_slowest_stage(make_forecast):
    """By GPipe's formula: M microbatches through S stages take M + S - 1 times as long as one takes in one stage."""
    forecast = make_forecast(num_ranks=3, split=(4, 8))
    stages = [forecast.stage(*bounds, 0)[0].total() for bounds in ((0, 4), (4, 8), (8, 12))]
    time = forecast.step((4, 8), 0)
    num = forecast.shape.num_microbatches
    assert num == 4 and time.by_purpose["pipeline idle time"] == pytest.approx(sum(stages) - max(stages))
    counted = sum(took for name, took in time.by_purpose.items() if name in PURPOSES)
    slowest = max(((0, 4), (4, 8), (8, 12)), key=lambda bounds: forecast.stage(*bounds, 0)[0].total())
    assert counted == pytest.approx(num * max(stages) + forecast.stage(*slowest, 0)[1].total())
    message = 2 * num * 256 * forecast.model.hidden_size * 2 / CARDS["rtx5090"].link
    assert time.by_purpose["communication"] == pytest.approx(message)


def test_stages_are_the_whole_and_cuts_within_a_layer_are_its_halves(make_forecast):
    forecast = make_forecast()
    whole = forecast.stage(0, 12, 0)[0].total()
    for split in ((4,), (5,), (3, 7)):
        bounds = (0, *split, 12)
        parts = sum(forecast.stage(first, stop, 0)[0].total() for first, stop in zip(bounds, bounds[1:]))
        assert parts == pytest.approx(whole, rel=0.03), split  # a layer that is cut is recomputed in two parts


def test_replicas_share_rows_and_sum_gradients(make_forecast):
    alone, two = make_forecast().step((), 0), make_forecast(num_ranks=2).step((), 0)
    assert "communication" not in alone.by_purpose and "pipeline idle time" not in two.by_purpose
    num_parameters = make_forecast().stage(0, 12, 0)[2]
    assert two.by_purpose["communication"] == pytest.approx(num_parameters * 4 / CARDS["rtx5090"].link)
    assert two.shape.num_microbatches == alone.shape.num_microbatches / 2 and two.shape.num_tokens == alone.shape.num_tokens


def test_what_is_kept_is_not_computed_again(make_forecast):
    forecast = make_forecast()
    by_kept = [forecast.step((), keep).seconds for keep in range(7)]
    assert by_kept == sorted(by_kept, reverse=True) and by_kept[0] > 1.15 * by_kept[-1]
    assert make_forecast("train.recompute=false").step((), 0).seconds == pytest.approx(by_kept[-1])


def test_rows_make_the_shape_of_a_step(write_config, tiny_llama):
    config = load_config(write_config(), [])
    rows = plan.read_rows(config, tiny_llama)
    shape = Shape.of(Workload(config, tiny_llama, "cpu", 1, 1, rows, RowLengths.of(rows)))
    assert shape.steps_per_epoch * shape.num_tokens == rows.lengths_E.sum()
    assert shape.num_microbatches * sum(shape.lengths) >= shape.num_tokens * 0.99
    assert shape.supervised * shape.num_microbatches == pytest.approx(
        float(rows.supervised_N.sum()) / shape.steps_per_epoch, abs=shape.num_microbatches)


@pytest.mark.slow
def test_measured_rates_are_there_for_all_that_a_step_does_and_survive_json(write_config, tmp_path):
    model = write_tiny(tmp_path / "moe", num_hidden_layers=4, hidden_size=128, num_experts=4, num_experts_per_tok=2)
    config = load_config(write_config(), ["model.base=nf4", "lora.target=q_proj,v_proj,out_proj", "train.optimizer=adamw8bit"])
    rates = measure(config, model, CPU, [64, 64], num_threads=1)
    forecast = Forecast(Workload(config, model, "cpu", 1, 1, None, RowLengths(64, 64, 32, 0.5)), rates)
    layers = [operation for layer in forecast.pieces.layers(0, 8, 0) for operation in forecast.pieces.layer(layer)]
    used = {kind_of(operation) for operation in [*layers, *forecast.pieces.loss()]}
    assert {"base matmul", "LoRA matmul", "attention forward", "attention backward", "delta rule matmul", "experts matmul",
            "dequantize", "elementwise", "loss matmul"} <= used and used - {"LoRA"} <= rates.by_kind.keys()
    assert rates.waits and 0 < rates.call_s < 0.01 and all(rate > 0 for speeds in rates.by_kind.values() for rate in speeds)
    again = Rates(**json.loads(json.dumps(vars(rates))))
    assert [again.seconds(operation) for operation in layers] == [rates.seconds(operation) for operation in layers]


def planned(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["loop.plan", *arguments])
    plan.main()
    return capsys.readouterr().out


def test_a_named_card_and_a_check_of_this_machine_say_the_time(capsys, monkeypatch, write_config):
    config = str(write_config())
    seconds = {}
    for name in CARDS:
        answer = json.loads(planned(capsys, monkeypatch, "--config", config, "--card", name, "--ranks", "1", "--json"))
        seconds[name] = answer["time"]["step_s"]
        assert sum(answer["time"]["share"].values()) == pytest.approx(1)
        assert answer["ranks"][0]["card_gib"] == CARDS[name].memory_gib
    said = planned(capsys, monkeypatch, "--config", config, "--card", "NVIDIA GeForce RTX 5090", "--ranks", "1")
    assert f"{seconds['rtx5090']:.3g} s a step" in said and "(by the rates of rtx5090)" in said
    run_dir = load_config(config, []).run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "check.json").write_text(json.dumps({"rates": vars(card(waits=True))}))
    said = planned(capsys, monkeypatch, "--config", config, "--device", "cpu", "--ranks", "1")
    assert "(by the rates of a card)" in said
    for wrong in ("rtx2080", "0", "nan", "-3"):
        with pytest.raises(SystemExit):
            planned(capsys, monkeypatch, "--config", config, "--card", wrong)


def test_planned_and_taken_time_stand_side_by_side(monkeypatch):
    time = {"step_s": 2.0, "tokens_per_s": 100.0, "on_cpu": True}
    load = [1.0]
    monkeypatch.setattr(beside.os, "getloadavg", lambda: load)
    monkeypatch.setattr(beside.os, "cpu_count", lambda: 2)
    assert beside.time_comparison(time, [9.0, 9.0, 2.2, 2.1, 2.3]) == "; a step: planned 2 s, took 2.2 s (+10 %)"
    assert beside.time_comparison(time, [9.0, 9.0]) == beside.time_comparison(None, [1.0] * 9) == ""
    load[0] = 5.0
    assert "not compared: the machine's load is 2.5 times its cores" in beside.time_comparison(time, [2.0] * 5)
    assert "(+0 %)" in beside.time_comparison({**time, "on_cpu": False}, [2.0] * 5)
