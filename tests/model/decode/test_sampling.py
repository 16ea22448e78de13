"""Which tokens are drawn, how often, and with which probability."""

import pytest
import torch
from transformers import TopPLogitsWarper

from model.decode import sampling as module
from model.decode.sampling import Sampling, choose, least_kept


def test_temperature_0_takes_the_likeliest_and_its_plain_log_probability():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    ids, log_probs = choose(logits, Sampling(top_p=0.1), [0.0, 0.0])
    assert ids == [1, 0]
    assert torch.tensor(log_probs).sub(logits.log_softmax(-1).amax(-1)).abs().max() < 1e-6


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -1}, "temperature is -1, expected 0"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0, expected above 0 and at most 1"), ({"top_p": 1.1}, "top_p is 1.1")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_numbers_depend_on_seed_and_row_alone():
    one = Sampling(1.0, seed=1)
    assert one.numbers(5, 8) == one.numbers(5, 8) == one.numbers(5, 20)[:8]
    assert len({number for row in range(50) for number in one.numbers(row, 8)}) == 400
    assert one.numbers(5, 8) != Sampling(1.0, seed=2).numbers(5, 8)
    assert all(0 <= number < 1 for number in one.numbers(0, 1000))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.5, 0.8), (0.7, 0.3)])
def test_each_token_is_drawn_from_a_share_of_the_numbers_equal_to_its_probability(temperature, top_p):
    """On a grid of numbers the share is exact but for one point of the grid at either end: nothing here is random."""
    torch.manual_seed(0)
    logits, num = torch.randn(1, 40) * 2, 20_000
    ids, log_probs = [], []
    for start in range(0, num, 1000):
        grid = [(i + 0.5) / num for i in range(start, start + 1000)]
        found = choose(logits.expand(1000, -1), Sampling(temperature, top_p), grid)
        ids += found[0]
        log_probs += found[1]
    expected = TopPLogitsWarper(top_p)(None, logits / temperature).softmax(-1)[0] if top_p < 1 else (
        logits / temperature).softmax(-1)[0]
    counts = torch.bincount(torch.tensor(ids), minlength=40)
    assert (counts / num - expected).abs().max() < 1.5 / num
    assert set(torch.tensor(ids).unique().tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert torch.tensor(log_probs).sub(expected[torch.tensor(ids)].log()).abs().max() < 1e-5


def test_rows_of_seeded_numbers_follow_the_distribution():
    """A chi-square of 9 degrees of freedom; the seed is fixed, so that it cannot change from run to run."""
    probabilities = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.03, 0.02, 0.01])
    sampling = Sampling(1.0, seed=3)
    numbers = [number for row in range(400) for number in sampling.numbers(row, 25)]
    ids, _ = choose(probabilities.log().expand(len(numbers), -1), sampling, numbers)
    expected = probabilities * len(numbers)
    chi_square = ((torch.bincount(torch.tensor(ids), minlength=10) - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # exceeded once in 1,000 seeds


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("width", [0.1, 1.0, 5.0])
def test_what_is_kept_is_what_transformers_keeps(top_p, width):
    """From one token to nearly all 3,000, of which only some are sorted at first."""
    torch.manual_seed(1)
    logits = torch.randn(6, 3000, dtype=torch.float64) * width
    p = logits.softmax(-1)
    kept = p >= least_kept(p, top_p)
    assert torch.equal(kept, TopPLogitsWarper(top_p)(None, logits).isfinite())
    assert (p.where(kept, 0).sum(-1) >= top_p).all(), "enough"
    fewest = p.where(kept, 2).amin(-1)
    assert (p.where(kept, 0).sum(-1) - fewest < top_p).all(), "and not one too many"


def test_equally_likely_tokens_at_the_bound_are_all_kept():
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    assert (p >= least_kept(p, 0.5)).tolist() == [[True] * 4]
    assert (p >= least_kept(p, 0.4)).tolist() == [[True, False, False, False]]


def test_how_many_are_looked_at_first_does_not_matter(monkeypatch):
    torch.manual_seed(2)
    logits = torch.randn(8, 2000).bfloat16()  # many are equally likely
    numbers = torch.rand(8).tolist()
    expected = choose(logits, Sampling(1.0, 0.9), numbers)
    for candidates in (1, 7, 500, 2000):
        monkeypatch.setattr(module, "CANDIDATES", candidates)
        assert choose(logits, Sampling(1.0, 0.9), numbers) == expected


def test_the_ends_of_the_interval_draw_tokens_that_are_kept():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert choose(logits, Sampling(1.0), [0.0])[0] == [1]
    assert choose(logits, Sampling(1.0), [1 - 2**-53])[0] == [2]
    ids, log_probs = choose(logits, Sampling(1.0, 0.5), [1 - 2**-53])
    assert ids == [2] and abs(log_probs[0]) < 1e-6
