"""Whatever a user can get wrong in a configuration is named; everything else arrives as it was written."""

from pathlib import Path

import pytest

from loop.config import load_config, to_yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configurations_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(ROOT / "configs" / name)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


def test_overrides_take_the_type_of_their_field():
    config = load_config(ROOT / "configs/4b.yaml", [
        "run=007", "train.learning_rate=2e-4", "data.sources=a,b", "lora.target=[q_proj, v_proj]", "train.max_steps=5",
        "eval.max_rows=null", "train.recompute=false", "log=/tmp/a=b.log",
    ])
    assert (config.run, config.train.learning_rate, config.data.sources) == ("007", 2e-4, ("a", "b"))
    assert (config.lora.target, config.train.max_steps, config.eval.max_rows) == (("q_proj", "v_proj"), 5, None)
    assert (config.train.recompute, config.log) == (False, "/tmp/a=b.log")


@pytest.mark.parametrize(
    "override, words",
    [
        ("lora.rnk=4", ["lora.rnk=4", "Did you mean: 'rank'"]),
        ("lora.rank=four", ["lora.rank", "four"]),
        ("lora.rank=0", ["lora.rank is 0", "at least 1"]),
        ("train=5", ["train"]),
        ("train.learning_rate=nan", ["train.learning_rate is nan", "finite"]),
        ("model.base=int4", ["model.base", "int4"]),
        ("data.sources=", ["data.sources is empty"]),
        ("train.rows_per_step", ["key=value"]),
        ("run=${oc.env:HOME}", ["${...} is not supported"]),
        ("run=../elsewhere", ["run is '../elsewhere'"]),
        ("eval.every=0", ["eval.every is 0"]),
    ],
)
def test_wrong_overrides_are_named(override, words):
    with pytest.raises(ValueError) as error:
        load_config(ROOT / "configs/4b.yaml", [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "full_key" not in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("run: [", ["not valid YAML"]),
        ("- a\n- b\n", ["expected sections"]),
        ("run: a\nrun: b\n", ["not valid YAML", "run"]),
        ("run: a\nmodell: {}\n", ["modell", "Did you mean: 'model'"]),
        ("run: a\nmodel: {path: x, base: int8}\n", ["missing mandatory value", "lora"]),
        ("run: ${oc.env:HOME}\n", ["not supported"]),
        ("run: !!python/object:os.system x\n", ["not valid YAML"]),
    ],
)
def test_wrong_files_are_named(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    message = str(error.value)
    assert str(path) in message and all(word in message for word in words), message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no.yaml: No such file"):
        load_config(tmp_path / "no.yaml")
