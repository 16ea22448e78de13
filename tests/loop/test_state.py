"""What a run keeps beside adapters and optimizer: tokenizer, template and the like, in its directory and in each checkpoint."""

import json
import shutil

import pytest

from data.chat import ChatFormat
from data.template import tokenizer_files
from loop import checkpoint
from loop.run import load_tokenizer

FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}


def test_a_run_and_its_checkpoints_have_the_files_that_were_trained_with(finished_run, tiny_llama):
    expected = tokenizer_files(ChatFormat(load_tokenizer(tiny_llama), "strip"))
    path = finished_run / "step-00000010"
    manifest = checkpoint.read_json(path / checkpoint.MANIFEST)
    assert expected.keys() == FILES < manifest.keys() == {file.name for file in path.iterdir()} - {checkpoint.MANIFEST}
    for name, content in expected.items():
        assert (finished_run / name).read_bytes() == (path / name).read_bytes() == content


def test_a_resumed_run_writes_only_what_has_changed_and_says_so(finished_run, write_config, run_train, tmp_path, capsys):
    run_dir = tmp_path / "checkpoints/tiny"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "chat_template.jinja").write_text("edited")
    (run_dir / "generation_config.json").unlink()
    before = (run_dir / "tokenizer.json").stat()
    run_train(write_config())
    assert capsys.readouterr().out.count(" is not what this run's model and settings make of it") == 1
    for name in FILES:
        assert (run_dir / name).read_bytes() == (finished_run / name).read_bytes()
    after = (run_dir / "tokenizer.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_is_resumed(write_config, run_train, tmp_path, capsys):
    """It holds adapters and states alone, and its manifest lists no more."""
    config = write_config(checkpoint__keep=9)
    whole = run_train(config)
    run_dir = tmp_path / "checkpoints/tiny"
    shutil.rmtree(run_dir / "step-00000010")
    manifest = checkpoint.read_json(run_dir / "step-00000008" / checkpoint.MANIFEST)
    for name in FILES:
        del manifest[name]
        (run_dir / "step-00000008" / name).unlink()
        (run_dir / name).unlink()
    (run_dir / "step-00000008" / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    capsys.readouterr()
    assert run_train(config) == whole
    assert "continuing from checkpoints/tiny/step-00000008" in capsys.readouterr().out
    assert FILES < {file.name for file in (run_dir / "step-00000010").iterdir()}
