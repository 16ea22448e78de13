"""Rows that enter and leave, stop tokens, longest answers, and what is left of the model as it was."""

import pytest
import torch

from model.build import build
from model.config import LoraConfig
from model.decode import weights
from model.decode.cache import BLOCK, Cache
from model.decode.generate import generate
from model.decode.sampling import Sampling
from model.decode.weights import can_pack, kept_for_decoding
from model.lora import adapters_off

CPU = torch.device("cpu")


def make(model_dir, base="float32", dropout=0.0):
    lora = LoraConfig(4, 8, ("q_proj", "v_proj", "down_proj"), dropout)
    stage = build(model_dir, base, lora, seed=0, device=CPU, recompute=True)
    torch.manual_seed(0)
    for parameter in stage.adapters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return stage


@pytest.fixture(scope="module")
def stage(tiny_llama):
    return make(tiny_llama)


PROMPTS = [[7], [1, 2, 3], list(range(40)), [5, 6], list(range(20, 29))]


def test_the_longest_answer_is_kept(stage):
    for max_tokens in (1, 2, 9):
        answers = generate(stage, PROMPTS, stop_id=-1, max_tokens=max_tokens, batch_rows=2)
        assert [len(answer.ids) for answer in answers] == [len(answer.log_probs) for answer in answers] == [max_tokens] * 5
        assert not any(answer.stopped for answer in answers)


def test_no_tokens_asked_for_and_no_prompts_given(stage):
    answers = generate(stage, PROMPTS, stop_id=-1, max_tokens=0)
    assert [(answer.ids, answer.log_probs, answer.stopped) for answer in answers] == [([], [], False)] * 5
    assert generate(stage, [], stop_id=-1, max_tokens=5) == []


def test_an_answer_that_stops_at_once_has_no_text(stage):
    first = generate(stage, PROMPTS, stop_id=-1, max_tokens=1)[2].ids[0]
    answer = generate(stage, PROMPTS, stop_id=first, max_tokens=9, batch_rows=2)[2]
    assert answer.stopped and answer.ids == [first] and answer.text_ids == [] and len(answer.log_probs) == 1


def test_an_empty_prompt_is_refused(stage):
    with pytest.raises(ValueError, match="prompt 1 holds no token, expected at least one"):
        generate(stage, [[1], []], stop_id=-1, max_tokens=5)


def test_answers_are_told_as_soon_as_they_are_finished_and_returned_in_order(stage):
    told = []
    answers = generate(stage, PROMPTS, stop_id=3, max_tokens=9, batch_rows=2, sampling=Sampling(1.0, seed=1),
                       finished=lambda index, answer: told.append((index, answer)))
    assert sorted(index for index, _ in told) == [0, 1, 2, 3, 4] and dict(told) == dict(enumerate(answers))
    assert told[-1][0] in (0, 3), "the shortest prompts enter last"


def test_a_drawn_answer_depends_on_seed_and_number_alone(stage):
    def drawn(prompts, seed=4, **settings):
        answers = generate(stage, prompts, stop_id=-1, max_tokens=12, sampling=Sampling(1.0, 0.95, seed), **settings)
        return [answer.ids for answer in answers]

    all_rows = drawn(PROMPTS)
    assert drawn(PROMPTS, batch_rows=2) == all_rows
    assert drawn(PROMPTS[3:], numbers=[3, 4]) == all_rows[3:]
    assert drawn([PROMPTS[4], [9, 9, 9], PROMPTS[0]], numbers=[4, 77, 0])[::2] == [all_rows[4], all_rows[0]]
    assert drawn(PROMPTS, seed=5) != all_rows
    assert len({tuple(ids) for ids in drawn([PROMPTS[1]] * 6)}) == 6, "equal prompts of other numbers draw other tokens"


def test_adapters_off_writes_as_a_base_without_adapters(stage, tiny_llama):
    base = build(tiny_llama, "float32", LoraConfig(4, 8, ("q_proj",)), seed=0, device=CPU, recompute=False)  # B is zero
    expected = generate(base, PROMPTS, stop_id=-1, max_tokens=9)
    with adapters_off(stage):
        assert [a.ids for a in generate(stage, PROMPTS, stop_id=-1, max_tokens=9)] == [a.ids for a in expected]
    assert [a.ids for a in generate(stage, PROMPTS, stop_id=-1, max_tokens=9)] != [a.ids for a in expected]


