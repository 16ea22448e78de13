"""Every fast path at the sizes of the configuration's model: does it compute what its plain reference computes, and how fast?
Takes the memory of a layer's largest tensors, in float32 too, and up to a minute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loop.check.findings import Finding, seconds
from loop.config import Config
from loop.optim import make_optimizer
from loop.paths import (
    PATHS,
    Sizes,
    compare,
    random,
    relative,
    routed,
    taken,
    three_segments,
)
from model import delta_rule
from model.devices import taking
from model.matmul import product_in_float32
from model.mixers import stream_attention
from model.ops.gated_delta import CHUNK
from model.ops.loss import supervised_losses
from model.ops.norms import FusedNorm
from model.quant import LINEARS

GPU_TOKENS, CPU_TOKENS = 8192, 32
FEW_EXPERTS = 16  # more of them show nothing more
LOSS_LIMIT = 0.008
RANK = 64  # of the adapter whose gradients are timed


class Rates(NamedTuple):
    """What the device reaches with torch's own matmul and copy."""

    flops: float  # a second
    num_bytes: float  # read and written a second


def kernels(config: Config, model: Any, device: torch.device) -> list[Finding]:
    """A line for the device's own rates, one for each fast path that a run takes, and one for the loss."""
    on_gpu, dtype = device.type == "cuda", torch.float32 if config.model.base == "float32" else torch.bfloat16
    if not on_gpu and torch.backends.cpu.get_cpu_capability() == "AVX2":
        dtype = torch.float32  # without instructions for bf16 a matmul over the vocabulary takes minutes
    sizes = Sizes.of(model, min(config.train.microbatch_tokens, GPU_TOKENS if on_gpu else CPU_TOKENS), config.model.base)
    sizes = replace(sizes, experts=min(sizes.experts, FEW_EXPERTS))
    own = rates(dtype, device)
    found = [Finding("kernels", "matmul and copy", f"{own.flops / 1e12:.3g} TFLOP/s, {own.num_bytes / 1e9:.0f} GB/s, {dtype}",
                     numbers=own._asdict())]
    for name in taken(config, model, device):
        try:
            result = compare(name, sizes, dtype, device)
        except RuntimeError as error:  # such as too little memory for the reference in float32
            found.append(Finding("kernels", name, "not compared", f"{type(error).__name__}: {str(error).splitlines()[0]}"))
            continue
        words = "" if result["error"] is None else f"error {result['error']:.2%} (the plain way {result['plain_error']:.2%})"
        if not result["problem"]:
            result |= measured(*TIMED[name](sizes, dtype, device), own, device)
            words += f", {result['words']}"
        problem = result["problem"] and f"{result['problem']}. A run takes instead: {PATHS[name].instead}"
        found.append(Finding("kernels", name, words or "it does not run", problem, result))
    found.append(loss(model, dtype, device, own))
    return found


