"""A memory: documents that were learnt, each under an adapter of its own, and a router that finds
the passage a question is about.

    ME/memory.json            the format, and a fingerprint of the base model
    ME/NAME/document.json     title, passages with their notes, what was asked of it: Document
    ME/NAME/adapter_*         a PEFT adapter, in bfloat16

Nothing is merged. So nothing that is learnt can harm another document, or what the base model
knows; and a document whose folder is gone has never been learnt.
"""

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from lm.adapters import load_adapter, save_adapter
from lm.files import check_output, read_json, remove, warn, write_atomic, write_json
from lm.runs import lock
from lora import Adapters

FORMAT = 3
LEAST = 0.5  # share of a question's words, counted by rarity, that the text it is about has
HEAD, ABOUT = "memory.json", "document.json"
PASSAGE = {"title", "text", "notes", "quiz"}
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

# -----------------------------------------------------------------------------
# which passage is a question about?


class Router:
    """BM25 over texts, each a list of words (Robertson and Zaragoza 2009): a text counts for a
    question by the words that both have, rare ones more than common ones.

    A few texts cannot tell which words are common, so rarity is multiplied by bits(word): how
    uncommon the word is anywhere (Tokenizer.bits). Else "capital" and "japan" would count alike,
    and "What is the capital of Japan?" be about the one text of a memory that has a capital.
    """

    def __init__(self, texts: list[list[str]], bits, k1: float = 1.5, b: float = 0.75):
        self.counts, self.bits, self.k1 = list(map(Counter, texts)), bits, k1
        lengths = np.array(list(map(len, texts)), dtype=float)
        self.norm = k1 * (1 - b + b * lengths / max(1.0, lengths.mean() if texts else 1.0))
        self.found_in = Counter(word for own in self.counts for word in own)  # in how many texts

    def rarity(self, word: str) -> float:
        """How much a word tells: the fewer texts have it, the more. One that none has counts as if
        one had, or in a memory of one text all questions would be about something else."""
        n = max(1, self.found_in[word])
        return self.bits(word) * math.log(1 + (len(self.counts) - n + 0.5) / (n + 0.5))

    def scores(self, question: list[str]) -> np.ndarray:
        """BM25 of each text."""
        total = np.zeros(len(self.counts))
        for word in dict.fromkeys(question):
            f = np.array([own[word] for own in self.counts])
            total += self.rarity(word) * f * (self.k1 + 1) / (f + self.norm)
        return total

    def best(self, question: list[str], least: float = LEAST) -> int | None:
        """The text with the highest score; None if it has less than the share `least` of the
        question's words, each counted by how rare it is: then the question is about none."""
        if not self.counts or not question:
            return None
        n = int(self.scores(question).argmax())
        asked = {word: self.rarity(word) for word in question}
        shared = sum(rarity for word, rarity in asked.items() if word in self.counts[n])
        return n if shared >= least * sum(asked.values()) - 1e-9 else None


# -----------------------------------------------------------------------------
# what is kept


@dataclass(frozen=True)
class Document:
    """What is known of a document beside its adapter."""

    name: str  # of its folder
    title: str
    digest: str  # of its text
    # {"title", "text", "notes", "quiz"} each; its own quiz: {"question", "answer", "right"} each
    passages: list
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
            sound = isinstance(passage, dict) and passage.keys() == PASSAGE
            if not sound or not all_texts([passage["title"], passage["text"]], passage["notes"]):
                raise SystemExit(f"error: {path}: a passage without title, text and notes")
            if not isinstance(passage["quiz"], list) or not all(map(is_asked, passage["quiz"])):
                raise SystemExit(f"error: {path}: a question that is of another form")
        if not all_texts(about["learnt"], about["missed"]):
            raise SystemExit(f"error: {path}: a statement that is no text")
        seed = about["settings"].get("seed")
        if type(seed) is not int or seed < 0:
            raise SystemExit(f"error: {path}: settings without a seed")
        if about.keys() != kinds.keys() or about["name"] != folder.name:
            raise SystemExit(f"error: {path} is of another document, or of a newer version")
        for file in ADAPTER:
            if not (folder / file).is_file():
                raise SystemExit(f"error: {folder / file} is missing")
        return cls(**about)