@pytest.mark.parametrize("base", ["float32", "bf16", "int8", "nf4"])
def test_the_model_trains_on_as_if_nothing_had_been_written(tiny_llama, base):
    """Dropout is off while decoding, and afterwards on again; weights and forward passes are as they were."""
    stage = make(tiny_llama, base, dropout=0.5)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    first, again = (generate(stage, PROMPTS, stop_id=-1, max_tokens=5) for _ in range(2))
    assert first == again
    assert stage.training and all(module.training for module in stage.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.state_dict().items())
    shadowed = [m for m in stage.modules() if "forward" in vars(m) or "dequantize" in vars(m)]
    assert not shadowed and torch.is_grad_enabled()


# What is kept


def test_the_cache_grows_by_blocks_and_keeps_what_it_holds():
    cache = Cache(3)
    cache.reserve(5)
    assert cache.length == BLOCK
    cache.keys_values[0] = torch.randn(3, 2, BLOCK, 4), torch.randn(3, 2, BLOCK, 4)
    before = [x.clone() for x in cache.keys_values[0]]
    cache.reserve(BLOCK)
    assert cache.length == BLOCK
    cache.reserve(BLOCK + 1)
    assert cache.length == 2 * BLOCK
    for found, kept in zip(cache.keys_values[0], before):
        assert torch.equal(found[:, :, :BLOCK], kept) and not found[:, :, BLOCK:].any()
    cache.move(2, 0)
    assert torch.equal(cache.keys_values[0][0][0, :, :BLOCK], before[0][2])


def test_rows_longer_than_a_block_are_written_as_alone(stage):
    long = [list(range(100)), [i % 90 for i in range(BLOCK - 3)], [4]]
    together = generate(stage, long, stop_id=-1, max_tokens=BLOCK + 9)
    alone = [generate(stage, [prompt], stop_id=-1, max_tokens=BLOCK + 9)[0] for prompt in long]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]


@pytest.mark.skipif(not can_pack(torch.empty(0, dtype=torch.bfloat16)), reason="this CPU multiplies no bf16")
@pytest.mark.parametrize("enabled", [True, False])
def test_packed_linears_compute_what_the_linears_do(tiny_llama, enabled):
    stage = make(tiny_llama, "int8")
    layer, x = stage.model.model.layers[0], torch.randn(5, 64).bfloat16()
    linears = {"adapted": layer.self_attn.q_proj, "frozen": layer.self_attn.k_proj, "head": stage.model.lm_head}
    linears["adapted"].base.bias = torch.randn(64).bfloat16()
    linears["adapted"].enabled = enabled
    with torch.no_grad():
        expected = {name: linear(x).float() for name, linear in linears.items()}
        with kept_for_decoding(stage):
            assert all("forward" in vars(linear) for linear in linears.values())
            for name, linear in linears.items():
                error = (linear(x).float() - expected[name]).norm() / expected[name].norm()
                assert error < 5e-3, name
                assert torch.equal(linear(x[None])[0], linear(x))


def test_nothing_is_kept_where_it_does_not_fit(tiny_llama, monkeypatch):
    stage = make(tiny_llama, "int8")
    expected = generate(stage, PROMPTS, stop_id=-1, max_tokens=5)
    expected_free = weights.free_bytes()
    monkeypatch.setattr(weights, "free_bytes", lambda: 2 * weights.copy_bytes(stage.model) - 1)
    assert 2**27 < weights.MOST_SHARE * expected_free, "else the answers before kept nothing either"
    with kept_for_decoding(stage):
        assert not [module for module in stage.modules() if {"forward", "dequantize"} & vars(module).keys()]
    found = generate(stage, PROMPTS, stop_id=-1, max_tokens=5)
    for one, other in zip(found, expected):
        assert abs(one.log_probs[0] - other.log_probs[0]) < 0.05
