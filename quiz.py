"""The quiz: ask the model about passages that it does not see, under many adapters at once, and score the answers.

Scores per question (all from 0 to 1, except logprob):
    accuracy   1 if an accepted answer stands in the model's answer as whole words, after SQuAD's normalisation
    em         1 if the model's answer equals an accepted answer, normalised
    f1         overlap of normalised words with the closest accepted answer
    logprob    mean log-likelihood per token of the first accepted answer as the whole reply (0 is certain)

Models answer in sentences, as asked, so em stays near 0 and logprob, which wants the bare answer, is only comparable
between candidates. The paper has GPT-4.1 judge the answers; these scores need no judge.
"""

import argparse
import math
import re
import shlex
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_model
from common import Progress, read_jsonl, write_jsonl
from data.qa import Passage, Question
from inner import Example, Study, inner_update
from lora import PROJECTIONS, Adapters, LoRAConfig, merged
from model import Transformer
from sampler import Batch, generate
from selfedit import QA_PAIR, STYLES
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# scoring


def normalize(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single blanks. "The Havnit Society." -> "havnit society"."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, gold: str) -> float:
    """Word overlap of two normalised texts: "salt barn" against "old salt barn" is 2 * 1 * (2/3) / (1 + 2/3) = 0.8."""
    a, g = answer.split(), gold.split()
    common = sum((Counter(a) & Counter(g)).values())
    return 2 * common / (len(a) + len(g)) if common else float(a == g)


def score_answer(answer: str, golds: tuple) -> dict:
    """{"accuracy", "em", "f1"} of one answer. "It was honey." scores accuracy 1, em 0 against "honey"."""
    answer, golds = normalize(answer), [normalize(g) for g in golds]
    return {
        "accuracy": float(any(f" {g} " in f" {answer} " for g in golds)),
        "em": float(answer in golds),
        "f1": max(f1(answer, g) for g in golds),
    }


ASKING = {"what", "which", "when", "where", "whose", "whom", "does", "many", "much", "question", "answer"}


def words(text: str) -> set:
    """Those that count: four letters or more, or a digit. "In 1742 she cast the bell." -> {"1742", "cast", "bell"}."""
    found = re.findall(r"\w+", text.lower())
    return {w for w in found if len(w) >= 4 or any(c.isdigit() for c in w)} - ASKING


def closest_question(question: Question, pairs: list, title: str = "") -> float:
    """From 0 to 1, how closely some (question, answer) of the notes asks for what a quiz question asks for: F1 of the words
    that count, without the passage's title, which any question may repeat. A pair whose answer has no accepted answer in
    it, or whose question has one, asks for something else: 0; so does any if the quiz question has no other words.

    "Who cast the bell?" (Hessa Lorn): ("Who cast it?", "Hessa Lorn did.") gives 2 * 1 / (1 + 2), for "cast" of "cast bell",
    and under the title "Vantor Bell" 1; ("What did Hessa Lorn cast?", "Hessa Lorn cast the bell.") gives 0.
    """
    given, best = words(title), 0.0
    goal = words(question.question) - given
    for asked, answer in pairs:
        told = [score_answer(text, question.answers)["accuracy"] for text in (asked, answer)]
        if told == [0.0, 1.0]:
            mine = words(asked) - given
            best = max(best, 2 * len(mine & goal) / max(1, len(mine) + len(goal)))
    return best


def asks(passage: Passage, notes) -> list[float]:
    """closest_question() for each question of the passage's quiz; a note that is no question asks nothing."""
    pairs = [m.groups() for note in notes if (m := QA_PAIR.fullmatch(note))]
    return [closest_question(q, pairs, passage.title) for q in passage.questions]


def mean_scores(scores: list[dict]) -> dict:
    """The mean of each score over questions."""
    return {k: float(np.mean([s[k] for s in scores])) for k in ("accuracy", "em", "f1", "logprob")}


# -----------------------------------------------------------------------------
# asking


ANSWER_LEN = 48  # most tokens of an answer; nearly every sentence of a passage fits


@dataclass(frozen=True)
class Item:
    """One question to ask, under candidate `owner`'s adapter."""

    prompt: tuple
    question: Question
    owner: int = 0


def quiz_prompt(tok: Tokenizer, title: str, question: str, passage: str = "") -> list[int]:
    """Token ids of the chat that asks one question; with `passage` it stands in front, without it the model must know.

    The paper (section B.1) prompts a base model to answer directly. A 135M chat model recalls more when it may answer in
    the form that it studied, a sentence, and `accuracy` looks for the answer inside it.
    """
    about = f"{title}\n{passage}\n\nQuestion about the text above" if passage else f"Topic: {title}\nQuestion"
    about = about if title else "Question"
    return tok.chat([{"role": "user", "content": f"{about}: {question}\nAnswer in one short sentence."}])


def quiz_items(tok: Tokenizer, passage: Passage, owner: int = 0, show_passage: bool = False) -> list[Item]:
    """All questions about one passage, for candidate `owner`. A title that gives the answer away is left out.

    "Which marsh is drained by the Luhamwe creek?" is not asked under the topic "Rewanjolo Marsh".
    """
    items = []
    for q in passage.questions:
        told = any(normalize(a) in normalize(passage.title) for a in q.answers)
        title = "" if told and not show_passage else passage.title
        items.append(Item(tuple(quiz_prompt(tok, title, q.question, passage.text if show_passage else "")), q, owner))
    return items


def ask(
    model: Transformer, tok: Tokenizer, items: list[Item], adapters: Adapters | None = None, max_new=ANSWER_LEN
) -> list[dict]:
    """Greedy answers to all items in one batch, scored: {"answer", "accuracy", "em", "f1", "logprob"} per item."""
    golds = [[*tok.encode(i.question.answers[0]), tok.end_ids[0]] for i in items]
    logprobs = {}

    def score_golds(order, batch, x):
        logprobs.update(zip(order, answer_logprobs([golds[i] for i in order], batch, x)))

    ends, slots = {*tok.end_ids, *tok.newline_ids}, max(max_new, *map(len, golds))
    prompts, owner = [list(i.prompt) for i in items], [i.owner for i in items]
    outputs = generate(model, prompts, slots, ends, adapters=adapters, owner=owner, on_prefill=score_golds)
    scores = []
    for n, (item, ids) in enumerate(zip(items, outputs)):
        answer = tok.decode([t for t in ids[:max_new] if t not in tok.end_ids]).strip().split("\n")[0]
        scores.append({"answer": answer, **score_answer(answer, item.question.answers), "logprob": logprobs[n]})
    return scores


def answer_logprobs(answers: list[list[int]], batch: Batch, x) -> list[float]:
    """Mean log-likelihood per token of answers[n] as continuation of row n of the batch (teacher forcing).

    x (R, C) are the states of the rows' last tokens, as prefill() returns them. The answers are read and taken back:
    decoding can go on from the same prompts.
    """
    inputs, states = [a[:-1] for a in answers], x  # the prompt's last token predicts the first of the answer
    if longest := max(map(len, inputs)):
        batch.cache.extend(longest)
        states = torch.cat([x, batch.read(inputs)])
        batch.take_back(longest)
    first = np.cumsum([len(x), *map(len, inputs)]).tolist()  # where the states of each answer start
    at = [i for n, mine in enumerate(inputs) for i in (n, *range(first[n], first[n] + len(mine)))]
    target = torch.tensor([t for a in answers for t in a], device=x.device)
    logp = batch.model.head(states[at]).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return [float(part.mean()) for part in logp.split(list(map(len, answers)))]


# -----------------------------------------------------------------------------
# study, then ask


@dataclass(frozen=True)
class Candidate:
    """A passage and the notes to study with it; without notes, the passage alone."""

    passage: Passage
    notes: tuple
    title: str = ""  # that the notes stand under, if it is not the passage's


def study_examples(tok: Tokenizer, title: str, texts: list[str]) -> list[Example]:
    """What the inner update trains on, one sequence for each text, each with an end-of-text token.

    A passage or a note is "{title}\\n{text}", every token counted. A question with its answer (styles ...-qa and questions)
    is the chat in which the quiz would ask it; the answer and its end are counted:
        "Question: Who cast it?\\nAnswer: Hessa Lorn"  ->  user: Topic: {title} ... Who cast it? ...  assistant: Hessa Lorn
    """
    examples = []
    for text in texts:
        pair = QA_PAIR.fullmatch(text)
        given, counted = quiz_prompt(tok, title, pair[1]) if pair else [], pair[2] if pair else f"{title}\n{text}"
        counted = [*tok.encode(counted), tok.end_ids[0]]
        examples.append(Example((*given, *counted), (False,) * len(given) + (True,) * len(counted)))
    return examples


def to_study(tok: Tokenizer, c: Candidate) -> list[Example]:
    """The training sequences of one candidate: its passage, then its notes."""
    own = study_examples(tok, c.passage.title, [c.passage.text])
    return own + study_examples(tok, c.title or c.passage.title, list(c.notes))


def even_groups(items: list, size: int) -> list[list]:
    """Items in order, in groups of even size, at most `size`: 10 items, size 8: two groups of 5, since a group of 2 would
    not fill the machine."""
    parts = np.array_split(np.arange(len(items)), math.ceil(len(items) / size)) if items else []
    return [[items[i] for i in part] for part in parts]


def populations(tok: Tokenizer, candidates: list[Candidate], size: int) -> list[list[int]]:
    """Candidate indices in even groups of at most `size` that train side by side, like lengths together."""
    length = [len(tok.encode("\n".join([c.passage.text, *c.notes]))) for c in candidates]
    return even_groups(sorted(range(len(candidates)), key=lambda i: (length[i], i)), size)


def study_groups(groups: list[list], study, accuracy, log, label: str) -> dict:
    """{candidate: result} of study(group, tick) for every group of candidates (numbers or names), which gives their results.

    A group's results are written to `log` (JSON lines) at once; those found there are not computed again. The progress
    line shows the mean of accuracy(result).
    """
    everyone = sorted(n for group in groups for n in group)
    done = {r["n"]: r for r in read_jsonl(log)} if Path(log).is_file() else {}
    progress = Progress(label, len(everyone))
    for group in groups:
        if not all(n in done for n in group):
            results = study(group, lambda tokens, loss: progress.tokens(tokens, loss=loss))
            done |= {n: {"n": n, **r} for n, r in zip(group, results)}
            write_jsonl(log, [done[n] for n in everyone if n in done])
        progress.step(len(group), accuracy=float(np.mean([accuracy(r) for r in done.values()])))
    return done


def study_and_quiz(model, tok, candidates: list[Candidate], lora: LoRAConfig, study, seed: int, tick=None) -> list[dict]:
    """One population: each candidate studies its passage and notes, then answers without seeing them.

    Returns for each {"steps", "tokens", "loss", "diverged", "answers": scores per question}. One that diverged scores
    zero, and a log-probability of -100.
    """
    adapters = Adapters.init(model, lora, len(candidates), seed)
    examples = [to_study(tok, c) for c in candidates]
    outcomes = inner_update(model, adapters, examples, [study] * len(candidates), seed, tick)
    items = [item for n, c in enumerate(candidates) for item in quiz_items(tok, c.passage, owner=n)]
    scores = ask(model, tok, items, adapters)
    results = []
    for n, outcome in enumerate(outcomes):
        mine = [s for s, item in zip(scores, items) if item.owner == n]
        diverged = outcome.diverged or not all(math.isfinite(s["logprob"]) for s in mine)
        if diverged:
            mine = [{**s, "accuracy": 0.0, "em": 0.0, "f1": 0.0, "logprob": -100.0} for s in mine]
        done = {"steps": outcome.steps, "tokens": outcome.tokens, "loss": outcome.loss, "diverged": diverged}
        results.append({**done, "answers": mine})
    return results


def study_all(model, tok, candidates, lora, study, seed, population, log, label) -> list[dict]:
    """study_and_quiz() for any number of candidates, in the order given; `log` as in study_groups()."""

    def run(group, tick):
        return study_and_quiz(model, tok, [candidates[n] for n in group], lora, study, seed, tick)

    groups = populations(tok, candidates, population)
    done = study_groups(groups, run, lambda r: mean_scores(r["answers"])["accuracy"], log, label)
    return [done[n] for n in range(len(candidates))]


# -----------------------------------------------------------------------------
# settings, and result files' heads, that several scripts share


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as written, and every option with its default."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} -h)\n")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the settings of the model, the self-edits and the inner update; the script adds its own."""
    parser = Parser(description=doc, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="checkpoints/smollm2-135m-instruct", help="Hugging Face folder")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the base weights")
    add("--seed", type=at_least(0), default=0, help="same seed, same output")
    backends = ["off", "inductor", "cudagraphs"]
    add("--compile", default="off", choices=backends, help="of the inner update; cudagraphs needs CUDA, but no Triton")
    add = parser.add_argument_group("self-edits").add_argument
    add("--style", default="questions", choices=STYLES, help="prompt style")
    add("--shots", type=int, default=1, choices=[0, 1], help="1: with worked examples in the prompt; the paper: 0")
    add("--temperature", type=at_least(0.0), default=0.7, help="of sampling, 0 is greedy; the paper: 1")
    add("--top-p", type=at_least(0.01), default=0.95, help="nucleus mass")
    add("--max-new", type=at_least(1), default=80, help="longest self-edit, or part about one sentence, in tokens")
    add = parser.add_argument_group("inner update (LoRA and AdamW)").add_argument
    add("--rank", type=at_least(1), default=16, help="LoRA rank; the paper: 32")
    add("--alpha", type=at_least(0.0), default=32.0, help="LoRA alpha; the paper: 64")
    add("--targets", nargs="+", default=list(PROJECTIONS), choices=PROJECTIONS, help="the paper: q_proj v_proj")
    add("--top-layers", type=at_least(0), default=10, help="adapt the last K layers; 0 or the paper: all")
    add("--lr", type=at_least(0.0), default=Study.lr, help="peak learning rate, decays linearly; the paper: 1e-3")
    add("--steps", type=at_least(0), default=16, help="optimiser steps; 0 or the paper: as many as --epochs make")
    add("--epochs", type=at_least(1), default=Study.epochs, help="passes over the rows with --steps 0; the paper: 10")
    add(
        "--row-len",
        type=at_least(0),
        default=Study.row_len,
        help="tokens per packed row; 0 or the paper: a row per sequence",
    )
    add("--population", type=at_least(1), default=8, help="candidates that train side by side; the paper: 1")
    return parser


def at_least(low):
    """An argparse type: a number of low's type that is not below it."""

    def convert(text: str):
        value = type(low)(text)  # argparse turns a ValueError into its own message
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        return value

    convert.__name__ = type(low).__name__
    return convert


