"""Chunked cross-entropy against torch's, with all logits at once."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from loop.memory.ledger import Ledger
from model.devices import taking
from model.ops import loss
from model.ops.loss import supervised_losses

VOCABULARY, HIDDEN = 311, 24


def case(num_positions, dtype):
    torch.manual_seed(num_positions)
    return (torch.randn(num_positions, HIDDEN).to(dtype).requires_grad_(), torch.randn(VOCABULARY, HIDDEN).to(dtype),
            torch.randint(VOCABULARY, (num_positions,)), torch.rand(num_positions))


def test_the_truth_in_float64_within_float32_rounding():
    h, head, labels, weights = case(50, torch.float32)
    losses = supervised_losses(h, head, labels)
    truth_h = h.detach().double().requires_grad_()
    truth = F.cross_entropy(truth_h @ head.double().T, labels, reduction="none")
    (grad,) = torch.autograd.grad(losses, h, weights)
    (truth_grad,) = torch.autograd.grad(truth, truth_h, weights.double())
    assert ((losses - truth).abs().max() / truth.abs().max()).item() < 1e-6
    assert ((grad - truth_grad).norm() / truth_grad.norm()).item() < 1e-6


@pytest.mark.parametrize("num_positions", (0, 1, 16, 17, 50))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_chunks_change_nothing(monkeypatch, num_positions, dtype):
    h, head, labels, weights = case(num_positions, dtype)
    results = []
    for chunk in (16, 1024):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        losses = supervised_losses(h, head, labels)
        results.append((losses.detach(), torch.autograd.grad(losses, h, weights)[0]))
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # a matmul of another height may add up in another order
    for small, large in zip(*results):
        torch.testing.assert_close(small, large, rtol=tolerance, atol=tolerance)


def test_bf16_is_as_close_to_the_truth_as_torch():
    h, head, labels, weights = case(200, torch.bfloat16)
    truth_h, plain_h = h.detach().double().requires_grad_(), h.detach().requires_grad_()
    truth = F.cross_entropy(truth_h @ head.double().T, labels, reduction="none")
    plain = F.cross_entropy((plain_h @ head.T).float(), labels, reduction="none")
    losses = supervised_losses(h, head, labels)
    (grad,), (plain_grad,), (truth_grad,) = (
        torch.autograd.grad(y, x, weights.to(y.dtype)) for y, x in ((losses, h), (plain, plain_h), (truth, truth_h)))
    assert (losses - truth).norm() < 1.02 * (plain - truth).norm()
    assert (grad.double() - truth_grad).norm() < 1.1 * (plain_grad.double() - truth_grad).norm()


def test_without_gradients_none_is_computed():
    h, head, labels, _ = case(5, torch.float32)
    with torch.no_grad():
        assert supervised_losses(h, head, labels).grad_fn is None


@pytest.mark.parametrize("is_compiled, num_bytes", [(True, 2 + 2), (False, 2 + 4 + 2)])
def test_no_more_than_one_chunk_of_logits_exists(is_compiled, num_bytes):
    """With its gradient, and where nothing is compiled also in float32; torch's logsumexp would make a second one of these."""
    vocabulary, hidden = 4000, 8
    h, head = torch.randn(3 * loss.CHUNK, hidden).bfloat16().requires_grad_(), torch.randn(vocabulary, hidden).bfloat16()
    with taking("compiled") if is_compiled else nullcontext(), Ledger(with_sites=False) as ledger:
        supervised_losses(h, head, torch.arange(3 * loss.CHUNK))
    assert ledger.peak < 1.1 * num_bytes * loss.CHUNK * vocabulary
