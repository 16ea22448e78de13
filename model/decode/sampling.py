"""Which token comes next: the likeliest, or one drawn from the tempered, truncated distribution with the row's own numbers.
Costs four copies of the logits [B, V] in float32, and 8 bytes for every token that a row may still draw."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# B rows, V vocabulary, N likeliest tokens

CANDIDATES = 64  # how many of the likeliest tokens are looked at first; nearly always they hold top_p


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Its log-probability is that under the distribution it was drawn from: softmax(logits / temperature), cut to the likeliest
    tokens that together have at least `top_p`, and normalized again. A greedy token's is that under softmax(logits).
    """

    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # 1: no token is left out
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (the likeliest token) to 100")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected above 0 and at most 1 (no token is left out)")

    def numbers(self, row: int, num_tokens: int) -> list[float]:
        """Uniform numbers, one for each token of a row, which depend on the seed and the row's number alone."""
        if self.temperature == 0:
            return [0.0] * num_tokens
        digest = hashlib.sha256(f"{self.seed} {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        numbers: list[float] = torch.rand(num_tokens, dtype=torch.float64, generator=generator).tolist()
        return numbers


def choose(logits_BV: Tensor, sampling: Sampling, numbers: list[float]) -> tuple[list[int], list[float]]:
    """The next token of each row, and its log-probability. Waits for the device.

    Args:
        numbers: one of `Sampling.numbers` for each row.
    """
    if sampling.temperature == 0:
        logits_BV = logits_BV.float()  # on a CPU also the maximum is found faster among float32 numbers
        chosen_B1 = logits_BV.argmax(-1, keepdim=True)
        log_p_BV = logits_BV.log_softmax(-1)
        return chosen_B1[:, 0].tolist(), log_p_BV.gather(1, chosen_B1)[:, 0].tolist()
    log_p_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    p_BV = log_p_BV.exp()
    if sampling.top_p < 1:
        p_BV = p_BV.where(p_BV >= least_kept(p_BV, sampling.top_p), 0)
    upto_BV = p_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = upto_BV[:, -1:].contiguous()
    numbers_B1 = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)[:, None]
    drawn_B1 = torch.searchsorted(upto_BV, numbers_B1 * total_B1, right=True)
    last_B1 = torch.searchsorted(upto_BV, total_B1)  # of the kept tokens; a product above may be rounded up to the total
    chosen_B1 = torch.minimum(drawn_B1, last_B1)
    log_p_B1 = log_p_BV.gather(1, chosen_B1)
    if sampling.top_p < 1:
        log_p_B1 = log_p_B1 - total_B1.log()
    return chosen_B1[:, 0].tolist(), log_p_B1[:, 0].tolist()


def least_kept(p_BV: Tensor, top_p: float) -> Tensor:
    """The probability of the last of the likeliest tokens that together have at least `top_p`: [B, 1].

    Equally likely tokens are all kept or all left out: which of them comes first would depend on how they are sorted.
    """
    num_tokens = p_BV.shape[1]
    num = min(CANDIDATES, num_tokens)
    while True:
        p_BN = p_BV.topk(num, dim=-1).values if num < num_tokens else p_BV.sort(-1, descending=True).values
        before_BN = p_BN.cumsum(-1, dtype=torch.float64) - p_BN  # what the likelier ones have together
        if num == num_tokens or bool((before_BN[:, -1] >= top_p).all()):
            break
        num = min(8 * num, num_tokens)
    last_B1 = (before_BN < top_p).sum(-1, keepdim=True) - 1
    return p_BN.gather(1, last_B1)
