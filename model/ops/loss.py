"""Cross-entropy at supervised positions only, a chunk of logits at a time.
Keeps the gradient of the hidden states (N x D) for the backward pass, and at most CHUNK rows of logits while it runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# N supervised positions, C of them in a chunk, D hidden size, V vocabulary

CHUNK_MULTIPLE = 64  # the last chunk is padded: oneDNN keeps a kernel for every shape of a matmul, and N varies
CHUNK = 256  # positions; at Qwen's 151,936 tokens a chunk of float32 logits takes 0.15 GiB


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
            logits_CV = (h_CD @ head_VD.T).float()
            label_C1 = labels_C[:, None]
            most_C1, label_logit_C1 = logits_CV.amax(-1, keepdim=True), logits_CV.gather(1, label_C1)
            exp_CV = logits_CV.sub_(most_C1).exp_()  # in place of the logits; torch's `logsumexp` would make a second one
            sum_C1 = exp_CV.sum(-1, keepdim=True)
            losses_N[chunk] = (sum_C1.log() + most_C1 - label_logit_C1)[:num, 0]
            if dh_ND is not None:
                dlogits_CV = exp_CV.div_(sum_C1)  # the softmax
                dlogits_CV.scatter_add_(1, label_C1, torch.full_like(label_C1, -1, dtype=torch.float32))
                dh_ND[chunk] = (dlogits_CV.to(h_ND.dtype) @ head_VD)[:num]
                del dlogits_CV
            del logits_CV, exp_CV  # before the next chunk's logits, so that only one chunk exists at a time
        if dh_ND is not None:
            ctx.save_for_backward(dh_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor, None, None]:
        (dh_ND,) = ctx.saved_tensors
        return dh_ND * dlosses_N[:, None].to(dh_ND.dtype), None, None
