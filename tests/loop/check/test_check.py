"""The check of a machine: what is right is said to be, what is made wrong is found and named."""

import json
import shutil
import sys
from collections import namedtuple

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import Qwen3_5MoeTextConfig

from loop.check import __main__ as check
from loop.check import kernels as kernels_module
from loop.check import links as links_module
from loop.check import machine as machine_module
from loop.check.findings import Finding, table, verdict
from loop.check.layers import layers
from loop.check.links import links, verify
from loop.check.saving import saving
from loop.config import load_config
from loop.paths import PATHS, Sizes
from model.devices import OFF
from model.tiny.write import write_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"moe": write_tiny(root / "moe", num_hidden_layers=4, full_attention_interval=2),
            "qwen3": write_tiny(root / "qwen3", kind="qwen3", num_hidden_layers=3)}


@pytest.fixture
def run_check(write_config, models, monkeypatch, capsys):
    config = write_config(train__optimizer="adamw8bit")

    def run(kind, *overrides):
        monkeypatch.setattr(sys, "argv", ["check", "--config", str(config), f"model.path={models[kind]}", *overrides])
        with pytest.raises(SystemExit) as stopped:
            check.main()
        return stopped.value.code, capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_machine_that_is_right_passes(run_check, tmp_path):
    """With real ranks for the links."""
    status, said = run_check("moe", "model.base=nf4")
    assert status == 0, said
    assert "WRONG" not in said and "Nothing is wrong with the CPU's paths" in said
    for name in ("GPU", "matmul and copy", "nf4", "adamw8bit", "loss over", "sum over 2 ranks", "rank 1 to rank 0",
                 "layer 2, linear attention", "layer 1, full attention", "checkpoints"):
        assert any(line.strip().startswith("ok") and name in line for line in said.splitlines()), name
    report = json.loads((tmp_path / "checkpoints/tiny/check.json").read_text())
    assert all(finding["problem"] == "" for finding in report["findings"])
    assert report["versions"]["fla-core"] == "not installed"
    assert not list((tmp_path / "checkpoints/tiny").glob(".check-*"))


def no_links(*_):
    return []


@pytest.mark.parametrize("how", ["raises", "zeros", "off by 1 %"])
def test_a_fast_path_that_is_wrong_is_named(run_check, monkeypatch, how):
    honest = bnb.dequantize_4bit

    def broken(*arguments):
        if how == "raises":
            raise RuntimeError("no kernel image is available")
        return honest(*arguments) * (0 if how == "zeros" else 1.01)

    monkeypatch.setattr(bnb, "dequantize_4bit", broken)
    monkeypatch.setattr(check, "links", no_links)
    status, said = run_check("qwen3", "model.base=nf4", "--json")
    assert status == 1 and not OFF
    wrong = [finding for finding in json.loads(said)["findings"] if finding["problem"]]
    assert wrong[0]["name"] == "nf4" and "A run takes instead: dequantizing by a table" in wrong[0]["problem"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, base", [("moe", "nf4"), ("moe", "int8"), ("qwen3", "bf16")])
def test_a_layer_takes_what_is_planned(write_config, models, kind, base):
    config = load_config(write_config(), [f"model.base={base}", "train.microbatch_tokens=256"])
    found = layers(config, models[kind], CPU)
    assert len(found) == (2 if kind == "moe" else 1)
    for finding in found:
        assert finding.problem == ""
        assert finding.numbers["bytes"] == pytest.approx(finding.numbers["planned_bytes"], rel=0.03)


def test_a_disk_that_is_too_small_for_the_checkpoints_is_found(write_config, models, monkeypatch, tmp_path):
    config = load_config(write_config())
    assert saving(config, models["qwen3"]).problem == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10, 10, 0))
    found = saving(config, models["qwen3"])
    assert found.problem.startswith("only 0 GiB are free at ") and "lower checkpoint.keep" in found.problem
    assert not list(config.run_dir.iterdir())


def test_links_that_hang_are_tried_without_direct_transfers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hangs = "rank 0 waited for a hidden state from rank 0 to rank 1: no answer in 10 s"
    monkeypatch.setattr(links_module, "tried", lambda *given: ({"sum": 1.0}, "") if given[3] else ({}, hangs))
    found, = links(2, 64, 8)
    assert found.problem == f"{hangs}. They work with NCCL_P2P_DISABLE=1: put `export NCCL_P2P_DISABLE=1` first"
    monkeypatch.setattr(links_module, "tried", lambda *given: ({}, "it hangs"))
    assert links(2, 64, 8)[0].problem == "it hangs; also with NCCL_P2P_DISABLE=1: it hangs"
    assert links(1, 64, 8)[0].problem == ""


def test_every_fast_path_is_timed():
    assert kernels_module.TIMED.keys() == PATHS.keys()
    sizes = Sizes.of(Qwen3_5MoeTextConfig(), 0).small()
    for name, timed in kernels_module.TIMED.items():
        call, flops, num_bytes = timed(sizes, torch.float32, CPU)
        with torch.no_grad():
            call()
        assert flops > 0 or num_bytes > 0, name


