"""The README's Python, run on a tiny run."""

import re
import shutil

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_a_checkpoint_loads_in_the_lines_of_the_readme(finished_run, tmp_path, monkeypatch, capsys):
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
                if "from_pretrained" in block]
    shutil.copytree(finished_run / "step-00000010", tmp_path / "checkpoints/demo/step-00000032")
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README.md", "exec"), {})
    asked, answer = capsys.readouterr().out.split("<|im_start|>assistant\n")
    assert asked == "<|im_start|>user\nWhite plays 5. Nf3. Why?<|im_end|>\n" and answer
