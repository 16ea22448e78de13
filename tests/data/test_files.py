"""A file is there whole, the old one or the new one; what is no file is never read."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from data.files import clear_partial, open_regular, write_text, write_whole


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "settings.yaml"
    write_text(path, "old")

    def fails(partial):
        partial.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_whole(path, fails)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["settings.yaml"]


def test_everything_is_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("data.files.sync", lambda path: calls.append((path.name, (tmp_path / "a").exists())))
    write_text(tmp_path / "a", "new")
    assert calls == [("a", False), (tmp_path.name, True)]


def test_leftovers_of_killed_writers_are_cleared(tmp_path):
    (tmp_path / ".rows.partial").mkdir()
    (tmp_path / ".rows.partial" / ".tmpAbC").write_text("x")
    (tmp_path / "kept").write_text("")
    clear_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_access_that_the_umask_grants(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "w.safetensors", lambda file: save_file({"w": torch.ones(2)}, file))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == mode


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, found in ((tmp_path / "fifo", "not a regular file"), ("/dev/zero", "not a regular file"),
                        (tmp_path, "Is a directory"), (tmp_path / "gone", "No such file"), ("a\0b", "null byte")):
        with pytest.raises(ValueError, match=f"{found}.*Expected rows"):
            open_regular(path, "rows")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x")
    with open_regular(tmp_path / "link", "rows") as file:
        assert file.read() == b"x"