def test_bytes_that_change_on_the_way_are_found():
    verify(torch.ones(9), torch.ones(9))
    with pytest.raises(ValueError, match="1 of 9 numbers arrived with other values"):
        verify(torch.ones(9), torch.ones(9).index_fill(0, torch.tensor([3]), 2))


def test_a_card_that_torch_was_not_built_for_is_found(monkeypatch):
    card = namedtuple("Card", "name major minor total_memory")("NVIDIA GeForce RTX 5090", 12, 0, 32 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    assert "no code for sm_120, only for sm_80, sm_90" in machine_module.card(0, True).problem
    older = namedtuple("Card", "name major minor total_memory")("NVIDIA GeForce RTX 4090", 8, 9, 24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: older)
    assert machine_module.card(0, False).problem == "", "code for sm_80 runs on it"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "compute_130"])
    assert machine_module.card(0, False).problem, "code for later cards is of no use"
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "compute_90"])
    assert machine_module.card(0, False).problem == ""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "sm_120"])
    found = machine_module.card(0, True)
    assert found.problem == "" and "NVIDIA GeForce RTX 5090, sm_120, 32.0 GiB" in found.found
    assert "the delta rule runs in plain torch: fla-core is not installed" in found.found


def test_the_table_and_the_verdict():
    findings = [Finding("machine", "GPU 0", "a card"), Finding("kernels", "nf4", "error 90.00%", "it is wrong")]
    assert table(findings).splitlines() == [
        "machine", "  ok     GPU 0  a card", "", "kernels", "  WRONG  nf4    error 90.00%", "                -> it is wrong"]
    assert verdict(findings, "4b.yaml", on_gpu=True) == "1 of 2 checks found something wrong, see above: nf4."
    assert verdict(findings[:1], "4b.yaml", on_gpu=True) == "Nothing is wrong: this machine can run 4b.yaml."
    assert verdict(findings[:1], "4b.yaml", on_gpu=False).startswith("Nothing is wrong with the CPU's paths. 4b.yaml is meant")


def test_the_page_in_the_docs_is_what_two_cards_would_print(write_config, monkeypatch):
    """Stand-ins play the cards, the links that hang at first, and the kernels' numbers. To change the page, copy what fails."""
    card = namedtuple("Card", "name major minor total_memory")("NVIDIA GeForce RTX 5090", 12, 0, 32 * 2**30)
    cuda = {"is_available": True, "device_count": 2, "get_device_properties": card, "get_arch_list": ["sm_120"],
            "can_device_access_peer": False}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    usage = namedtuple("Usage", "total used free")(0, 0, 200 * 2**30)
    monkeypatch.setattr(machine_module, "driver", lambda: "580.95")
    monkeypatch.setattr(machine_module, "quantizers", lambda: Finding("machine", "bitsandbytes", "0.50.2, with CUDA"))
    monkeypatch.setattr(machine_module.os, "sysconf", lambda name: 64 * 2**30 if "PHYS" in name else 1)
    monkeypatch.setattr(machine_module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(machine_module.Path, "cwd", lambda: machine_module.Path("/home/you/trainer"))
    monkeypatch.setattr(machine_module.Path, "exists", lambda path: path.is_absolute())
    monkeypatch.setenv("HF_HOME", "/home/you/.cache/huggingface")
    monkeypatch.setattr(machine_module.Path, "is_dir", lambda _: True)
    monkeypatch.setattr(machine_module.torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(machine_module.torch.version, "cuda", "13.0")
    monkeypatch.setattr(links_module, "tried", lambda *given: (
        {"sum over 2 ranks": 5.1, "rank 0 to rank 1": 9.8, "rank 1 to rank 0": 9.7}, "") if given[3] else (
        {}, "rank 0 waited for all ranks to join in a sum: no answer in 10 s"))
    config = load_config(write_config(), ["model.path=Qwen/Qwen3.5-35B-A3B"])
    findings = [
        *machine_module.machine(config, has_delta_rule=True),
        Finding("kernels", "matmul and copy", "181 TFLOP/s, 1450 GB/s, torch.bfloat16"),
        Finding("kernels", "attention", "error 0.31% (the plain way 0.30%), 3.10 ms, 110 TFLOP/s, 61% of matmul"),
        Finding("kernels", "nf4", "error 90.00% (the plain way 0.23%)",
                "its results differ by 90.00%, at most 0.80% is rounding. A run takes instead: "
                "dequantizing by a table in plain torch"),
        *links(2, 8192, 2048),
        Finding("memory", "layer 3, full attention", "1.9 GiB at 8,192 tokens, planned 1.9 GiB (+0.4%)"),
        Finding("saving", "checkpoints", "0.2 GiB a checkpoint, 1.0 GiB for all that are kept; written and synced in 0.4 s"),
    ]
    page = f"{table(findings)}\n\n{verdict(findings, 'configs/35b.yaml', on_gpu=True)}"
    with open(check.__file__.replace("loop/check/__main__.py", "docs/checking.md"), encoding="utf-8") as file:
        shown = file.read().partition("<!-- stand-in -->\n```\n")[2].partition("\n```\n<!-- /stand-in -->")[0]
    assert shown == page, page
