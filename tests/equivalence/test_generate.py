"""Answers of the decoder against transformers' `generate` with peft's adapters, and against a training forward pass."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.build import build
from model.config import LoraConfig
from model.decode.generate import generate
from model.decode.sampling import Sampling
from model.lora import adapters_off, to_peft_name
from model.mixers import Segments
from model.tiny.write import write_tiny

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"llama": ATTENTION + FEED_FORWARD, "qwen3": ATTENTION + FEED_FORWARD,
           "qwen3_moe": ATTENTION, "qwen3_5_moe": ATTENTION + FEED_FORWARD + ("in_proj_qkv", "in_proj_z", "out_proj")}
SHAPES = {"llama": {"num_hidden_layers": 3}, "qwen3": {"num_hidden_layers": 3},
          "qwen3_moe": {"num_hidden_layers": 2, "moe_intermediate_size": 64},
          "qwen3_5_moe": {"num_hidden_layers": 2, "full_attention_interval": 2, "moe_intermediate_size": 64}}
LENGTHS = (1, 5, 70, 2, 33, 130, 20, 1)
NO_STOP = -1
MAX_TOKENS = 40


@pytest.fixture(scope="module", params=SHAPES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model_dir(kind, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp(kind) / "model", kind=kind, **SHAPES[kind])


def ours(kind, model_dir, base="float32"):
    lora = LoraConfig(4, 8, TARGETS[kind], experts=kind.endswith("moe"))
    stage = build(model_dir, base, lora, seed=0, device=torch.device("cpu"), recompute=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(stage.adapters().items()):
            parameter.normal_(std=0.05, generator=generator)
    return stage


@pytest.fixture(scope="module")
def stage(kind, model_dir):
    return ours(kind, model_dir)


@pytest.fixture(scope="module")
def theirs(kind, model_dir, stage):
    experts = {"experts_implementation": "eager"} if kind.endswith("moe") else {}
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False, **experts)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS[kind]), target_parameters=parameters, task_type="CAUSAL_LM"))
    named = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert named.keys() == {to_peft_name(name) for name in stage.adapters()}
    with torch.no_grad():
        for name, parameter in stage.adapters().items():
            named[to_peft_name(name)].copy_(parameter)
    return model.eval()


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)  # no two likeliest tokens are closer than rounding
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def their_answers(model, stop_id=None):
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS,
                                do_sample=False, eos_token_id=stop_id, pad_token_id=0)
        answers.append(output[0, len(prompt):].tolist())
    return answers


def test_greedy_answers_are_those_of_transformers(stage, theirs):
    """Three slots for eight rows of all lengths: rows wait, enter and leave, and the cache grows over a block."""
    found = generate(stage, prompts(), stop_id=NO_STOP, max_tokens=MAX_TOKENS, batch_rows=3)
    assert [answer.ids for answer in found] == their_answers(theirs)
    assert not any(answer.stopped for answer in found)
    assert len({token for answer in found for token in answer.ids}) > 20, "the answers say nothing"


@pytest.mark.slow
def test_greedy_answers_with_a_stop_token_are_those_of_transformers(stage, theirs):
    free = their_answers(theirs)
    stop_id = free[2][len(free[2]) // 2]
    found = generate(stage, prompts(), stop_id=stop_id, max_tokens=MAX_TOKENS, batch_rows=3)
    assert [answer.ids for answer in found] == their_answers(theirs, stop_id)
    assert [answer.stopped for answer in found] == [stop_id in ids for ids in free] and found[2].stopped
    assert found[2].text_ids == free[2][: free[2].index(stop_id)]


def test_adapters_off_are_the_base_of_transformers(stage, theirs):
    with adapters_off(stage), theirs.disable_adapter():
        found = generate(stage, prompts(), stop_id=NO_STOP, max_tokens=MAX_TOKENS, batch_rows=4)
        assert [answer.ids for answer in found] == their_answers(theirs)


def training_logits(stage, prompts, answers):
    """The logits of every written token, by one packed training forward pass over prompts and answers."""
    texts = [prompt + answer.ids for prompt, answer in zip(prompts, answers)]
    lengths = tuple(len(text) for text in texts)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor([token for text in texts for token in text])
    assert stage.training
    with torch.no_grad():
        h = stage(ids[None], positions, Segments(bounds.int(), lengths))[0]
        predict = torch.cat([torch.arange(stop - len(answer.ids), stop) - 1 for stop, answer in zip(bounds[1:], answers)])
        losses = stage.losses(h[None], predict, ids[predict + 1])
        return stage.model.lm_head(stage.model.model.norm(h[predict])).float(), losses


def test_log_probabilities_are_those_of_a_training_forward_pass(stage):
    given = prompts()
    answers = generate(stage, given, stop_id=NO_STOP, max_tokens=MAX_TOKENS, batch_rows=3)
    _, losses = training_logits(stage, given, answers)
    found = torch.tensor([p for answer in answers for p in answer.log_probs])
    assert len(found) == len(LENGTHS) * MAX_TOKENS
    assert (found + losses).abs().max() < 1e-5


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.3, 0.5)])
def test_log_probabilities_of_drawn_tokens_are_those_of_their_distribution(stage, temperature, top_p):
    given = prompts()
    answers = generate(stage, given, stop_id=NO_STOP, max_tokens=MAX_TOKENS, batch_rows=3,
                       sampling=Sampling(temperature, top_p, seed=5))
    logits, _ = training_logits(stage, given, answers)
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        left_out = ordered.cumsum(-1) - ordered >= top_p
        p = p.scatter(1, order, ordered.masked_fill(left_out, 0))
    p = p / p.sum(-1, keepdim=True)
    ids = torch.tensor([token for answer in answers for token in answer.ids])
    found = torch.tensor([p for answer in answers for p in answer.log_probs])
    assert (found - p.gather(1, ids[:, None])[:, 0].log()).abs().max() < 1e-5


@pytest.mark.slow
def test_one_by_one_equals_a_batch(stage):
    for sampling in (Sampling(), Sampling(0.8, 0.9, seed=7)):
        together = generate(stage, prompts(), stop_id=10, max_tokens=24, batch_rows=8, sampling=sampling)
        few = generate(stage, prompts(), stop_id=10, max_tokens=24, batch_rows=2, sampling=sampling)
        alone = [generate(stage, [prompt], stop_id=10, max_tokens=24, sampling=sampling, numbers=[i])[0]
                 for i, prompt in enumerate(prompts())]
        assert [a.ids for a in together] == [a.ids for a in few] == [a.ids for a in alone]
        for one, other in zip(together, alone):
            assert torch.tensor(one.log_probs).sub(torch.tensor(other.log_probs)).abs().max() < 1e-5


@pytest.mark.parametrize("base", ["int8", "nf4", "bf16"])
def test_a_base_in_bf16_or_less_writes_what_its_training_forward_pass_finds_likeliest(kind, model_dir, base):
    """In bf16 two tokens may be equally likely, and another number of rows rounds differently: what is written is nearly
    the likeliest of the training forward pass, and its log-probability nearly the same."""
    stage, given = ours(kind, model_dir, base), prompts()
    for layer in stage.model.model.layers if kind == "qwen3_moe" else ():  # all experts: of equal ones rounding picks another
        layer.mlp.gate.top_k = layer.mlp.gate.num_experts
    answers = generate(stage, given, stop_id=NO_STOP, max_tokens=MAX_TOKENS, batch_rows=3)
    logits, losses = training_logits(stage, given, answers)
    found = torch.tensor([p for answer in answers for p in answer.log_probs])
    assert (found + losses).abs().max() < 0.3 and (found + losses).abs().mean() < 0.02
    best = logits.log_softmax(-1).amax(-1)
    assert (best + losses).max() < 0.3
