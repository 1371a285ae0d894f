"""The solutions of docs/EXERCISES.md, and what each one brings.

    python experiments/exercises.py --limit 6            # all eight -> results/exercises.json
    python experiments/exercises.py --limit 6 --only stream choices
    python experiments/exercises.py --lines              # the figures, as the document has them

Each exercise is a function of at most 30 lines. All start from the same thing: notes on a few
training passages, learnt in 8 steps of a learning rate of 0.008, which is what suits so few steps
(results/recipes.json). It is made once, when an exercise first asks for it. So few passages show
how a thing is measured; the intervals say how little that tells.

Every measurement has one value for each passage: their mean, its 95 % bootstrap interval over
passages, and how the rows differ from the first one on the same passages. --only measures these
exercises anew and leaves the others in the file as they are.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np
import torch

import data.qa
import inner
import selfedit
from data.qa import counts, load_passages
from experiments.rewards import correlation
from inner import inner_update, lora_config, sft_config
from lm.files import check_output, chunks, digest, read_json, run_main, sub_seed, write_json
from lm.flags import Parser, add_model_flags, at_least, load, result_head
from lm.intervals import bootstrap, paired_steps
from lora import Adapters, LoRAConfig, attached, merge, merged
from quiz import ANSWER_LEN, answer_logprobs, ask, mean_scores, quiz_items, score_answer
from reward import (
    Candidate,
    accuracy_of,
    passage_candidate,
    populations,
    quiz_candidates,
    score_by_proxy,
    select,
)
from sampler import generate, prefill
from selfedit import STYLES, SelfEdit, Style, note_prompts, policy_example, write_self_edits

GROUP = 3  # self-edits on each of the first few passages, where an exercise compares them
UNTOUCHED = ("out", "only", "lines")  # settings that change no figure

# -----------------------------------------------------------------------------
# what the exercises share


class Lab:
    """A model, some passages, and what is made of them: each once, when it is first asked for."""

    def __init__(self, args, model, tok):
        self.args, self.model, self.tok = args, model, tok
        self.pool = load_passages(args.data, args.split)
        self.passages = load_passages(args.data, args.split, args.skip, args.limit)
        if len(self.passages) < 2:
            raise SystemExit("error: the exercises need at least two passages")
        self.lora, self.config = lora_config(args, model), sft_config(args)

    def write(self, passages, copies: int = 1, label: str = "sample", **changes) -> list[SelfEdit]:
        """`copies` self-edits on each passage, with some settings changed."""
        args, seed = SimpleNamespace(**vars(self.args) | changes), sub_seed(self.args.seed, 0)
        return write_self_edits(self.model, self.tok, passages, copies, args, seed, label=label)

    def candidates(self, edits: list[SelfEdit]) -> list[Candidate]:
        """What an inner update learns of each: its passage, then its notes."""
        passage_of, made = {p.id: p for p in self.passages}, []
        for n, e in enumerate(edits):
            content = (passage_of[e.passage], e.notes, self.config)
            made.append(passage_candidate(self.tok, n, *content))
        return made

    def train(self, candidates, lora: LoRAConfig | None = None, seed: int = 1) -> list[tuple]:
        """Inner updates, a population at a time: [(candidates, adapters, outcomes)]."""
        trained, seed = [], sub_seed(self.args.seed, 1, seed)
        for group in populations(candidates, self.args.population):
            adapters = Adapters.init(self.model, lora or self.lora, len(group), seed)
            examples, configs = [c.examples for c in group], [c.config for c in group]
            outcomes = inner_update(self.model, adapters, examples, configs, seed)
            trained.append((group, adapters, outcomes))
        return trained

    def quiz(self, trained: list[tuple], ask=quiz_candidates) -> list:
        """ask(model, tok, candidates, adapters, outcomes), put in the candidates' order."""
        found = {}
        for group, *learnt in trained:
            results = ask(self.model, self.tok, group, *learnt)
            found |= zip([c.name for c in group], results)
        return [found[name] for name in sorted(found)]

    def accuracy(self, trained: list[tuple]) -> np.ndarray:
        """(candidates) quiz accuracy."""
        return np.array([accuracy_of(result) for result in self.quiz(trained)])

    def logprobs(self, edits: list[SelfEdit], policy: Adapters | None) -> np.ndarray:
        """(edits) how likely the policy would write each: mean log-probability per token."""
        prompts, means = note_prompts(self.tok, self.passages, self.args), []
        with merged(self.model, policy), torch.inference_mode():
            for e in edits:
                pairs = zip(prompts[e.passage], e.parts)
                sound = [(prompt, part.target) for prompt, part in pairs if part.target]
                texts = [[*self.tok.encode(text), self.tok.end_ids[0]] for _, text in sound]
                owner, room = [0] * len(sound), max(map(len, texts))
                batch, x = prefill(self.model, [prompt for prompt, _ in sound], owner, room)
                means.append(np.mean(answer_logprobs(texts, batch, x)))
        return np.array(means)

    @cached_property
    def edits(self) -> list[SelfEdit]:
        """One on each passage, by default settings."""
        return self.write(self.passages)

    @cached_property
    def default(self) -> list[tuple]:
        """The passages and these notes, learnt."""
        return self.train(self.candidates(self.edits))

    @cached_property
    def default_accuracy(self) -> np.ndarray:
        return self.accuracy(self.default)

    @cached_property
    def alone(self) -> list[tuple]:
        """The passages, learnt without notes."""
        return self.train(self.candidates([SelfEdit(p.id, []) for p in self.passages]))

    @cached_property
    def groups(self) -> list[list[SelfEdit]]:
        """GROUP self-edits on each of the first three passages."""
        return chunks(self.write(self.passages[:3], GROUP, "groups"), GROUP)


