"""A memory: documents that were learnt, each under an adapter of its own, and a router that finds
the passage a question is about.

    ME/memory.json            the format, and a fingerprint of the base model
    ME/NAME/document.json     title, passages with their notes, what was asked of it: Document
    ME/NAME/adapter_*         a PEFT adapter, in bfloat16

Nothing is merged. So nothing that is learnt can harm another document, or what the base model
knows; and a document whose folder is gone has never been learnt.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from lm.adapters import load_adapter, save_adapter
from lm.files import check_output, note, read_json, remove, write_atomic, write_json
from lm.runs import lock
from lora import Adapters

FORMAT = 1
HEAD, ABOUT = "memory.json", "document.json"

# -----------------------------------------------------------------------------
# which passage is a question about?


class Router:
    """BM25 over texts, each a list of words (Robertson and Zaragoza 2009): a text counts for a
    question by the words that both have, rare ones more than common ones."""

    def __init__(self, texts: list[list[str]], k1: float = 1.5, b: float = 0.75):
        self.counts, self.k1 = list(map(Counter, texts)), k1
        lengths = np.array(list(map(len, texts)), dtype=float)
        self.norm = k1 * (1 - b + b * lengths / max(1.0, lengths.mean() if texts else 1.0))
        self.found_in = Counter(word for own in self.counts for word in own)  # in how many texts

    def rarity(self, word: str) -> float:
        """How much a word tells: the fewer texts have it, the more. One that none has counts as if
        one had, or in a memory of one text all questions would be about something else."""
        n = max(1, self.found_in[word])
        return math.log(1 + (len(self.counts) - n + 0.5) / (n + 0.5))

    def scores(self, question: list[str]) -> np.ndarray:
        """BM25 of each text."""
        total = np.zeros(len(self.counts))
        for word in set(question):
            f = np.array([own[word] for own in self.counts])
            total += self.rarity(word) * f * (self.k1 + 1) / (f + self.norm)
        return total

    def best(self, question: list[str], least: float) -> int | None:
        """The text with the highest score; None if it has less than the share `least` of the
        question's words, each counted by how rare it is: then the question is about none."""
        if not self.counts or not question:
            return None
        n = int(self.scores(question).argmax())
        asked = {word: self.rarity(word) for word in question}
        shared = sum(rarity for word, rarity in asked.items() if word in self.counts[n])
        return n if shared >= least * sum(asked.values()) else None


# -----------------------------------------------------------------------------
# what is kept


@dataclass(frozen=True)
class Document:
    """What is known of a document beside its adapter."""

    name: str  # of its folder
    title: str
    sha256: str  # of its text
    passages: list  # {"title", "text", "notes"} each
    learnt: list  # statements that were given back, asked by its own notes
    missed: list  # and those that were not
    settings: dict  # it was studied with

    @classmethod
    def read(cls, folder: Path) -> "Document":
        """Exits with one line if it is damaged."""
        path = folder / ABOUT
        about = read_json(path)
        kinds = {f.name: f.type for f in fields(cls)}
        for name, kind in kinds.items():
            if not isinstance(about.get(name), kind):
                raise SystemExit(f"error: {path}: field {name!r} is missing or of another kind")
        for passage in about["passages"]:
            known = isinstance(passage, dict) and passage.keys() == {"title", "text", "notes"}
            if not known or not all(isinstance(passage[key], str) for key in ("title", "text")):
                raise SystemExit(f"error: {path}: a passage without title, text and notes")
        if about.keys() != kinds.keys() or about["name"] != folder.name:
            raise SystemExit(f"error: {path} is of another document, or of a newer version")
        return cls(**about)


class Memory:
    """The documents in a folder, by name."""

    def __init__(self, folder, base: str | None = None):
        """Reads them. `base`: the base model's fingerprint, if adapters are to be used. Exits with
        one line if it is no memory, of a newer format or of another base; a damaged document is
        left out, with a note."""
        self.folder, self.documents = Path(folder), {}
        if not (self.folder / HEAD).is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise SystemExit(f"error: {folder} is no memory: it has no {HEAD}")
            return
        head = read_json(self.folder / HEAD)
        if head.get("format") != FORMAT:
            raise SystemExit(f"error: {folder} is a memory of format {head.get('format')!r:.20}")
        if base and head.get("base") != base:
            raise SystemExit(f"error: {folder} was learnt by another base model than this one")
        for path in sorted(self.folder.glob(f"[!.]*/{ABOUT}")):  # .NAME: of a killed run
            try:
                self.documents[path.parent.name] = Document.read(path.parent)
            except SystemExit as e:
                note(f"{path.parent.name} is left out: {str(e).removeprefix('error: ')}")

    def keep_to_itself(self) -> None:
        """Keep the folder to this process. Exits with one line if another one is at work in it."""
        lock(self.folder)
        for gone in self.folder.glob(".*.forgotten"):  # of one that was killed
            remove(gone)

    def open_to_write(self, base: str) -> None:
        """Before the work: make the folder, and keep it to this process. Exits with one line if it
        cannot be written."""
        check_output(self.folder, folder=True)
        self.keep_to_itself()
        if not (self.folder / HEAD).is_file():
            write_json(self.folder / HEAD, {"format": FORMAT, "base": base})

    def __getitem__(self, name: str) -> Document:
        if name not in self.documents:
            names = ", ".join(self.documents) or "nothing"
            raise SystemExit(f"error: {self.folder} has no {name!r}; it has {names}")
        return self.documents[name]

    def adapter(self, model, name: str) -> Adapters:
        return load_adapter(model, self.folder / name)

    def add(self, document: Document, adapters: Adapters, base) -> None:
        """Keep a document: all of it, or, killed on the way, nothing."""

        def write(folder: Path) -> None:
            write_json(folder / ABOUT, asdict(document))
            save_adapter(adapters, folder, base, dtype=torch.bfloat16)

        write_atomic(self.folder / document.name, write)
        self.documents[document.name] = document

    def forget(self, name: str) -> None:
        """Remove a document. The folder is renamed first: killed on the way, it is gone, too."""
        gone = self.folder / f".{name}.forgotten"
        (self.folder / self[name].name).rename(gone)
        del self.documents[name]
        remove(gone)
