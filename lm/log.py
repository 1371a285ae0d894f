"""Long work: a progress line, and a log of results with which a killed run goes on where it was."""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from lm.files import fingerprint, read_jsonl, write_jsonl
from lm.ranks import dealt, gathered, own_file, parts_of, whole


class Progress:
    """A status line, "update 12/64  loss 1.204  tok/s 580  eta 0:41": rewritten in place at a
    terminal, else every 10 s."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self.fields, self.n_tokens = label, total, 0, {}, 0
        self.tty = sys.stdout.isatty()
        self.start = self.last = time.perf_counter()  # last: when `done` last grew
        self.shown = 0.0 if self.tty else self.start

    def step(self, n: int = 1, **fields) -> None:
        """Count `n` more done (0: still at the same). `fields` are shown from now on, floats to
        three decimals."""
        self.done += n
        self.fields |= fields
        now, last = time.perf_counter(), n > 0 and self.done >= self.total
        self.last = now if n else self.last
        if not last and now - self.shown < (0.2 if self.tty else 10.0):
            return
        self.shown, seconds = now, now - self.start
        each = (self.last - self.start) / self.done if self.done else None
        eta = (
            None
            if each is None
            else max(0, round(each * (self.total - self.done) - (now - self.last)))
        )
        parts = [f"{self.label} {self.done}/{self.total}"]
        parts += [
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items()
        ]
        parts.append(
            f"{seconds:.1f} s"
            if last
            else "eta ..."
            if eta is None
            else f"eta {eta // 60}:{eta % 60:02d}"
        )
        line = "  ".join(parts)
        print(
            f"\r{line:<110}" if self.tty else line,
            end="\n" if last or not self.tty else "",
            flush=True,
        )

    def tokens(self, n: int, **fields) -> None:
        """Count `n` more tokens, shown per second since the start; nothing more is done."""
        self.n_tokens += n
        self.step(0, **fields, tok_s=round(self.n_tokens / (time.perf_counter() - self.start)))


NUMBERS = ("steps", "tokens", "cells", "logprob")  # what a result may have


class Log:
    """Results of candidates in a JSON-lines file, each with its candidate's name under "n" and,
    under "of", a fingerprint of what it was trained on. What stands there is not computed again:

        for group in log.remaining(groups, "quiz"):
            log.add(group, [the result of each candidate in the group])
        log[candidate]
    """

    def __init__(self, path, score, known=(), needed=()):
        """score(result) is a number; its mean is shown while the work runs. `known`: other such
        files, only to be read; `needed`: what each result must have. Exits with one line if a file
        holds something else."""
        self.path, self.score, self.needed = Path(path), score, needed
        self.known, self.done = {}, {}
        for file in known:
            self.known |= self.read(file)
        for file in [*parts_of(self.path), self.path]:
            if file.is_file():
                self.done |= self.read(file)
        self.progress = None

    def read(self, path) -> dict:
        found, records = {}, read_jsonl(path, resume=True)
        for n, r in enumerate(records, 1):
            try:
                found[r["n"]] = r
                numbers = [self.score(r), *(r[name] for name in NUMBERS if name in r)]
                [r[name] for name in self.needed]
                if not all(isinstance(x, (int, float)) and abs(x) < 1e30 for x in numbers):
                    raise ValueError(f"not numbers: {numbers!r:.80}")
                if type(r.get("diverged", False)) is not bool:
                    raise ValueError(f"diverged is {r['diverged']!r:.40}")
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
                raise SystemExit(f"error: {path} line {n} is no result: {e!r}") from e
            if len(found) < n:
                raise SystemExit(f"error: {path}: {r['n']!r} stands there twice")
        return found

    def __getitem__(self, candidate) -> dict:
        """Exits with one line if the result is of something else than the candidate."""
        result = (self.done if candidate.name in self.done else self.known)[candidate.name]
        own = trained_on(candidate)
        if result.get("of", own) != own:
            raise SystemExit(
                f"error: {self.path}: result {candidate.name!r} is not of the self-edit that it "
                "stands for; a file of this run was changed: remove the round, or row, to make it "
                "anew"
            )
        return result

    def remaining(self, groups: list[list], label: str):
        """The groups of candidates that are not all there yet, one by one, with a progress line; of
        many processes each has its share of them, and in the end all have all results."""
        names = sorted(c.name for group in groups for c in group)
        groups = dealt(groups)
        self.progress = Progress(label, sum(map(len, groups)))
        for group in groups:
            if not all(c.name in self.done and self[c] for c in group):
                yield group
                # Written in one order, whatever was done first, so that a resumed run's file is the
                # same.
                self.write(own_file(self.path), names)
            shown = float(np.mean([self.score(r) for r in self.done.values()]))
            self.progress.step(len(group), accuracy=shown)

        for done in gathered([self.done]):
            self.done |= done
        whole(self.path, partial(self.write, names=names))

    def write(self, path, names: list) -> None:
        write_jsonl(path, [self.done[name] for name in names if name in self.done])

    def add(self, group: list, results: list[dict]) -> None:
        for c, r in zip(group, results, strict=True):
            self.done[c.name] = {"n": c.name, "of": trained_on(c), **r}

    def tick(self, tokens: int, loss: float) -> None:
        """For an inner update: show the loss and the tokens per second."""
        self.progress.tokens(tokens, loss=loss)


def trained_on(candidate) -> str:
    return fingerprint(repr((candidate.examples, candidate.config)).encode())