def measured(measure: str, values: dict, seed: int, unit: str = "%") -> dict:
    """An entry of the result file. values {row: one for each passage}; other rows are compared with
    the first."""
    rows, (first, *others) = [], values
    values = {name: np.array(v, dtype=float) for name, v in values.items()}
    for name, v in values.items():
        rows.append({"name": name, "mean": float(v.mean()), "ci95": bootstrap(v, seed)})
    changes = paired_steps(values, [(first, other) for other in others], seed)
    counts = {"measure": measure, "unit": unit, "n": len(values[first])}
    return counts | {"rows": rows, "changes": changes}


# -----------------------------------------------------------------------------
# the exercises, easy to hard


def temperature(lab: Lab) -> list[dict]:
    """1. Sample at 1.2 instead of 0.7, and count notes and flaws."""
    rows = {"at 0.7": lab.edits, "at 1.2": lab.write(lab.passages, temperature=1.2)}
    notes, flawed = {}, {}
    for name, edits in rows.items():
        notes[name] = [len(e.notes) for e in edits]
        flawed[name] = []
        for e in edits:
            flawed[name].append(np.mean([bool(part.flaw) for part in e.parts]))
    seed = lab.args.seed
    return [measured("notes", notes, seed, ""), measured("flawed parts", flawed, seed)]


def targets(lab: Lab) -> list[dict]:
    """2. Adapt the MLPs only, at equal steps."""
    lora = replace(lab.lora, targets=("gate_proj", "up_proj", "down_proj"))
    mlp = lab.accuracy(lab.train(lab.candidates(lab.edits), lora))
    rows = {"default": lab.default_accuracy, "MLP only": mlp}
    return [measured("accuracy", rows, lab.args.seed)]


def style(lab: Lab) -> list[dict]:
    """3. A new style of notes: each sentence turned round."""
    STYLES["turned"] = Style(
        "Turn the sentence round: say the same, but begin with what it ends with. Write two short "
        "sentences, one per line, with full names.",
        (
            "The Vantor Bell was cast by Hessa Lorn.\n"
            "Quill Bay was the home of the potter Hessa Lorn.",
            "900 kilograms is the weight of the Vantor Bell.\n"
            "The tower of the harbour school holds the Vantor Bell.",
            "The rim of the Vantor Bell was rubbed for luck by sailors.\n"
            "That custom was forbidden by the town council.",
            "The low, rough tone of the Vantor Bell comes from a crack.\n"
            "The great frost opened a crack in the Vantor Bell.",
        ),
        r"\n",
    )
    edits = lab.write(lab.passages, style="turned")
    del STYLES["turned"]  # for this run only
    rows = {"default": lab.default_accuracy}
    rows["turned"] = lab.accuracy(lab.train(lab.candidates(edits)))
    return [measured("accuracy", rows, lab.args.seed)]


def no_end(lab: Lab) -> list[dict]:
    """4. Leave the end of each sequence out of the loss: who still stops?"""

    def running(model, tok, group, adapters, outcomes):
        """For each candidate, the share of answers that ran into the length limit."""
        ends, items = {*tok.end_ids, *tok.newline_ids}, []
        for owner, c in enumerate(group):
            items += quiz_items(tok, c.subject, owner)
        prompts, owner = [list(i.prompt) for i in items], [i.owner for i in items]
        replies = generate(model, prompts, ANSWER_LEN, ends, adapters=adapters, owner=owner)
        cut = [[] for _ in group]
        for item, reply in zip(items, replies):
            cut[item.owner].append(reply[-1] not in ends)
        return list(map(np.mean, cut))

    candidates = []
    for c in lab.candidates(lab.edits):
        examples = [replace(e, counts=(*e.counts[:-1], False)) for e in c.examples]
        candidates.append(replace(c, examples=examples))
    trained = lab.train(candidates)
    share = {"default": lab.quiz(lab.default, running), "no end": lab.quiz(trained, running)}
    accuracy = {"default": lab.default_accuracy, "no end": lab.accuracy(trained)}
    seed = lab.args.seed
    return [measured("endless answers", share, seed), measured("accuracy", accuracy, seed)]


