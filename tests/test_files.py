"""lm/files.py: what is written is whole or not there."""

import errno
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from data.qa import load_passages
from lm.files import (
    GOES_ON,
    check_output,
    chunks,
    digest,
    fingerprint,
    read_json,
    read_jsonl,
    run_main,
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


GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize("last", [b'{"b":', b'{"b": "\xc5', b"\x00\x00\x00"])
def test_a_cut_last_record_is_left_out(last, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(GOOD + last)
    with pytest.raises(SystemExit, match=r"x\.jsonl line 2 is not valid JSON"):
        read_jsonl(tmp_path / "x.jsonl")
    assert read_jsonl(tmp_path / "x.jsonl", resume=True) == [{"a": 1}]
    assert capsys.readouterr().err.endswith("x.jsonl: the last line is damaged; left out\n")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"b":\n' + GOOD, "line 1 is not valid JSON"),
        (b'{"b": "\xff"}\n' + GOOD, "line 1 is not valid JSON"),
        (b"[" * 100_000 + b"\n" + GOOD, "line 1 is nested too deep"),
        (GOOD + b"[1]", r"line 2 must be a JSON object, not \[1\]"),
    ],
)
def test_any_other_bad_line_is_named(content, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"x\.jsonl {message}"):
        read_jsonl(tmp_path / "x.jsonl", resume=True)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "is nested too deep to be read"),
        (b'{"a":' * 100_000, "is nested too deep to be read"),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', "'a' stands twice in one object"),
        (b'{"a": "\xff"}', "is not valid JSON: 'utf-8' codec"),
    ],
)
def test_bad_json_is_one_line(content, message, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^error: .*x\.json:? {message}"):
        read_json(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_json(tmp_path / "x.json") == {"a": 1} == read_jsonl(tmp_path / "x.json")[0]


def test_a_file_that_does_not_end_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.json").symlink_to("/dev/zero")
    for read in (read_json, read_jsonl, digest):
        for path, why in ((tmp_path / "x.json", "it is not a reg"), (tmp_path, "it is not a reg")):
            with pytest.raises(SystemExit, match=f"cannot read {path}: {why}"):
                read(path)
    (tmp_path / "y.json").write_bytes(GOOD)
    monkeypatch.setattr("lm.files.LARGEST", len(GOOD) - 1)
    with pytest.raises(SystemExit, match=r"cannot read .*y\.json: it is larger than"):
        read_json(tmp_path / "y.json")


def test_json_that_would_take_gigabytes(tmp_path, monkeypatch):
    """Each value counts, a list's and an object's, of all lines together."""
    monkeypatch.setattr("lm.files.VALUES", 9)
    path = tmp_path / "x.json"
    path.write_text('{"a": [{}, {}, {}, {}]}')  # six that open, three commas
    assert read_json(path)["a"] == [{}] * 4
    path.write_text('{"a": [{}, {}, {}, {}, {}]}')
    with pytest.raises(SystemExit, match=r"^error: .*x\.json has more than 9 values$"):
        read_json(path)
    path.write_text('{"a": [1, 2, 3]}\n\n{"a": [1, 2, 3]}\n{"b": 1}\n')
    assert [len(r) for r in read_jsonl(path)] == [1, 1, 1]
    path.write_text('{"a": [1, 2, 3]}\n{"a": [1, 2, 3]}\n{"b": [1]}\n')
    for read in (read_jsonl, load_passages):
        with pytest.raises(SystemExit, match=r"^error: .*x\.json has more than 9 values$"):
            read(path)


def test_half_of_a_character_can_be_written(tmp_path):
    write_json(tmp_path / "x.json", {"é": "\ud83d"})
    assert read_json(tmp_path / "x.json") == {"é": "\ud83d"}


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_umasks_permissions(mask, mode, tmp_path):
    def write_folder(path):
        path.mkdir()
        save_file({"x": torch.zeros(1)}, path / "z.safetensors")

    before = os.umask(mask)
    try:
        write_json(tmp_path / "x.json", 1)
        tensors = {"x": torch.zeros(1)}
        write_atomic(tmp_path / "y.safetensors", lambda p: save_file(tensors, p))
        write_atomic(tmp_path / "folder", write_folder)
    finally:
        os.umask(before)
    for name in ("x.json", "y.safetensors", "folder/z.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize(
    "path, folder, message",
    [
        ("file", True, "it is not a folder"),
        ("folder", False, "it is a folder"),
        ("file/x", True, "Not a directory"),
        ("file/x/y.json", False, "Not a directory"),
        ("x" * 300, False, "File name too long"),
        ("locked/x/y.json", False, "locked is a read-only folder"),
        ("locked", True, "locked is a read-only folder"),
    ],
)
def test_an_output_is_refused_before_the_work(path, folder, message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir()
    allowed = lambda p, mode: Path(p).name != "locked"  # noqa: E731  root may write anywhere
    monkeypatch.setattr("lm.files.os.access", allowed)
    with pytest.raises(SystemExit, match=f"cannot write .*: .*{message}"):
        check_output(tmp_path / path, folder)
    for good, is_folder in (
        ("new/x", True),
        ("folder", True),
        ("file", False),
        ("a/b.json", False),
    ):
        check_output(tmp_path / good, is_folder)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("said", ["", GOES_ON])
def test_an_interrupt_is_one_line(said, capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        run_main(main, said)
    assert e.value.code == 130 and capsys.readouterr().err == f"interrupted{said}\n"


def script(body: str, pipe: str = "", **environment) -> subprocess.CompletedProcess:
    """Run `body` as the main() of a script, with `pipe` behind it."""
    code = f"from lm.files import run_main\ndef main():\n    {body}\nrun_main(main)"
    command = f"{shlex.join([sys.executable, '-c', code])} {pipe}"
    options = {"capture_output": True, "text": True, "encoding": "latin-1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=os.environ | environment, **options
    )


def test_what_the_system_refuses_is_one_line():
    """A name that no system has, which Path.exists() and others do not answer but raise."""
    done = script("from pathlib import Path; (Path('a' * 300) / 'b').read_bytes()")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {'a' * 300}/b: File name too long\n"
    assert "Traceback" in script("raise OSError('of no file')").stderr  # a fault of the program


@pytest.mark.parametrize(
    "body", ["for n in range(100_000): print(n)", "print(1); print(2); raise SystemExit(0)"]
)
def test_a_closed_pipe_ends_a_script_quietly(body):
    done = script(body, "| true")
    assert done.stderr == "" and done.stdout == ""


def test_a_terminal_without_a_character_shows_its_code():
    done = script("print('\u0141ódź')", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "\\u0141ód\\u017a\n")


def test_what_is_typed_in_another_encoding_is_read():
    code = "from lm.files import run_main\nrun_main(lambda: print(len(input())))"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    options = {"capture_output": True, "cwd": ROOT, "env": environment}
    done = subprocess.run(command, input=b"Zo\xeb fell.\n", **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"9\n", b"")


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
