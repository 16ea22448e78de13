"""Schedule, clipping, and optimizer state by name."""

import pytest
import torch
from torch import nn

from loop.distributed.groups import Ranks
from loop.optim import learning_rate, load_optimizer, make_optimizer, named_states, sync_and_clip

ALONE = Ranks()


def test_warmup_is_linear_and_the_cosine_ends_above_zero():
    rates = [learning_rate(step, 100, 1e-3, 0.1, "cosine") for step in range(1, 101)]
    assert rates[:10] == pytest.approx([1e-4 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == rates[10]
    assert all(a >= b for a, b in zip(rates[9:], rates[10:])) and 0 < rates[-1] < 1e-6
    assert learning_rate(55, 100, 1e-3, 0.1, "constant") == 1e-3
    assert learning_rate(1, 1, 1e-3, 0.0, "cosine") == 1e-3


def parameters(seed=0):
    torch.manual_seed(seed)
    return {"a.lora_A": nn.Parameter(torch.randn(8, 700)), "a.lora_B": nn.Parameter(torch.randn(5, 3))}


def test_clipping_scales_to_the_global_norm():
    named = parameters()
    for p in named.values():
        p.grad = torch.randn_like(p)
    before = torch.cat([p.grad.flatten() for p in named.values()])
    norm = sync_and_clip(named.values(), 0.5, ALONE)
    after = torch.cat([p.grad.flatten() for p in named.values()])
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-6)
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_resumed_optimizer_goes_on_bit_by_bit(name):
    def step(optimizer, named, seed):
        torch.manual_seed(seed)
        for p in named.values():
            p.grad = torch.randn_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()

    whole = parameters()
    optimizer = make_optimizer(name, whole.values(), 0.01)
    for seed in range(3):
        step(optimizer, whole, seed)
    tensors = {key: value.clone() for key, value in named_states(optimizer, whole).items()}
    resumed = {key: nn.Parameter(p.detach().clone()) for key, p in whole.items()}
    fresh = make_optimizer(name, resumed.values(), 0.01)
    load_optimizer(fresh, resumed, {**tensors, "other.lora_A/step": torch.tensor(1.0)})
    for seed in range(3, 6):
        step(optimizer, whole, seed)
        step(fresh, resumed, seed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_optimizers_state_is_refused():
    named = parameters()
    tensors = {"a.lora_A/exp_avg": torch.zeros(8, 700)}
    with pytest.raises(ValueError, match="another optimizer"):
        load_optimizer(make_optimizer("adamw8bit", named.values(), 0.0), named, tensors)
