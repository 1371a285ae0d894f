"""Reading and writing files safely, and one way to end with a clear message.

An error that a user can cause is raised as SystemExit("error: ..."): a script that meets it prints
that one line to stderr and exits with status 1, without a traceback. Code that wants to go on can
catch SystemExit.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError


def read_json_value(path):
    """What the JSON file at `path` holds. Exits with one line if it is missing or unreadable."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise SystemExit(f"error: {path} is not valid JSON: {e}") from e


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
        return fingerprint(Path(path).read_bytes())
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e


def write_atomic(path, write) -> None:
    """Call write(temporary path), then rename the result to `path`: readers see the old file or the
    new, never half.

    Works for a file and for a folder (a folder must not exist yet). Exits with one line if the disk
    refuses.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(scratch)  # left by a killed run
        write(scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as e:
        remove(scratch)
        raise SystemExit(f"error: cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    except BaseException:
        remove(scratch)
        raise


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path, value) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_jsonl(path, records: list) -> None:
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_jsonl(path) -> list:
    """The records of a JSON-lines file. Exits with one line that names the bad line."""
    try:
        # Not splitlines(): U+2028 ends no record.
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e
    records = []
    for n, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError as e:
            raise SystemExit(f"error: {path} line {n} is not valid JSON: {e}") from e
    return records


def sub_seed(seed: int, *keys: int) -> int:
    """An independent seed for one purpose out of the run's seed: sub_seed(0, 2, 5) for round 2,
    batch 5."""
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0])


def chunks(items: list, n: int) -> list[list]:
    """n at a time: chunks([1, 2, 3, 4, 5], 2) -> [[1, 2], [3, 4], [5]]."""
    return [items[i : i + n] for i in range(0, len(items), n)]