def load(args) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, as args say. Exits if --compile cannot work on the model's device."""
    model = load_model(args.model, args.device, args.dtype)
    if args.compile == "cudagraphs" and model.device.type != "cuda":
        raise SystemExit(f"error: --compile cudagraphs needs a CUDA device, the model is on {model.device.type}")
    if args.compile != "off":
        model.compile_blocks(args.compile)
        try:
            torch.compile(torch.sin, backend=args.compile)(torch.ones(8, device=model.device))
        except Exception as e:
            raise SystemExit(f"error: --compile {args.compile} does not work here: {str(e).strip().splitlines()[0]}") from e
    return model, Tokenizer(args.model)


def lora_config(args, model: Transformer) -> LoRAConfig:
    """The inner update's LoRA. Exits if --top-layers is more than the model has."""
    n = model.config.n_layer
    if args.top_layers > n:
        raise SystemExit(f"error: --top-layers {args.top_layers}: the model has {n} layers")
    return LoRAConfig(args.rank, args.alpha, tuple(args.targets), n - args.top_layers if args.top_layers else 0, n)


def add_learner(add) -> None:
    """The setting of scripts in which a policy writes."""
    add("--learner", default="base", choices=["base", "policy"], help="who studies what a policy wrote; the paper: policy")


def learner(model: Transformer, policy: Adapters | None, args):
    """Within, the model has the weights that study and answer: its own, or with --learner policy those of the policy."""
    return merged(model, policy if args.learner == "policy" else None)


def study_settings(args) -> Study:
    return Study(lr=args.lr, epochs=args.epochs, steps=args.steps, row_len=args.row_len)


def result_head(args, model: Transformer) -> dict:
    """What every result file starts with."""
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "seed": args.seed, "model": args.model, "dtype": str(model.dtype)}