def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    size = 4096 if device.type == "cuda" else 256
    a, b = (random(size, size, dtype=dtype, device=device, seed=i) for i in range(2))
    source = torch.empty(2**26 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Rates(2 * size**3 / seconds(lambda: a @ b, device),
                 2 * source.nbytes / seconds(lambda: target.copy_(source), device))


def measured(
    function: Callable[[], object], flops: float, num_bytes: float, own: Rates, device: torch.device
) -> dict[str, Any]:
    """How long a call takes, and the share that it reaches of the rate that limits it."""
    took = seconds(function, device)
    if flops / own.flops > num_bytes / own.num_bytes:
        rate, unit, share = flops / took / 1e12, "TFLOP/s", flops / took / own.flops
    else:
        rate, unit, share = num_bytes / took / 1e9, "GB/s", num_bytes / took / own.num_bytes
    return {"ms": 1000 * took, "rate": rate, "unit": unit, "share": share,
            "words": f"{1000 * took:.2f} ms, {rate:.3g} {unit}, {share:.0%} of {'matmul' if unit == 'TFLOP/s' else 'copy'}"}


# What is timed: a call, its floating-point operations, and the bytes that it must read and write. Forward passes alone.

Timed = Callable[[Sizes, torch.dtype, torch.device], tuple[Callable[[], object], float, float]]


def attention(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    q, k, v = (random(1, s.tokens, heads, s.head_size, dtype=dtype, device=device, seed=i).transpose(1, 2)
               for i, heads in enumerate((s.heads, s.kv_heads, s.kv_heads)))
    segments = three_segments(s.tokens, device)
    pairs = sum(length**2 for length in segments.lengths) / 2
    return (lambda: stream_attention(q, k, v, s.head_size**-0.5, segments), 4 * pairs * s.heads * s.head_size,
            q.nbytes * 2 + k.nbytes * 2)


def cpu_attention(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    call, flops, num_bytes = attention(s, dtype, device)

    def compiled_call() -> object:
        with taking("compiled"):
            return call()
    return compiled_call, flops, num_bytes


def routed_experts(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    experts, x, index, weight = routed(s, dtype, device, top_k=min(s.experts - 1, 8))
    stored = sum(buffer.nbytes for buffer in experts.buffers())
    return lambda: experts(x, index, weight), 6 * index.numel() * s.hidden * s.expert_size, 2 * x.nbytes + stored


def delta(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    channels = (2 * s.key_heads + s.value_heads) * s.delta_size
    qkv = random(1, s.tokens, channels, dtype=dtype, device=device)
    g = -random(1, s.tokens, s.value_heads, dtype=torch.float32, device=device, seed=1).abs()
    weight, segments = random(channels, 1, 4, dtype=dtype, device=device, seed=2), three_segments(s.tokens, device)
    flops = s.tokens * s.value_heads * s.delta_size * (6 * s.delta_size + 8 * CHUNK)
    return (lambda: delta_rule.mixed(qkv, g, g.neg().to(dtype), weight, s.key_heads, s.delta_size, segments), flops,
            2 * qkv.nbytes)


def lora_gradients(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    a, b = (random(s.tokens, size, dtype=dtype, device=device, seed=i) for i, size in enumerate((s.hidden, RANK)))
    return lambda: product_in_float32(a.T, b), 2 * a.numel() * RANK, a.nbytes + b.nbytes


def optimizer(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    weight = torch.nn.Parameter(torch.zeros(s.num_out, s.hidden, device=device))
    weight.grad = torch.ones_like(weight)
    adamw = make_optimizer("adamw8bit", [weight], weight_decay=0.0)
    return adamw.step, 0.0, weight.numel() * (3 * 4 + 4 * 1)  # weight twice, gradient once; both moments twice, a byte each


def compiled(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
    x, h, weight = (random(*shape, dtype=dtype, device=device) for shape in (
        (s.tokens, s.hidden), (s.tokens, s.hidden), (s.hidden,)))
    norm = FusedNorm(weight, 1e-6)

    def call() -> object:
        with taking("compiled"):
            return norm.of_sum(x, h)
    return call, 0.0, 4 * x.nbytes


def dequantizing(base: str, stored: float) -> Timed:
    def timed(s: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float, float]:
        linear = LINEARS[base](s.hidden, s.num_out, dtype, device)
        linear.put(0, random(s.num_out, s.hidden, dtype=torch.bfloat16, device=device))
        return linear.dequantize, 0.0, s.hidden * s.num_out * (stored + dtype.itemsize)
    return timed


TIMED: dict[str, Timed] = {
    "attention": attention, "cpu_attention": cpu_attention, "delta_rule": delta, "grouped_matmul": routed_experts,
    "expert_kernel": routed_experts, "int8": dequantizing("int8", 1), "nf4": dequantizing("nf4", 0.516),
    "lora_gradients": lora_gradients, "compiled": compiled, "adamw8bit": optimizer}


def loss(model: Any, dtype: torch.dtype, device: torch.device, own: Rates) -> Finding:
    """The chunked loss over the model's whole vocabulary, against torch's cross-entropy in float32."""
    num = 256 if device.type == "cuda" else CPU_TOKENS
    h, head = (random(n, model.hidden_size, dtype=dtype, device=device, seed=i, spread=spread)
               for i, (n, spread) in enumerate(((num, 1.0), (model.vocab_size, model.hidden_size**-0.5))))
    labels = torch.arange(num, device=device) * (model.vocab_size // num)

    def both(losses_of: Callable[[Tensor], Tensor], h: Tensor) -> list[Tensor]:
        h = h.requires_grad_()
        losses = losses_of(h)
        return [losses, *torch.autograd.grad(losses.sum(), h)]

    truth = both(lambda x: F.cross_entropy(x @ head.float().T, labels, reduction="none"), h.float())
    error = max(map(relative, both(lambda x: supervised_losses(x, head, labels), h), truth))
    result: dict[str, Any] = {"error": error}
    result |= measured(lambda: supervised_losses(h.detach(), head, labels), 2 * num * head.numel(), head.nbytes, own, device)
    problem = "" if error <= LOSS_LIMIT else (
        f"it differs by {error:.2%} from torch's cross-entropy, at most {LOSS_LIMIT:.1%} is due to rounding")
    words = f"error {error:.2%}, {result['words']}"
    return Finding("kernels", f"loss over {model.vocab_size:,} tokens", words, problem, result)
