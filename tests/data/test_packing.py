"""Every example goes to exactly one place, evenly, in few microbatches."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import ROUND_TO, balance, best_fit, fewest_bins, pack_step


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(2, 1000), min_size=1, max_size=3), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1000, 3000),
)
def test_a_plan_holds_every_example_once_and_rows_stay_together(groups, num_replicas, microbatch_tokens):
    packing = pack_step(groups, num_replicas, microbatch_tokens)
    lengths = [length for group in groups for length in group]
    placed = [e for replica in packing.microbatches for members in replica for e in members]
    assert sorted(placed) == list(range(len(lengths)))
    fullest = max(sum(lengths[e] for e in members) for replica in packing.microbatches for members in replica)
    assert fullest <= microbatch_tokens
    assert packing.length == math.ceil(fullest / ROUND_TO) * ROUND_TO
    replica_of = {e: r for r, replica in enumerate(packing.microbatches) for members in replica for e in members}
    start = 0
    for group in groups:
        assert len({replica_of[start + i] for i in range(len(group))}) == 1, "a row's examples are on one replica"
        start += len(group)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=12), st.integers(100, 200))
def test_bins_are_as_few_as_best_fit_needs(sizes, capacity):
    bins = fewest_bins(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= capacity for members in bins)
    assert math.ceil(sum(sizes) / capacity) <= len(bins) <= len(best_fit(sizes, capacity))


def test_balance_is_even():
    totals = [sum([1730 + i for i in range(80)][j] for j in members) for members in balance([1730 + i for i in range(80)], 2)]
    assert abs(totals[0] - totals[1]) <= 2


def test_at_least_94_percent_real_tokens_on_the_users_lengths():
    """23,439 rows of about 1,730 tokens, 2,238 at most, 80 a step on two ranks, 8,192 a microbatch."""
    rng = np.random.default_rng(0)
    for spread in (60, 150, 230):
        real = total = 0
        for _ in range(40):
            lengths = np.clip(rng.normal(1730, spread, 80).astype(int), 300, 2238)
            packing = pack_step([[int(n)] for n in lengths], 2, 8192)
            real += lengths.sum()
            total += packing.length * sum(len(replica) for replica in packing.microbatches)
        assert real / total >= 0.94, f"spread {spread}: {real / total:.3f}"
        print(f"spread {spread}: {real / total:.1%} real tokens")
