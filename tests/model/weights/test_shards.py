"""The loader delivers what the files hold: bit-equal to transformers, in every layout, in bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.tiny.write import write_tiny
from model.weights.shards import Checkpoint, CheckpointError, Experts, Weight, stream, verify_manifest, wanted_bytes

SMALL = {"num_hidden_layers": 4, "vocab_size": 512}
LAYOUTS = ("fused", "per-expert", "fp8")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {layout: write_tiny(root / layout, layout=layout, scale=1 / 8, **SMALL) for layout in LAYOUTS}


def collect(model: Any, delivered: dict[str, Tensor], prefix: str = "") -> list[Weight | Experts]:
    """Wants every parameter of a transformers model whose name begins with `prefix`, under its own name."""
    wanted: list[Weight | Experts] = []
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix) or name.endswith(".experts.down_proj"):
            continue
        out = delivered[name] = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype)

        def put(start: int, rows: Tensor, out: Tensor = out) -> None:
            out[start : start + len(rows)] = rows

        if name.endswith(".experts.gate_up_proj"):
            num_experts, width, hidden = parameter.shape
            module = name.removesuffix(".gate_up_proj")
            down = torch.full((num_experts, hidden, width // 2), torch.nan).bfloat16()
            delivered[f"{module}.down_proj"] = down

            def put_expert(e: int, gate_up: Tensor, down_DI: Tensor, out: Tensor = out, down: Tensor = down) -> None:
                out[e], down[e] = gate_up, down_DI

            wanted.append(Experts(module, num_experts, hidden, width // 2, put_expert))
        else:
            wanted.append(Weight(name, tuple(parameter.shape), put))
    return wanted


def ignore(*_: Any) -> None:
    """Takes what is put and keeps nothing."""


def wants(directory: Path, put: Callable[..., Any] = ignore) -> list[Weight | Experts]:
    return [Weight(name, info.shape, put) for name, info in Checkpoint(directory).tensors.items()]


def save(directory: Path, tensors: dict[str, Tensor], file: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / file)
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slice_bytes", [5000, 8 * 2**20])
def test_equals_transformers(checkpoints: dict[str, Path], layout: str, slice_bytes: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints[layout], dtype=torch.bfloat16, trust_remote_code=False)
    delivered: dict[str, Tensor] = {}
    wanted = collect(model, delivered)
    num_read: list[int] = []
    stream(Checkpoint(checkpoints[layout]), wanted, progress=num_read.append, slice_bytes=slice_bytes)
    parameters = dict(model.named_parameters())
    assert delivered.keys() == parameters.keys() and len(delivered) == 72
    assert [name for name in parameters if not torch.equal(parameters[name], delivered[name])] == []
    assert sum(num_read) == wanted_bytes(Checkpoint(checkpoints[layout]), wanted) > 3_000_000


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("layout", ["fused", "fp8"])
def test_dense_models_equal_transformers(tmp_path: Path, kind: str, layout: str) -> None:
    model_dir = write_tiny(tmp_path, kind=kind, layout=layout, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, trust_remote_code=False)
    delivered: dict[str, Tensor] = {}
    stream(Checkpoint(model_dir), collect(model, delivered), slice_bytes=5000)
    assert [name for name, value in model.named_parameters() if not torch.equal(value, delivered[name])] == []


def test_both_layouts_deliver_the_same_experts(checkpoints: dict[str, Path]) -> None:
    delivered: dict[str, dict[int, tuple[Tensor, Tensor]]] = {"fused": {}, "per-expert": {}}
    for layout, experts in delivered.items():
        checkpoint = Checkpoint(checkpoints[layout])
        names = {"model.layers.2.mlp.experts"} | {n for n in checkpoint.tensors if "layers.2.mlp.experts" not in n}

        def put(e: int, gate_up: Tensor, down: Tensor, experts: dict[int, tuple[Tensor, Tensor]] = experts) -> None:
            experts[e] = gate_up, down

        stream(checkpoint, [Experts("model.layers.2.mlp.experts", 32, 256, 64, put)], all_names=names)
    assert delivered["fused"].keys() == delivered["per-expert"].keys() == set(range(32))
    for e, (gate_up, down) in delivered["fused"].items():
        assert torch.equal(gate_up, delivered["per-expert"][e][0]) and torch.equal(down, delivered["per-expert"][e][1])
    gate = Checkpoint(checkpoints["per-expert"]).read_rows("model.layers.2.mlp.experts.7.gate_proj.weight", 0, 64)
    assert torch.equal(delivered["fused"][7][0][:64], gate)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 131), (257, 7)])
def test_fp8_equals_reference(tmp_path: Path, shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    """Every code, NaN included, edge blocks, the scale in another shard, slices that begin inside a block."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)).to(scale_dtype)
    save(tmp_path, {"w.weight": codes.view(torch.float8_e4m3fn)}, "a.safetensors")
    save(tmp_path, {"w.weight_scale_inv": scale}, "b.safetensors")
    blown_up = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    reference = (codes.view(torch.float8_e4m3fn).float() * blown_up).bfloat16()
    checkpoint = Checkpoint(tmp_path)
    torch.testing.assert_close(checkpoint.read_rows("w.weight", 0, shape[0]), reference, rtol=0, atol=0, equal_nan=True)
    middle = checkpoint.read_rows("w.weight", shape[0] // 3, shape[0] // 3 * 2)
    torch.testing.assert_close(middle, reference[shape[0] // 3 : shape[0] // 3 * 2], rtol=0, atol=0, equal_nan=True)
    delivered = torch.zeros(shape).bfloat16()

    def put(start: int, rows: Tensor) -> None:
        delivered[start : start + len(rows)] = rows

    stream(checkpoint, [Weight("w.weight", shape, put)], slice_bytes=20_000)
    torch.testing.assert_close(delivered, reference, rtol=0, atol=0, equal_nan=True)


def test_stage_reads_only_its_own_bytes(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["per-expert"], dtype=torch.bfloat16, trust_remote_code=False)
    checkpoint = Checkpoint(checkpoints["per-expert"])
    wanted = collect(model, {}, prefix="model.layers.1.")
    own = {name: info for name, info in checkpoint.tensors.items() if name.startswith("model.layers.1.")}
    spans: list[tuple[Any, int, int]] = []
    preadv = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        spans.append((os.readlink(f"/proc/self/fd/{fd}"), offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    stream(checkpoint, wanted, all_names=[name for name, _ in model.named_parameters()])
    assert sorted(spans) == sorted((str(info.file), info.start, info.end) for info in own.values())
    assert sum(end - start for _, start, end in spans) == wanted_bytes(checkpoint, wanted)


def test_rows_come_in_order_in_multiples_of_128(tmp_path: Path) -> None:
    weight = torch.arange(1000 * 8).view(1000, 8).float()
    save(tmp_path, {"w": weight})
    delivered: list[tuple[int, Tensor]] = []
    stream(Checkpoint(tmp_path), [Weight("w", (1000, 8), lambda *rows: delivered.append(rows))], slice_bytes=10_000)
    assert [(start, len(rows)) for start, rows in delivered] == [(0, 256), (256, 256), (512, 256), (768, 232)]
    assert torch.equal(torch.cat([rows for _, rows in delivered]), weight), "tensors that put keeps must stay valid"


def test_reads_follow_the_files(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int]] = []
    preadv = os.preadv
    checkpoint = Checkpoint(checkpoints["fused"])
    wanted = [Weight(name, info.shape, ignore) for name, info in reversed(checkpoint.tensors.items())]
    monkeypatch.setattr(os, "preadv", lambda fd, b, offset: places.append((fd, offset)) or preadv(fd, b, offset))
    stream(checkpoint, wanted, slice_bytes=5000)
    assert places == sorted(places) and len(places) > 100


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save(tmp_path, {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "thin": torch.empty(3, 0)})
    delivered: dict[str, list[Any]] = {"scalar": [], "empty": [], "thin": []}
    stream(Checkpoint(tmp_path), wants(tmp_path, lambda start, rows: delivered["scalar"].append((start, rows.item()))))
    assert delivered == {"scalar": [(0, 2.5)], "empty": [], "thin": []}
    assert Checkpoint(tmp_path).read_rows("thin", 1, 3).shape == (2, 0)


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    save(tmp_path, {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4), "model.visual.x": torch.zeros(1),
                    "mtp.y": torch.zeros(1)})
    wanted = [Weight("a.weight", (3, 2), ignore), Weight("c.weight", (1,), ignore)]
    with pytest.raises(CheckpointError) as error:
        stream(Checkpoint(tmp_path), wanted)
    assert str(tmp_path) in str(error.value)
    assert "1 tensors are missing: 'c.weight'" in str(error.value)
    assert "1 tensors are unexpected: 'b.weight'" in str(error.value)
    assert "'a.weight' in model.safetensors: (2, 3), expected (3, 2)" in str(error.value)


def test_one_expert_too_many_or_too_few(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint(checkpoints["per-expert"])
    for num_experts, problem in ((31, "3 tensors are unexpected: 'model.layers.1.mlp.experts.31"),
                                 (33, "3 tensors are missing: 'model.layers.1.mlp.experts.32")):
        with pytest.raises(CheckpointError, match=problem):
            stream(checkpoint, [Experts("model.layers.1.mlp.experts", num_experts, 256, 64, ignore)],
                   all_names=checkpoint.tensors.keys())


def test_tied_head(tmp_path: Path) -> None:
    embedding = torch.randn(300, 4).bfloat16()
    want_embedding = Weight("model.embed_tokens.weight", (300, 4), ignore)
    head = torch.zeros(300, 4).bfloat16()

    def put(start: int, rows: Tensor) -> None:
        head[start : start + len(rows)] = rows

    want_head = Weight("lm_head.weight", (300, 4), put)
    absent = Checkpoint(save(tmp_path / "absent", {"model.embed_tokens.weight": embedding}))
    stream(absent, [want_embedding])
    with pytest.raises(CheckpointError, match="missing: 'lm_head.weight'"):
        stream(absent, [want_embedding, want_head])
    stream(absent, [want_embedding, want_head], tied=True, slice_bytes=1500)
    assert torch.equal(head, embedding)
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    stream(Checkpoint(save(tmp_path / "present", both)), [want_embedding])
    both["lm_head.weight"][299, 3] += 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        stream(Checkpoint(save(tmp_path / "differs", both)), [want_embedding])


def test_experts_of_two_dtypes(tmp_path: Path) -> None:
    save(tmp_path, {"m.experts.gate_up_proj": torch.zeros(2, 4, 3), "m.experts.down_proj": torch.zeros(2, 3, 2).half()})
    with pytest.raises(CheckpointError, match="expected one dtype"):
        stream(Checkpoint(tmp_path), [Experts("m.experts", 2, 3, 2, ignore)])


def test_exception_in_put_stops_the_reader(checkpoints: dict[str, Path]) -> None:
    def put(start: int, rows: Tensor) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        stream(Checkpoint(checkpoints["fused"]), wants(checkpoints["fused"], put), slice_bytes=5000)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("shard-reader")] == []


def test_what_put_keeps_never_changes(checkpoints: dict[str, Path]) -> None:
    kept: dict[str, Tensor] = {}
    checkpoint = Checkpoint(checkpoints["fused"])
    wanted = [Weight(name, info.shape, lambda start, rows, name=name: kept.setdefault(f"{name} {start}", rows))
              for name, info in checkpoint.tensors.items()]
    stream(checkpoint, wanted, slice_bytes=5000)
    assert len(kept) > 500
    for key, rows in kept.items():
        name, start = key.split()
        assert torch.equal(rows, checkpoint.read_rows(name, int(start), int(start) + len(rows)))


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Streaming 240 MB costs three buffers of 8 MiB and little else."""
    save(tmp_path, {f"w{i}": torch.zeros(10_000, 2000).bfloat16() for i in range(6)})
    checkpoint, resident = Checkpoint(tmp_path), []

    def put(start: int, rows: Tensor) -> None:
        with open("/proc/self/statm") as statm:
            resident.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    stream(checkpoint, wants(tmp_path, put)[:1], all_names=checkpoint.tensors.keys())  # what torch allocates once
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    stream(checkpoint, wants(tmp_path, put))
    assert max(resident) - before < 32 * 2**20


def test_names_of_a_wrapped_model(tmp_path: Path) -> None:
    save(tmp_path, {"model.language_model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(3, 2),
                    "model.visual.norm.weight": torch.ones(2), "mtp.norm.weight": torch.ones(2)})
    assert Checkpoint(tmp_path).tensors.keys() == {"model.norm.weight", "lm_head.weight"}


def test_tiny_shards_hold_what_safetensors_reads(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint(checkpoints["fused"])
    stored = {name: value for file in checkpoints["fused"].glob("*.safetensors") for name, value in
              load_file(file).items()}
    for name, info in checkpoint.tensors.items():
        assert torch.equal(stored[info.name].reshape(info.shape), checkpoint.read_rows(name, 0, info.shape[0]))
    assert len(stored) == len(checkpoint.tensors) + 8, "the vision tower's and the prediction head's are ignored"


def test_no_manifest(tmp_path: Path) -> None:
    assert verify_manifest(save(tmp_path, {"w": torch.ones(2)})) is False
