"""lm/files.py: what is written is whole or not there."""

import errno
import resource

import pytest
import torch
from safetensors.torch import save_file

from lm.files import (
    chunks,
    digest,
    fingerprint,
    read_json,
    read_jsonl,
    sub_seed,
    write_atomic,
    write_json,
    write_jsonl,
)


def test_round_trips(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"é": [1, None]})
    assert read_json(tmp_path / "a" / "x.json") == {"é": [1, None]}
    write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"b": "\u2028"}])
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"b": "\u2028"}]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "cause, seen, said",
    [
        (FULL, SystemExit, r"cannot write .*x\.json: No space left on device"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full", "interrupted"],
)
def test_half_a_file_is_none_and_the_old_one_stays(cause, seen, said, tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})

    def write(path):
        path.write_text("half")
        raise cause

    with pytest.raises(seen, match=said):
        write_atomic(tmp_path / "x.json", write)
    assert read_json(tmp_path / "x.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path):
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "config.json").write_text("half")
    write_atomic(tmp_path / "model", lambda path: path.mkdir())
    assert [*tmp_path.rglob("*")] == [tmp_path / "model"]


def test_a_full_disk_while_writing_tensors(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"cannot write .*x\.safetensors"):
            write_atomic(
                tmp_path / "x.safetensors", lambda p: save_file({"x": torch.zeros(10_000)}, p)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_bad_json_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b":')
    with pytest.raises(SystemExit, match=r"x\.jsonl line 2 is not valid JSON"):
        read_jsonl(tmp_path / "x.jsonl")


def test_sub_seeds_differ():
    assert len({sub_seed(s, k, j) for s in range(5) for k in range(5) for j in range(5)}) == 125
    assert sub_seed(1, 2) == sub_seed(1, 2)


def test_a_few_at_a_time():
    assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]] and chunks([], 2) == []


def test_a_files_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"bricks")
    assert digest(tmp_path / "x") == fingerprint(b"bricks") != fingerprint(b"brick")
    assert len(fingerprint(b"")) == 12
    with pytest.raises(SystemExit, match="cannot read"):
        digest(tmp_path / "y")
