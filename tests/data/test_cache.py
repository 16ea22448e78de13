"""A damaged cache is found whatever byte is wrong, said, and made again; once zeroed ids trained on token 0 in silence."""

import os

import pytest
import torch

from data.cache import CHECKSUM, read_tensors, write_tensors
from data.config import DataConfig
from data.tokenized import load_rows

TENSORS = {"ids": torch.arange(20, dtype=torch.int32), "meta": torch.tensor([123, 125], dtype=torch.uint8),
           "empty": torch.zeros(0, dtype=torch.int64)}


@pytest.fixture
def cached(tmp_path):
    write_tensors(tmp_path / "train-a.safetensors", TENSORS, "train-*")
    return tmp_path / "train-a.safetensors"


def test_everything_comes_back(cached):
    back = read_tensors(cached)
    assert back.keys() == TENSORS.keys() and all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)
    assert read_tensors(cached.with_name("absent")) is None


def test_every_flipped_bit_and_every_cut_is_found(cached):
    good = cached.read_bytes()
    flipped = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:] for i in range(len(good))]
    cut = [good[:size] for size in range(len(good))]
    for damaged in (*flipped, *cut, bytes(len(good)), good + b"\0"):
        cached.write_bytes(damaged)
        with pytest.raises(ValueError):
            read_tensors(cached)


def test_one_type_or_name_for_another_is_found(cached):
    good = cached.read_bytes()
    for old, new in ((b'"ids"', b'"idz"'), (b'"I32","shape":[20]', b'"F32","shape":[20]')):
        assert good.count(old) == 1
        cached.write_bytes(good.replace(old, new))
        with pytest.raises(ValueError, match=f"its {CHECKSUM} is not"):
            read_tensors(cached)


def test_what_killed_writers_left_is_removed_and_other_files_stay(cached):
    directory = cached.parent
    for name in ("train-old.safetensors", "train-old.partial", ".tmpAb12", "eval-a.safetensors", "notes.txt"):
        (directory / name).write_text("x")
    write_tensors(directory / "train-b.safetensors", TENSORS, "train-*")
    assert sorted(os.listdir(directory)) == ["eval-a.safetensors", "notes.txt", "train-b.safetensors"]


# Through load_rows


@pytest.fixture
def load(tiny_tokenizers, write_rows, make_row, tmp_path):
    path = write_rows([make_row("a", "b"), make_row("Why Nf3?", "It develops.")])
    config = DataConfig(train=path, eval=path, sources=("textbook",))
    return lambda: load_rows("train", tiny_tokenizers["llama"], config, tmp_path / "cache")


def rewritten(file, **changes):
    """Changes tensors and gives them their right checksum."""
    tensors = read_tensors(file) | changes
    write_tensors(file, {name: tensor for name, tensor in tensors.items() if tensor is not None}, "nothing")


def meta(text):
    return torch.tensor(list(text), dtype=torch.uint8)


def zero_ids(file):
    data = bytearray(file.read_bytes())
    data[-200:] = bytes(200)
    file.write_bytes(data)


def as_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [
    zero_ids,
    lambda file: file.write_bytes(file.read_bytes()[:-10]),
    lambda file: file.write_bytes(file.read_bytes()[:20]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
    lambda file: rewritten(file, meta=meta(b"{")),
    lambda file: rewritten(file, meta=meta(b"\xff")),
    lambda file: rewritten(file, meta=meta(b"[]")),
    lambda file: rewritten(file, meta=meta(b"[" * 100_000)),
    lambda file: rewritten(file, meta=meta(b'{"path": "p", "sources": []}')),
    lambda file: rewritten(file, meta=meta(b'{"path": "p", "sources": [], "counts": []}')),
    lambda file: rewritten(file, meta=meta(b'{"path": "p", "sources": [], "counts": {"a": {"nope": 1}}}')),
    lambda file: rewritten(file, meta=None),
    lambda file: rewritten(file, lines=None),
])
def test_a_damaged_cache_is_said_in_a_line_and_made_again(load, tmp_path, capsys, damage):
    first = load()
    (file,) = (tmp_path / "cache").glob("*")
    whole = file.read_bytes()
    damage(file)
    assert capsys.readouterr().err == ""
    again = load()
    said = capsys.readouterr().err
    assert said.startswith(f"{file}: damaged (") and said.endswith("), so it is made again\n") and said.count("\n") == 1
    assert torch.equal(again.ids_N, first.ids_N) and again.counts == first.counts
    assert file.read_bytes() == whole
    assert torch.equal(load().ids_N, first.ids_N) and capsys.readouterr().err == ""


def test_a_pipe_in_the_place_of_the_cache_is_replaced(load, tmp_path):
    first = load()
    (file,) = (tmp_path / "cache").glob("*")
    as_pipe(file)
    assert torch.equal(load().ids_N, first.ids_N) and file.is_file()