def noise(lab: Lab) -> list[dict]:
    """5. Learn the same self-edits under two seeds: do their rewards agree within a passage?"""
    tables = {"accuracy": [], "log-probability": []}  # of each: (passages, GROUP) for each seed
    candidates = lab.candidates([e for group in lab.groups for e in group])
    for seed in (1, 2):
        means = [mean_scores(r["answers"]) for r in lab.quiz(lab.train(candidates, seed=seed))]
        for name, key in (("accuracy", "accuracy"), ("log-probability", "logprob")):
            tables[name].append(np.array(chunks([m[key] for m in means], GROUP)))
    n, rows = len(lab.groups), []
    draws = np.random.default_rng(lab.args.seed).integers(0, n, (1000, n))  # of passages
    for name, (one, two) in tables.items():
        drawn = [correlation(one[at], two[at]) for at in draws]
        ci95 = list(map(float, np.quantile(drawn, [0.025, 0.975])))
        rows.append({"name": name, "mean": correlation(one, two), "ci95": ci95})
    return [{"measure": "correlation of", "unit": "", "n": n, "rows": rows, "changes": []}]


def stream(lab: Lab) -> list[dict]:
    """6. Passage after passage, each adapter merged before the next one learns: what is left?"""
    at_once, one_later, at_the_end = [], [], []

    def asked(passage) -> float:
        scores = ask(lab.model, lab.tok, quiz_items(lab.tok, passage))
        return mean_scores(scores)["accuracy"]

    candidates = lab.candidates([SelfEdit(p.id, []) for p in lab.passages])
    nothing = Adapters.init(lab.model, lab.lora, 1, 0)
    with merged(lab.model, nothing):  # on leaving, the model has its own weights again
        for n, c in enumerate(candidates):
            [(_, adapter, _)] = lab.train([c])
            merge(lab.model, adapter)
            at_once.append(asked(c.subject))
            if n:
                one_later.append(asked(candidates[n - 1].subject))
        at_the_end = [asked(c.subject) for c in candidates[:-1]]
    rows = {"at once": at_once[:-1], "one later": one_later, "at the end": at_the_end}
    return [measured("accuracy", rows, lab.args.seed)]


def choices(lab: Lab) -> list[dict]:
    """7. A quiz of choices: the answer, and three out of other passages. Chance is 25 %."""

    def right(passage, adapter) -> float:
        rng, prompts, replies = np.random.default_rng(lab.args.seed), [], []
        others = [q.answers[0] for p in lab.pool if p.id != passage.id for q in p.questions]
        for item in quiz_items(lab.tok, passage):
            golds = item.question.answers
            wrong = {a for a in others if not score_answer(a, golds)["accuracy"]}
            for answer in [golds[0], *rng.choice(sorted(wrong), 3, replace=False)]:
                prompts.append(list(item.prompt))
                replies.append(lab.tok.encode(str(answer)))
        owner, room = [0] * len(prompts), max(map(len, replies))
        lora = attached(lab.model, adapter) if adapter else nullcontext()
        with torch.inference_mode(), lora as lora:
            batch, x = prefill(lab.model, prompts, owner, room, lora)
            logprobs = answer_logprobs(replies, batch, x)
        return float(np.mean([np.argmax(four) == 0 for four in chunks(logprobs, 4)]))

    def each(model, tok, group, adapters, outcomes):
        return [right(c.subject, adapters.pick([n])) for n, c in enumerate(group)]

    rows = {"untrained": [right(p, None) for p in lab.passages]}
    rows |= {"passage": lab.quiz(lab.alone, each), "+ self-edit": lab.quiz(lab.default, each)}
    return [measured("right", rows, lab.args.seed)]


