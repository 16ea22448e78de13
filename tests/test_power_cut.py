"""Two power cuts, and that losses are noticed; `python -m tests.power_cut` makes 32."""

import shutil

import pytest

from tests import power_cut


@pytest.mark.slow
def test_after_a_power_cut_all_that_was_reported_is_on_the_disk_and_a_resume_ends_like_the_uninterrupted_run(tmp_path):
    if why := power_cut.missing():
        pytest.skip(why)
    cuts = power_cut.Cuts(tmp_path, seed=4)
    outcomes = [cuts.cut(number) for number in range(2)]
    assert [wrong for wrong, _ in outcomes] == [{}, {}]
    assert sum(saved for _, saved in outcomes) >= 2, "the cuts come after a checkpoint was reported"

    left = tmp_path / "left"
    shutil.copytree(cuts.whole, left)
    assert cuts.left(left, ["step-00000008"]) == {}
    (left / "config.yaml").write_text("")
    (left / "metrics.jsonl").write_text((left / "metrics.jsonl").read_text()[:-40])
    (left / "step-00000008/state.json").write_text("")
    wrong = cuts.left(left, ["step-00000007", "step-00000008"])
    assert wrong.keys() == {"lost", "torn", "config", "metrics"}
    assert wrong["lost"].startswith("step-00000007 had been saved") and wrong["config"] == "config.yaml has 0 bytes"
