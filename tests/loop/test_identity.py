"""A run goes on with the model that it was trained on, to the bit, or says what is another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def begun(write_config, run_train, tiny_llama, tmp_path):
    """A run of two steps on a copy of the model, and its configuration for four."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = write_config(model__path=str(model), train__max_steps=4, checkpoint__every=2, checkpoint__keep=9)
    run_train(config)
    shutil.rmtree(tmp_path / "checkpoints/tiny/step-00000004")
    return model, config


@pytest.mark.parametrize("key, value", [("rope_theta", 7.0), ("rms_norm_eps", 0.01), ("hidden_act", "gelu")])
def test_another_config_json_is_noticed_before_the_weights_are_read(begun, run_train, monkeypatch, key, value):
    """Found: the run continued, with a loss of 5.97 where 5.04 was due."""
    model, config = begun
    settings = json.loads((model / "config.json").read_text())
    if key == "rope_theta" and "rope_parameters" in settings:
        settings["rope_parameters"]["rope_theta"] = value
    else:
        settings[key] = value
    (model / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("model.build.stream", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="step-00000002 was trained with other settings: base model was .*, is "):
        run_train(config)


def flip(model, name, byte):
    """Flips a bit of a tensor where no sampled block is."""
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1).view(dtype=torch.uint8)[byte] ^= 1
    save_file(tensors, file, {"format": "pt"})


def test_one_flipped_bit_is_found_before_the_first_step_and_its_tensor_named(begun, run_train, read_metrics, tmp_path):
    model, config = begun
    name = "model.layers.1.mlp.down_proj.weight"
    before = (tmp_path / "checkpoints/tiny/metrics.jsonl").read_bytes()
    flip(model, name, 4999)
    with pytest.raises(ValueError, match=rf"weights was .*, is .*1 tensor\(s\) differ, {name}; download .*model again"):
        run_train(config)
    assert (tmp_path / "checkpoints/tiny/metrics.jsonl").read_bytes() == before, "nothing was trained"
    assert run_train(config, "resume=force", "checkpoint.every=1")[-1]["step"] == 4
    shutil.rmtree(tmp_path / "checkpoints/tiny/step-00000004")
    flip(model, name, 4999)  # now the mended model is another one
    with pytest.raises(ValueError, match="weights was"):
        run_train(config)


def test_the_same_model_in_another_place_and_other_shards_is_the_same(begun, run_train, tmp_path):
    model, config = begun
    model.rename(tmp_path / "moved")
    tensors = {}
    for file in (tmp_path / "moved").glob("*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"moved/part-{number}.safetensors")
    assert run_train(config, f"model.path={tmp_path / 'moved'}")[-1]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "pipeline_train.py"])
def test_a_stage_or_another_host_with_other_weights_is_named(begun, tmp_path, script):
    """Ranks stand for hosts: each reads a model directory of its own."""
    model, config = begun
    shutil.copytree(model, tmp_path / "other")
    flip(tmp_path / "other", "model.layers.1.mlp.down_proj.weight", 4999)
    (tmp_path / "by_rank.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"if os.environ['RANK'] == '1':\n    sys.argv.append('model.path={tmp_path / 'other'}')\n"
        f"import runpy\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n")
    shutil.copytree(tmp_path / "checkpoints/tiny", tmp_path / "checkpoints/again")  # this process has locked the first one
    run = Run(tmp_path / "by_rank.py", "--config", config, "run=again", ranks=2, directory=tmp_path)
    status = run.wait()
    assert 2 in status and 0 not in status, run.said
    assert "model.layers.1.mlp.down_proj.weight" in run.stderr and "step 3" not in run.stdout and "Traceback" not in run.said
