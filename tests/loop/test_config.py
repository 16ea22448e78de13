"""Whatever a user can get wrong in a configuration is named; everything else arrives as it was written."""

import subprocess
import sys
from pathlib import Path

import pytest

from loop.config import by_name, load_config, to_yaml
from loop.config.command_line import as_markdown, sections

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
        ("seed=3", ["seed=3: Key 'seed'", "Did you mean: train.seed?"]),
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
        (f"train.seed={2**70}", [f"train.seed is {2**70}, expected 0 to 9,223,372,036,854,775,807"]),
        ("train.seed=-1", ["train.seed is -1"]),
        ("train.seed=" + "9" * 5000, ["train.seed=9", "could not be converted to Integer"]),
        ("train.learning_rate=1e308", ["train.learning_rate is 1e+308, expected a finite number from 1e-12 to 1"]),
        ("train.learning_rate=0", ["train.learning_rate is 0.0"]),
        ("train.weight_decay=1e308", ["train.weight_decay is 1e+308, expected a finite number from 0 to 100"]),
        ("train.max_grad_norm=1e308", ["train.max_grad_norm is 1e+308"]),
        ("train.max_steps=1e18", ["train.max_steps", "could not be converted to Integer"]),
        (f"train.max_steps={10**18}", ["train.max_steps is 1000000000000000000, expected 1 to 10,000,000, or null"]),
        (f"train.epochs={10**9}", ["train.epochs is 1000000000, expected 1 to 100,000"]),
        (f"distributed.timeout_s={10**12}", ["distributed.timeout_s is 1000000000000, expected 1 to 604,800 seconds"]),
        ("lora.alpha=1e308", ["lora.alpha is 1e+308", "at most 1,000,000"]),
        ("lora.alpha=0", ["lora.alpha is 0.0", "above 0"]),
        (f"lora.rank={10**18}", ["lora.rank is 1000000000000000000", "at most 65,536"]),
        (f"data.max_tokens={10**18}", ["data.max_tokens is 1000000000000000000", "at most 16,777,216"]),
        ("a." * 100_000 + "b=1", ["a.a.a.", "no such setting"]),
        ("train" + ".x" * 100_000 + "=1", ["train.x.x", "no such setting"]),
        ("pipeline.split=" + "[" * 100_000 + "x", ["pipeline.split is 'x'"]),
        ("pipeline.split=" + "x" * 100_000, ["pipeline.split is 'xxx", "or auto"]),
        ("train=" + "{a: " * 100_000, ["train={a: {a:"]),
        ("run=" + "x" * 100_000, ["run is 'xxx", "expected a name of letters"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_overrides_are_named(override, words):
    with pytest.raises(ValueError) as error:
        load_config(ROOT / "configs/4b.yaml", [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "full_key" not in message and len(message) < 500


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
        ("run: " + "[" * 100_000, ["over 65,536 bytes"]),  # the parser in C would overflow its stack
        ("run: " + "[" * 60_000, ["nest"]),
        ("".join(" " * i + "a:\n" for i in range(300)), ["line 11 is nested more than 10 deep"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ["line 2 has an alias, *a, which is not supported"]),
        ("run: " + "9" * 5000, ["not valid YAML", "Exceeds the limit"]),
        ("run: \0", ["not valid YAML", "#x0000"]),
        ("7", ["expected sections such as model: and train:, found '7'"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_files_are_named(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    message = str(error.value)
    assert str(path) in message and all(word in message for word in words), message


def test_a_file_without_an_end_is_not_read_whole():
    with pytest.raises(ValueError, match="/dev/zero: over 65,536 bytes"):
        load_config("/dev/zero")


def test_the_place_of_a_wrong_value_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text((ROOT / "configs/4b.yaml").read_text().replace("seed: 42", "seed: -1"))
    for overrides, place in (([], path), (["train.epochs=2"], path), (["train.epochs=2", "train.seed=-2"], "train.seed=-2")):
        with pytest.raises(ValueError) as error:
            load_config(path, overrides)
        assert str(error.value).startswith(f"{place}: train.seed is -"), error.value


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no.yaml: No such file"):
        load_config(tmp_path / "no.yaml")


def test_each_setting_is_explained():
    """docs/settings.md is what `python -m loop.config.command_line` prints."""
    settings = {setting.name: setting for _, _, of_section in sections() for setting in of_section}
    config = load_config(ROOT / "configs/4b.yaml")
    assert settings.keys() == by_name(config).keys() | {"run", "resume", "log", "log_to"}
    assert not [setting.name for setting in settings.values() if not setting.meaning or not setting.values]
    assert (ROOT / "docs/settings.md").read_text() == as_markdown() + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["train.py"], ["pipeline_train.py"], ["-m", "loop.inspect"], ["-m", "loop.plan"], ["-m", "loop.check"],
], ids=lambda command: command[-1])
def test_help_lists_every_setting(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = [setting for _, _, of_section in sections() for setting in of_section]
    assert not [setting.name for setting in settings if f"  {setting.name}" not in done.stdout]