def advantage(lab: Lab) -> list[dict]:
    """8. Weigh every self-edit by its advantage in the outer update, bad ones below zero."""
    prompts, groups = note_prompts(lab.tok, lab.passages, lab.args), lab.groups[:2]
    edits, examples = [e for group in groups for e in group], {"ReST-EM": [], "advantage": []}
    score_by_proxy(edits, {p.id: p for p in lab.passages})
    select(edits, {}, "best", 0)
    for group in groups:
        rewards = np.array([e.reward for e in group])
        weights = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for e, weight in zip(group, weights.tolist()):
            pairs = list(zip(prompts[e.passage], e.parts))
            for prompt, part in [pair for pair in pairs if pair[1].target]:
                pair = (prompt, part.target)
                examples["advantage"].append(policy_example(lab.tok, *pair, weight))
                examples["ReST-EM"] += [policy_example(lab.tok, *pair)] * part.kept
    sound = [e for e in edits if not e.flaw]  # they have something to imitate
    before, kept, dropped = lab.logprobs(sound, None), {}, {}
    lora = LoRAConfig(64, 128.0, lab.lora.targets, 0, lab.model.config.n_layer)
    config = replace(lab.config, lr=5e-4, row_len=1024)
    for name, own in examples.items():
        policy = Adapters.init(lab.model, lora, 1, sub_seed(lab.args.seed, 2))
        inner_update(lab.model, policy, [own], [config], lab.args.seed)
        gains = list(zip(sound, lab.logprobs(sound, policy) - before))
        kept[name] = of_passages([(e.passage, g) for e, g in gains if e.kept])
        dropped[name] = of_passages([(e.passage, g) for e, g in gains if not e.kept])
    rows = {"gain of kept": kept, "gain of dropped": dropped}
    return [measured(name, values, lab.args.seed, "") for name, values in rows.items()]


def of_passages(pairs: list[tuple]) -> list[float]:
    """The mean for each passage of pairs (passage id, value)."""
    values = {}
    for id, value in pairs:
        values.setdefault(id, []).append(value)
    return list(map(float, map(np.mean, values.values())))


EXERCISES = {
    f.__name__: f for f in (temperature, targets, style, no_end, noise, stream, choices, advantage)
}

# -----------------------------------------------------------------------------
# the script


def figure_lines(measures: list[dict]) -> list[str]:
    """An exercise's measurements as the lines that stand in docs/EXERCISES.md."""
    lines = []
    for m in measures:
        percent = m["unit"] == "%"
        of, form, n = (100, "z.1f", m["n"]) if percent else (1, "z.2f", m["n"])
        cells = []
        for r in m["rows"]:
            mean, low, high = (format(of * v, form) for v in (r["mean"], *r["ci95"]))
            cells.append(f"{r['name']} {mean}{' %' * percent} [{low}, {high}]")
        for pair in chunks(cells, 2):
            lines.append(f"figure: {m['measure']} {', '.join(pair)}, n = {n}")
        for c in m["changes"]:
            delta, low, high = (format(of * v, "+" + form) for v in (c["delta"], *c["ci95"]))
            change = f"{delta}{' points' * percent} [{low}, {high}], n = {n}"
            lines.append(f"change: {m['measure']} {c['to']} against {c['from']} {change}")
    return lines


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    data.qa.add_flags(parser, "train", limit=6)
    selfedit.add_flags(parser)
    inner.add_lora_flags(parser)
    inner.add_sft_flags(parser)
    parser.set_defaults(steps=8, lr=8e-3, style="questions")
    add = parser.add_argument_group("exercises").add_argument
    add("--max-new", type=at_least(1), default=80, help="longest part of a self-edit, in tokens")
    add("--only", nargs="+", default=list(EXERCISES), choices=EXERCISES, help="measure these")
    add("--lines", action="store_true", help="measure nothing: print the figures in --out")
    add("--out", default="results/exercises.json", help="result file")
    return parser.parse_args()


def measured_before(args, settings: dict) -> dict:
    """What --out has of the exercises that are not measured now. Exits with one line if it was
    measured with other settings."""
    rest = set(EXERCISES) - set(args.only)
    if not rest or not Path(args.out).is_file():
        return {}
    found = read_json(args.out)
    if found["settings"] != settings:
        raise SystemExit(f"error: {args.out} has other settings: measure all eight anew")
    return {name: entry for name, entry in found["exercises"].items() if name in rest}


def main() -> None:
    args = parse_arguments()
    if args.lines:
        for name, entry in read_json(args.out)["exercises"].items():
            print(f"{name}:", *figure_lines(entry["measures"]), sep="\n")
        return
    check_output(args.out)
    settings = {k: v for k, v in vars(args).items() if k not in UNTOUCHED}
    settings |= {"data_sha256": digest(args.data)}
    entries = measured_before(args, settings)
    lab = Lab(args, *load(args))
    head = result_head(args, lab.model) | counts(lab.passages) | {"settings": settings}
    for name in [name for name in EXERCISES if name in args.only]:
        start = time.perf_counter()
        measures = EXERCISES[name](lab)
        seconds = round(time.perf_counter() - start, 1)  # with what it was the first to ask for
        entries[name] = {"command": head["command"], "seconds": seconds, "measures": measures}
        print(f"{name}:", *figure_lines(measures), sep="\n", flush=True)
        ordered = {name: entries[name] for name in EXERCISES if name in entries}
        write_json(args.out, head | {"exercises": ordered})


if __name__ == "__main__":
    run_main(main)
