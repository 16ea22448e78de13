"""Cross-entropy at supervised positions only, a chunk of logits at a time.
Keeps the gradient of the hidden states (N x D) for the backward pass; while it runs CHUNK rows of logits and of their gradient,
and without compiled code the same once more in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.compiled import compiled

# N supervised positions, C of them in a chunk, D hidden size, V vocabulary

CHUNK_MULTIPLE = 64  # the last chunk is padded: oneDNN keeps a kernel for every shape of a matmul, and N varies
CHUNK = 256  # positions; at Qwen's 151,936 tokens logits and gradient of a chunk in bf16 take 0.15 GiB


def supervised_losses(h_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Loss of each supervised position, [N] in float32, with a frozen head.

    The head needs no gradient, so the forward pass already computes the gradient of the hidden states, from each chunk's
    logits before they are freed. The logits are thus computed only once.
    """
    return ChunkedCrossEntropy.apply(h_ND, head_VD, labels_N)


class ChunkedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(h @ head.T, labels, reduction="none")`, without ever holding all logits."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        losses_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h_ND), CHUNK):
            chunk = slice(start, start + CHUNK)
            h_CD, labels_C = h_ND[chunk], labels_N[chunk]
            num, missing = len(h_CD), -len(h_CD) % CHUNK_MULTIPLE
            if missing:
                h_CD, labels_C = F.pad(h_CD, (0, 0, 0, missing)), F.pad(labels_C, (0, missing))
            if dh_ND is None:
                losses_N[chunk] = cross_entropy(h_CD @ head_VD.T, labels_C[:, None])[:num, 0]
            else:
                losses_C1, dlogits_CV = cross_entropy_and_gradient(h_CD @ head_VD.T, labels_C[:, None])
                losses_N[chunk] = losses_C1[:num, 0]
                dh_ND[chunk] = (dlogits_CV @ head_VD)[:num]
                del dlogits_CV  # before the next chunk's logits, so that only one chunk exists at a time
        if dh_ND is not None:
            ctx.save_for_backward(dh_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor, None, None]:
        (dh_ND,) = ctx.saved_tensors
        return dh_ND * dlosses_N[:, None].to(dh_ND.dtype), None, None


@compiled("loss", read_twice=1)
def cross_entropy(logits_CV: Tensor, labels_C1: Tensor) -> Tensor:
    """The loss of each position, [C, 1] in float32."""
    return log_of_sum(logits_CV) - logits_CV.gather(1, labels_C1)


@compiled("loss", launches=2, read_twice=1)
def cross_entropy_and_gradient(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor]:
    """As `cross_entropy`, and the gradient of the logits: the softmax, less 1 at the label."""
    log_sum_C1, label_logit_C1 = log_of_sum(logits_CV), logits_CV.gather(1, labels_C1)
    # the exponents are computed once more, so that compiled code keeps none of them
    dlogits_CV = less(logits_CV, log_sum_C1).exp_().to(logits_CV.dtype)
    dlogits_CV.scatter_(1, labels_C1, (label_logit_C1 - log_sum_C1).exp_().sub_(1).to(logits_CV.dtype))
    return log_sum_C1 - label_logit_C1, dlogits_CV


def log_of_sum(logits_CV: Tensor) -> Tensor:
    """The logarithm of the sum of exp(logits), [C, 1] in float32, in place of torch's `logsumexp`, which makes two copies."""
    most_C1 = logits_CV.amax(1, keepdim=True).float()
    return less(logits_CV, most_C1).exp_().sum(1, keepdim=True).log_().add_(most_C1)


def less(logits_CV: Tensor, x_C1: Tensor) -> Tensor:
    """logits - x in a float32 tensor of its own, which may be changed in place."""
    return logits_CV.to(torch.float32, copy=True).sub_(x_C1)
