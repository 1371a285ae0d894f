"""Reading and writing files safely, and one way to end with a clear message.

An error that a user can cause is raised as SystemExit("error: ..."): a script that meets it prints
that one line to stderr and exits with status 1, without a traceback. Code that wants to go on can
catch SystemExit.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from lm.ranks import RANK, WORLD, may_write

LARGEST = 1 << 28  # bytes of a file that is read as a whole; as text they may be four times as many
VALUES = 4_000_000  # objects, lists and items in a file of JSON, up to 300 bytes of memory each

GOES_ON = "; the same command goes on where it was"


def run_main(main, interrupted: str = "", alone: bool = True) -> None:
    """A script's last line: main(), of which Ctrl-C or SIGTERM ends in one line, "interrupted" and
    what is said here, a file that the system refuses in one that names it, and a closed pipe (`|
    head`) in none. What a terminal cannot show is spelled out. A script that runs `alone` is
    refused to torchrun."""

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    if WORLD == 1:  # one that waits for others would not hear it
        signal.signal(signal.SIGTERM, stop)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks
    if WORLD > 1 and alone:
        raise SystemExit(1 if RANK else f"error: {sys.argv[0]} runs as one process: no torchrun")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, not when Python exits, which would complain
    except KeyboardInterrupt as e:
        newline = "\n" * sys.stdout.isatty()  # below the progress line
        if not RANK:
            print(f"{newline}interrupted{interrupted}", file=sys.stderr)
        raise SystemExit(128 + (e.args or (signal.SIGINT,))[0]) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as e:
        if not e.filename:
            raise
        raise SystemExit(f"error: {e.filename}: {e.strerror}") from None


def warn(text: str) -> None:
    """Say on stderr what is left out, or not as it should be, where the work goes on."""
    if not RANK:
        print(f"note: {text}", file=sys.stderr, flush=True)


def open_file(path):
    """The file at `path`, to be read as bytes. Raises OSError if there is none, or something that
    need not end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "it is not a regular file")
    return open(path, "rb")


def read_bytes(path) -> bytes:
    """What the file at `path` holds. Exits with one line if it is missing or unreadable, or too
    large to be read as a whole."""
    try:
        with open_file(path) as f:
            data = f.read(LARGEST + 1)
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e
    if len(data) > LARGEST:
        raise SystemExit(f"error: cannot read {path}: it is larger than {LARGEST >> 20} MB")
    return data


def parse_json(data: bytes, where):
    """The JSON value in `data`, UTF-8 with or without a byte-order mark. Exits with one line that
    begins with `where` if it is none, is nested too deep, has a key twice in one object, or would
    take gigabytes: "[{},{},{}" takes 24 times as much memory as there is text."""

    def unique(pairs: list) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise SystemExit(f"error: {where}: {twice!r:.60} stands twice in one object")
        return value

    refuse_many(data, where)
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except ValueError as e:
        raise SystemExit(f"error: {where} is not valid JSON: {e}") from e
    except RecursionError as e:
        raise SystemExit(f"error: {where} is nested too deep to be read") from e


def refuse_many(data: bytes, where) -> None:
    """Exit with one line if JSON, or lines of it, would take gigabytes of memory."""
    if sum(map(data.count, (b"{", b"[", b","))) > VALUES:
        raise SystemExit(f"error: {where} has more than {VALUES:,} values")


def read_json_value(path):
    """What the JSON file at `path` holds. Exits with one line if it is missing or unreadable."""
    return parse_json(read_bytes(path), path)


def read_json(path) -> dict:
    """The JSON object in the file at `path`. Exits with one line if there is none."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise SystemExit(f"error: {path} must hold a JSON object, not {value!r:.40}")
    return value


def fingerprint(data: bytes) -> str:
    """The first 12 hex digits of the SHA-256: enough to notice that something has changed."""
    return hashlib.sha256(data).hexdigest()[:12]


def digest(path) -> str:
    """fingerprint() of a file."""
    try:
        with open_file(path) as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:12]
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e


def write_atomic(path, write) -> None:
    """Call write(temporary path), then rename the result to `path`: readers see the old file or the
    new, never half.

    Works for a file and for a folder (a folder must not exist yet). Exits with one line if the disk
    refuses.
    """
    path = Path(path)
    if not may_write(path):
        return
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(scratch)  # left by a killed run
        write(scratch)
        share(scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as e:
        remove(scratch)
        raise SystemExit(f"error: cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    except BaseException:
        remove(scratch)
        raise


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def share(path: Path) -> None:
    """Give a file, or a folder and what is in it, the permissions that new ones have. (Tensors are
    written through temporary files, which are private.)"""
    mask = os.umask(0)
    os.umask(mask)
    for p in (path, *path.rglob("*")):
        p.chmod((0o777 if p.is_dir() else 0o666) & ~mask)


def check_output(path, folder: bool = False) -> None:
    """Before the work: exit with one line if no file (or `folder`) can be written at `path`."""
    path = Path(path)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        if is_folder != folder:
            raise OSError(0, "it is a folder" if is_folder else "it is not a folder")
    except FileNotFoundError:
        pass
    except OSError as e:
        raise SystemExit(f"error: cannot write {path}: {e.strerror}") from e
    there = path if folder else path.parent
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise SystemExit(f"error: cannot write {path}: {there} is a read-only folder")


def write_text(path, text: str) -> None:
    # Half of a character, as a path or a sample may hold, becomes JSON's escape for it: \ud83d.
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, records: list) -> None:
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_jsonl(path, resume: bool = False) -> list:
    """The records of a JSON-lines file. Exits with one line that names a line that is no JSON
    object. Work that is to `resume` goes on without a last record that is cut off, with a note."""
    records, data = [], read_bytes(path).rstrip(b"\n")
    refuse_many(data, path)
    last = data.count(b"\n") + 1
    for n, line in enumerate(map(bytes.rstrip, io.BytesIO(data)), 1):
        try:
            value = parse_json(line, f"{path} line {n}") if line else {}
        except SystemExit:
            if n < last or not resume:
                raise
            warn(f"{path}: the last line is damaged; left out")
            continue
        if not isinstance(value, dict):
            raise SystemExit(f"error: {path} line {n} must be a JSON object, not {value!r:.40}")
        records += [value] if line else []
    return records


def sub_seed(seed: int, *keys: int) -> int:
    """An independent seed for one purpose out of the run's seed: sub_seed(0, 2, 5) for round 2,
    batch 5. Zeros at the end count for nothing: sub_seed(0, 2) is sub_seed(0, 2, 0)."""
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0])


def chunks(items: list, n: int) -> list[list]:
    """n at a time: chunks([1, 2, 3, 4, 5], 2) -> [[1, 2], [3, 4], [5]]."""
    return [items[i : i + n] for i in range(0, len(items), n)]
