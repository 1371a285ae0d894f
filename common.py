"""What every script shares: reading and writing files safely, one progress line, one way to end with a clear message.

An error that a user can cause is raised as SystemExit("error: ..."): a script that meets it prints that one line to
stderr and exits with status 1, without a traceback. Code that wants to go on can catch SystemExit.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError


def read_json(path) -> dict:
    """The JSON object in the file at `path`. Exits with one line if it is missing, unreadable or not a JSON object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise SystemExit(f"error: {path} is not valid JSON: {e}") from e
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
    """Call write(temporary path), then rename the result to `path`: readers see the old file or the new, never half.

    Works for a file and for a folder (a folder must not exist yet). Exits with one line if the disk refuses.
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
    """The records of a JSON-lines file, one per line. Exits with one line that names the bad line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")  # not splitlines(): U+2028 ends no record
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
    """An independent seed for one purpose out of the run's seed: sub_seed(0, 2, 5) for round 2, batch 5."""
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0])


def open_run(folder, settings: dict) -> Path:
    """Make the run folder, or check that it was made with the same settings, so that a run is only ever resumed as
    what it was. Exits with one line that names the first setting that differs."""
    folder = Path(folder)
    settings = json.loads(json.dumps(settings, default=str))
    if (folder / "settings.json").is_file():
        before = read_json(folder / "settings.json")
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise SystemExit(
                    f"error: {folder} was started with {key} = {before.get(key)!r}, now it is {settings.get(key)!r}; "
                    "use the same settings to resume it, or another folder (--out, --work)"
                )
    else:
        write_json(folder / "settings.json", settings)
    return folder


class Progress:
    """A status line, "study 12/64  loss 1.204  tok/s 580  eta 0:41": rewritten in place at a terminal, else every 10 s."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self.fields, self.n_tokens = label, total, 0, {}, 0
        self.tty = sys.stdout.isatty()
        self.start = self.last = time.perf_counter()  # last: when `done` last grew
        self.shown = 0.0 if self.tty else self.start

    def step(self, n: int = 1, **fields) -> None:
        """Count `n` more done (0: still at the same). `fields` are shown from now on, floats to three decimals."""
        self.done += n
        self.fields |= fields
        now, last = time.perf_counter(), n > 0 and self.done >= self.total
        self.last = now if n else self.last
        if not last and now - self.shown < (0.2 if self.tty else 10.0):
            return
        self.shown, seconds = now, now - self.start
        each = (self.last - self.start) / self.done if self.done else None
        eta = None if each is None else max(0, round(each * (self.total - self.done) - (now - self.last)))
        parts = [f"{self.label} {self.done}/{self.total}"]
        parts += [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items()]
        parts.append(f"{seconds:.1f} s" if last else "eta ..." if eta is None else f"eta {eta // 60}:{eta % 60:02d}")
        line = "  ".join(parts)
        print(f"\r{line:<110}" if self.tty else line, end="\n" if last or not self.tty else "", flush=True)

    def tokens(self, n: int, **fields) -> None:
        """Count `n` more tokens, shown per second since the start; nothing more is done."""
        self.n_tokens += n
        self.step(0, **fields, tok_s=round(self.n_tokens / (time.perf_counter() - self.start)))


def chunks(items: list, n: int) -> list[list]:
    """n at a time: chunks([1, 2, 3, 4, 5], 2) -> [[1, 2], [3, 4], [5]]."""
    return [items[i : i + n] for i in range(0, len(items), n)]