def is_asked(q) -> bool:
    """Is it a question of a passage's own quiz?"""
    sound = isinstance(q, dict) and q.keys() == {"question", "answer", "right"}
    return sound and all_texts([q["question"], q["answer"]]) and q["right"] in (0, 1)


def all_texts(*lists) -> bool:
    """Is each a list of strings?"""
    for own in lists:
        if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
            return False
    return True


class Memory:
    """The documents in a folder, by name."""

    def __init__(self, folder, must_exist: bool = False):
        """Reads them. Exits with one line if it is no memory, or of another format; a damaged
        document is left out, with a note."""
        self.folder, self.base, self.documents = Path(folder), None, {}
        self.read(must_exist)

    def read(self, must_exist: bool = False) -> None:
        folder, self.documents = self.folder, {}
        if not (folder / HEAD).is_file():
            visible = folder.is_dir() and any(folder.glob("[!.]*"))
            if must_exist or visible or folder.is_file():
                raise SystemExit(f"error: {folder} is no memory: it has no {HEAD}")
            return
        head = read_json(folder / HEAD)
        if head.get("format") != FORMAT or head.keys() != {"format", "base"}:
            raise SystemExit(
                f"error: {folder} is a memory of format {head.get('format')!r:.20}, not {FORMAT}; "
                "study its documents again, in another folder"
            )
        self.base = head["base"]
        for path in self.folders():
            try:
                if path.is_symlink():  # what it points to could not be forgotten
                    raise SystemExit(f"error: {path} is a link")
                self.documents[path.name] = Document.read(path)
            except SystemExit as e:
                warn(f"{path.name} is left out: {str(e).removeprefix('error: ')}")

    def folders(self) -> list[Path]:
        """Of the documents, damaged ones too."""
        return sorted(p for p in self.folder.glob("[!.]*") if p.is_dir())

    def refuse_other_base(self, base: str) -> None:
        """Before adapters are used: exit with one line if they are not for this base model, whose
        fingerprint is `base` (lm.runs.weights_of)."""
        if any(self.folders()) and self.base != base:
            raise SystemExit(f"error: {self.folder} was learnt by another base model than this one")

    def keep_to_itself(self) -> None:
        """Keep the folder to this process. Exits with one line if another one is at work in it."""
        lock(self.folder)
        for left in [*self.folder.glob(".*.forgotten"), *self.folder.glob(".*.partial")]:
            remove(left)  # by one that was killed

    def open_to_write(self, base: str) -> None:
        """Before the work: make the folder, keep it to this process, and read it again. Exits with
        one line if it cannot be written."""
        check_output(self.folder, folder=True)
        self.keep_to_itself()
        self.read()
        self.refuse_other_base(base)
        if self.base != base:  # a new memory, or an empty one
            write_json(self.folder / HEAD, {"format": FORMAT, "base": base})

    def __getitem__(self, name: str) -> Document:
        if name not in self.documents:
            names = ", ".join(self.documents) or "nothing"
            raise SystemExit(f"error: {self.folder} has no {name!r}; it has {names}")
        return self.documents[name]

    def is_damaged(self, name: str) -> bool:
        """Does something stand there that is no document?"""
        there = name in [path.name for path in self.folder.glob("[!.]*")]
        return there and name not in (*self.documents, HEAD)

    def adapter(self, model, name: str) -> Adapters:
        return load_adapter(model, self.folder / self[name].name)

    def add(self, document: Document, adapters: Adapters, base) -> None:
        """Keep a document: all of it, or, killed on the way, nothing."""

        def write(folder: Path) -> None:
            write_json(folder / ABOUT, asdict(document))
            save_adapter(adapters, folder, base, dtype=torch.bfloat16)

        write_atomic(self.folder / document.name, write)
        self.documents[document.name] = document

    def forget(self, name: str) -> None:
        """Remove a document, also a damaged one. The folder is renamed first: killed on the way, it
        is gone, too. Exits with one line if there is none, or the disk refuses."""
        if not self.is_damaged(name):
            self[name]
        gone = self.folder / f".{name}.forgotten"
        try:
            (self.folder / name).rename(gone)
        except OSError as e:
            raise SystemExit(f"error: cannot remove {self.folder / name}: {e.strerror}") from e
        self.documents.pop(name, None)
        remove(gone)
        if os.path.lexists(gone):
            raise SystemExit(f"error: {name} is forgotten, but {gone} cannot be removed: do it")
