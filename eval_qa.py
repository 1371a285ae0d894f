"""The knowledge ladder: what does the model know about held-out passages after each way of learning
them?

    python eval_qa.py                               # without a policy
    python eval_qa.py --run runs/qa --match both                             # and seal-1, seal-2
    python eval_qa.py --data my.json --samples 4 --out results/my.json       # your passages
    python eval_qa.py --split "" --no-study --out results/passages.json      # are passages fit?

Rows:
    base                 the model as it is; it has never seen the passage
    passage              after an inner update on the passage
    passage+unrelated    after an inner update on the passage and the untrained model's notes on
                         another passage: what is more training worth, without more to learn?
    passage+self-edit    after an inner update on the passage and the untrained model's notes on it
    passage+pooled       the same, with the notes of all --samples self-edits at once: is it enough
                         to write more?
    proxy                the same, with notes of a policy that was trained with --reward proxy
                         (--proxy)
    seal-K               the same, with notes that the policy wrote after outer round K (--learner
                         policy: it learns, too)
    stronger-editor      the same, with the "self_edits" that stand in the data file
    told                 the same, with the quiz's own questions as notes (--told): what notes could
                         teach at most
    in-context           the model as it is, with the passage in the prompt (what learning replaces)

With --settings, as in train_outer.py, the self-edits of seal-K say what is studied, and how, each
within --budget trained tokens. The notes of the other rows above are questions, studied as the
flags (or --recipes) say. Two more rows:
    untrained-settings   what the untrained model's own settings ask for, studied as they say
    best-fixed           what the best settings of experiments/grid.py ask for, written by the
                         untrained model, studied as they say (--fixed)
    passage+seal-K       after an inner update on the passage and notes of the policy, as in the row
                         passage+self-edit: without its settings, what are its notes worth?
                         (--policy-notes)

With --student that model learns and answers in all rows, and --model writes.

--match epochs is the paper's protocol: every row takes the same number of epochs, so more text
means more optimiser steps. With --match steps every row takes exactly --steps steps, of up to
--row-len tokens of passage or notes each; with --recipes (experiments/recipes.py) each row takes
the steps and the learning rate that suit it best, found on training passages. passage+pooled,
proxy, seal-K, stronger-editor and told take those of passage+self-edit.

Columns: accuracy, em, f1 and logprob are defined in quiz.py; means over passages of the mean over a
passage's questions (and its self-edits, and --seeds). ci95 is a bootstrap interval over passages;
"steps" in the JSON compares each row with the one before it and with the last seal-K, rows with
notes with the passage alone, and a policy's notes with the untrained model's, on the same passages
(paired), so its interval is the one to read for "does it help?". "gap_closed" is how much of the
way from passage to in-context the last seal-K goes.

With --run and no --out the result is RUN/ladder.json, and RUN/ladder/ holds the progress: report.py
makes a page of them. WORK/answers.jsonl has what each row learnt from and answered.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import data.qa
import inner
import reward
import selfedit
from data.qa import counts, load_passages, refuse_training_passages
from data.text import sentences
from inner import learner, lora_config, sft_config
from lm.adapters import load_adapter
from lm.files import (
    GOES_ON,
    chunks,
    digest,
    fingerprint,
    read_json,
    run_main,
    sub_seed,
    warn,
    write_json,
    write_jsonl,
)
from lm.flags import Parser, at_least, load, load_student, refuse_unused, result_head
from lm.intervals import (
    bootstrap,
    gap_closed,
    paired_steps,
    pairs_of,
    protocol_title,
    written_steps,
)
from lm.log import Log, Progress
from lm.runs import (
    add_ladder_flags,
    find_policies,
    open_run,
    policy_digests,
    set_outputs,
)
from lora import merged
from quiz import ask, mean_scores, quiz_items
from reward import (
    NOTHING,
    QUESTIONS,
    RESULT,
    accuracy_of,
    by_sentence,
    edit_candidate,
    passage_candidate,
    pooled,
    populations,
    quiz_candidates,
    told,
    unrelated,
    update_and_quiz,
)
from selfedit import SelfEdit, parse, parse_settings, settle, write_self_edits

OUT = "runs/qa_ladder.json"
METRICS = ("accuracy", "em", "f1", "logprob")


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser, alone=False)
    data.qa.add_flags(parser, "heldout")
    add = parser.add_argument_group("ladder").add_argument
    add("--samples", type=at_least(1), default=1, help="self-edits per passage, averaged")
    inner.add_learner_flag(parser)
    about = "climb so many times, with other self-edits and adapters, and average"
    add("--seeds", type=at_least(1), default=1, help=about)
    about = "only base and in-context: what is known, and what can be read off"
    add("--no-study", action="store_true", help=about)
    about = "protocol; with both the results are ..._epochs.json and ..._steps.json"
    add("--match", default="steps", choices=["epochs", "steps", "both"], help=about)
    about = (
        "with --match steps: JSON of experiments/recipes.py with each row's best --lr and --steps"
    )
    add("--recipes", help=about)
    selfedit.add_settings_flags(parser)
    about = "with --settings: JSON of experiments/grid.py with the best settings for all"
    add("--fixed", help=about)
    about = "add the row told, whose notes ask the quiz's own questions"
    add("--told", action="store_true", help=about)
    about = "with --settings: add the rows passage+seal-K, of the policies' notes alone"
    add("--policy-notes", action="store_true", help=about)
    reward.add_proxy_flag(parser)
    add_ladder_flags(parser, "qa", OUT)
    args = settle(parser.parse_args())
    if args.match != "epochs" and not (args.steps or args.no_study):
        parser.error("--match steps needs --steps above 0")
    refuse_contradictions(parser, args)
    return set_outputs(args, OUT)


def refuse_contradictions(parser, args) -> None:
    if not args.settings:
        refuse_unused(parser, args, ["budget", "fixed", "policy_notes"], "without --settings")
    elif args.match != "steps" or args.style != "questions" or args.no_study:
        told = "each self-edit says how it is studied, with notes in all styles"
        parser.error(f"--settings: {told}; leave out --match, --style and --no-study")


# -----------------------------------------------------------------------------
# scores


def per_passage(passages, answers: list[list[list[dict]]]) -> dict:
    """answers[passage][sample][question] -> {metric: array over passages}, with accuracy by
    question direction."""
    columns = {m: [] for m in METRICS} | {"forward": [], "reversed": []}
    for passage, samples in zip(passages, answers):
        means = [mean_scores(scores) for scores in samples]
        for m in METRICS:
            columns[m].append(np.mean([mean[m] for mean in means]))
        for direction in ("forward", "reversed"):
            values = []
            for scores in samples:
                both = zip(scores, passage.questions)
                values += [s["accuracy"] for s, q in both if q.direction == direction]
            if values:  # over the passages that have such questions
                columns[direction].append(np.mean(values))
    return {name: np.array(values) for name, values in columns.items() if values}


def summarize(table: dict, seed: int) -> dict:
    """table {method: {metric: one value per passage}} -> "rows", "steps" and "gap_closed" of the
    result file."""
    rows, methods = [], list(table)
    for method, scores in table.items():
        means = {m: float(scores[m].mean()) for m in METRICS}
        row = {"method": method, "accuracy": means["accuracy"]}
        row |= {"ci95": bootstrap(scores["accuracy"], seed)} | means
        for name in ("forward", "reversed", "train_steps", "train_tokens", "lr"):
            if name in scores:
                row[name] = float(scores[name].mean())
        rows.append(row)
    with_notes = [m for m in methods if m.startswith(("passage+self-edit", "passage+seal-"))]
    notes = [("passage", m) for m in with_notes]
    notes += [("passage+self-edit", m) for m in with_notes[1:]]
    pairs, seal = pairs_of(methods, notes)
    steps = paired_steps({m: scores["accuracy"] for m, scores in table.items()}, pairs, seed)
    result = {"rows": rows, "steps": steps}
    if seal:
        low, high, reached = (table[m]["accuracy"] for m in ("passage", "in-context", *seal))
        result["gap_closed"] = {"by": seal[0]} | gap_closed(low, high, reached, seed)
    return result


# -----------------------------------------------------------------------------
# rows


def without_update(model, tok, passages, show_passage: bool, label: str, batch: int = 8) -> list:
    """The answers of a row without an inner update, answers[passage][sample][question]: base, or
    with the passage in the prompt. Asks about `batch` passages at a time."""
    answers, progress = [], Progress(label, len(passages))
    for group in chunks(passages, batch):
        quizzes = [quiz_items(tok, p, n, show_passage) for n, p in enumerate(group)]
        scores = iter(ask(model, tok, [item for items in quizzes for item in items]))
        for items in quizzes:
            answers.append([[next(scores) for _ in items]])
        progress.step(len(group))
    return answers


def notes_of(edits: list[list[SelfEdit]]) -> list[list[tuple]]:
    """The notes of edits[passage][sample]."""
    return chunks([tuple(e.notes) for e in itertools.chain(*edits)], len(edits[0]))


def unstudied(passage) -> dict:
    """The result of a self-edit that was not studied: nothing is answered, in no step."""
    answers = [NOTHING | {"answer": ""} for _ in passage.questions]
    return {"steps": 0, "tokens": 0, "answers": answers}


class Climb:
    """One climb of the ladder: rows after an inner update, under each protocol, from one seed."""

    def __init__(self, writer, student, passages, args, recipes, fixed, seed: int, work: Path):
        self.model, self.tok = writer
        self.student, self.its_tok = student
        self.passages, self.args = passages, args
        self.recipes, self.fixed, self.seed, self.work = recipes, fixed, seed, work
        self.tables = {p: {} for p in ("epochs", "steps") if args.match in (p, "both")}
        self.records = []  # what each row learnt from and answered

    def row(self, method: str, notes: list[list[tuple]], titles=None) -> None:
        """Each passage is learnt once with each of its lists of notes: notes[passage][sample],
        under titles[passage]."""
        titles = titles or [p.title for p in self.passages]
        for protocol, table in self.tables.items():
            own_recipe = {"steps": 0} if protocol == "epochs" else self.recipes.get(method, {})
            config, candidates = replace(sft_config(self.args), **own_recipe), []
            for passage, samples, title in zip(self.passages, notes, titles):
                for own in samples:
                    n = len(candidates)
                    how = (n, passage, own, config, title)
                    candidates.append(passage_candidate(self.its_tok, *how))
            name = f"{method}-{protocol}{config.steps or config.epochs}-{config.lr:g}"
            results = self.study(method, protocol, name, candidates)
            table[method] = self.columns(results, notes)
            table[method]["lr"] = np.full(len(notes), config.lr)
        self.record(method, results, notes)

    def settings_row(self, method: str, edits: list[list[SelfEdit]], name: str = ""):
        """Each passage is learnt as each of its self-edits says; `name`: of the log."""
        candidates = []
        for passage, samples in zip(self.passages, edits):
            for e in samples:
                how = (passage, e, self.args, sub_seed(self.seed, 1))
                c, e.flaw = edit_candidate(self.its_tok, len(candidates), *how)
                candidates.append(c)
        log = f"{name or method}-{self.args.budget}"
        results = self.study(method, "steps", log, candidates)
        self.tables["steps"][method] = self.columns(results, edits)
        self.record(method, results, edits)

    def study(self, method: str, protocol: str, name: str, candidates: list) -> list[dict | None]:
        """Each candidate's result; None for what is not studied."""
        lora = lora_config(self.args, self.student)
        log = Log(self.work / f"{name}.jsonl", accuracy_of, needed=RESULT)
        groups = populations([c for c in candidates if c], self.args.population)
        how = (lora, sub_seed(self.seed, 1), log, quiz_candidates, f"{method} ({protocol})")
        update_and_quiz(self.student, self.its_tok, groups, *how)
        return [log[c] if c else None for c in candidates]

    def columns(self, results: list, learnt: list[list]) -> dict:
        """The row's scores: results of what was learnt[passage][sample]."""
        answers, steps, tokens, left = [], [], [], iter(results)
        for passage, samples in zip(self.passages, learnt):
            group = [next(left) or unstudied(passage) for _ in samples]
            answers.append([r["answers"] for r in group])
            steps.append(np.mean([r["steps"] for r in group]))
            tokens.append(np.mean([r["tokens"] for r in group]))
        taken = {"train_steps": np.array(steps), "train_tokens": np.array(tokens)}
        return per_passage(self.passages, answers) | taken

    def record(self, method: str, results: list, learnt: list[list]) -> None:
        """learnt[passage][sample]: notes, or a self-edit that says how they are studied."""
        left = iter(results)
        for passage, samples in zip(self.passages, learnt):
            for own in samples:
                result, how = next(left), {}
                if isinstance(own, SelfEdit):
                    how = {"settings": own.settings if result else {}, "flaw": own.flaw}
                    own = own.notes if result else ()
                answers = (result or unstudied(passage))["answers"]
                self.records.append(answer_record(method, passage, own, answers) | how)

    def write(self, method: str, given: dict | None = None) -> list[list[SelfEdit]]:
        """Self-edits on every passage, args.samples times, by the model as it is now; with
        `given` settings."""
        log = self.work / f"{method}-sampled.jsonl"
        n = self.args.samples
        seed = sub_seed(self.seed, 0)
        how = (self.passages, n, self.args, seed, log, f"{method} sample", given)
        return chunks(write_self_edits(self.model, self.tok, *how), n)

    def climb(self, policies: dict) -> None:
        model, passages = self.model, self.passages
        self.row("passage", [[()]] * len(passages))
        edits = self.write("passage+self-edit", QUESTIONS)
        notes = notes_of(edits)
        if len(passages) > 1:
            self.row("passage+unrelated", *unrelated(passages, notes))
        self.row("passage+self-edit", notes)
        if self.args.samples > 1:
            self.row("passage+pooled", [[pooled(samples)] for samples in notes])
        if self.args.settings:
            self.settings_row("untrained-settings", self.write("untrained-settings"))
        if self.fixed:
            name = f"best-fixed-{fingerprint(json.dumps(self.fixed).encode())}"
            self.settings_row("best-fixed", self.write(name, self.fixed), name)
        for method, adapter in policies.items():
            policy = load_adapter(model, adapter)
            says_how = self.args.settings and method != "proxy"
            with merged(model, policy):
                edits = self.write(method, None if says_how else QUESTIONS)
                if self.args.policy_notes and says_how:
                    notes = notes_of(self.write(f"passage+{method}", QUESTIONS))
            with learner(self.student, policy, self.args):
                if says_how:
                    self.settings_row(method, edits)
                else:
                    self.row(method, notes_of(edits))
                if self.args.policy_notes and says_how:
                    self.row(f"passage+{method}", notes)
        if all(p.self_edits for p in passages):
            given = []
            for p in passages:
                texts = p.self_edits[: self.args.samples]
                given.append([tuple(parse(text, "implications", True)[0]) for text in texts])
            self.row("stronger-editor", given)
        if self.args.told:
            self.row("told", [[told(p)] for p in passages])


def answer_record(method: str, passage, notes, answers: list[dict]) -> dict:
    """What one candidate learnt from and answered, as report.py shows it."""
    asked = []
    for question, a in zip(passage.questions, answers):
        asked.append({"question": question.question, "accepted": list(question.answers)} | a)
    credits = by_sentence(passage, [a["accuracy"] for a in answers])
    about = {"method": method, "passage": passage.id, "title": passage.title, "text": passage.text}
    sentence_credits = [list(pair) for pair in zip(sentences(passage.text), credits)]
    return about | {"notes": list(notes), "answers": asked, "sentences": sentence_credits}


def ladder(writer, student, passages, policies: dict, args, recipes: dict, fixed: dict, work: Path):
    """`writer` and `student`: each a model and its tokenizer. Returns {protocol: {method: scores}},
    averaged over seeds, and the first seed's records."""
    base = without_update(*student, passages, False, "base")
    shown = without_update(*student, passages, True, "in-context")
    tables, records = {}, []
    for method, answers in (("base", base), ("in-context", shown)):
        both = zip(passages, answers)
        records += [answer_record(method, p, (), samples[0]) for p, samples in both]
    base, shown = per_passage(passages, base), per_passage(passages, shown)
    if args.no_study:
        return {"none": {"base": base, "in-context": shown}}, records
    climbs = []
    for n in range(args.seeds):
        seed = sub_seed(args.seed, n)
        how = (recipes, fixed, seed, work / f"climb-{n}")
        climbs.append(Climb(writer, student, passages, args, *how))
        climbs[-1].climb(policies)
    for protocol, first in climbs[0].tables.items():
        tables[protocol] = {"base": base}
        for method in first:
            tables[protocol][method] = mean_of([c.tables[protocol][method] for c in climbs])
        tables[protocol]["in-context"] = shown
    return tables, records + climbs[0].records


def mean_of(rows: list[dict]) -> dict:
    """The mean over climbs of each column of a row."""
    columns = {}
    for name in rows[0]:
        columns[name] = np.mean([row[name] for row in rows], axis=0)
    return columns


def own_recipes(args, methods) -> dict:
    """{method: {"lr", "steps"}} from --recipes. Exits with one line if the file has none for what
    the ladder needs."""
    if not args.recipes:
        return {}
    given, best = read_json(args.recipes).get("best"), {}
    for method, recipe in given.items() if isinstance(given, dict) else ():
        lr, steps = map(recipe.get, ("lr", "steps")) if isinstance(recipe, dict) else (0, 0)
        if type(lr) in (int, float) and 0 < lr < np.inf and type(steps) is int and steps > 0:
            best[method] = {"lr": lr, "steps": steps}
    for method in ("passage", "passage+unrelated", "passage+self-edit"):
        if method not in best:
            raise SystemExit(
                f"error: {args.recipes}: no 'lr' and 'steps' for {method!r} under 'best'; "
                "see experiments/recipes.py"
            )
    others = ["passage+pooled", *methods, "stronger-editor", "told"]
    others += [f"passage+{method}" for method in methods]
    return best | dict.fromkeys(others, best["passage+self-edit"])


def fixed_settings(args) -> dict:
    """The best settings of --fixed. Exits with one line if the file has none, and notes what they
    were found under."""
    if not args.fixed:
        return {}
    found = read_json(args.fixed)
    settings, flaw = parse_settings(json.dumps(found.get("best")), True)
    if flaw:
        raise SystemExit(f"error: {args.fixed}: no settings under 'best'; see experiments/grid.py")
    before, other = found.get("settings", {}), []
    for key in ("model", "budget", "rank", "alpha", "targets", "top_layers", "row_len"):
        if key in before and before[key] != getattr(args, key):
            other.append(f"--{key.replace('_', '-')} {before[key]}")
    if other:
        warn(f"{args.fixed} was found with {', '.join(other)}, other than this ladder")
    return settings


def show(rows: list, steps: list, title: str) -> None:
    columns = "accuracy    95 % CI        em     f1   logprob  steps   against the row above"
    print(f"\n{title}\n{'':20} {columns}")
    deltas, _ = written_steps(rows, steps)
    for r in rows:
        low, high = (100 * v for v in r["ci95"])
        accuracy = f"{100 * r['accuracy']:6.1f} %  [{low:4.1f}, {high:4.1f}]"
        scores = f"{100 * r['em']:5.1f}  {100 * r['f1']:5.1f}  {r['logprob']:7.2f}"
        taken = f"{r.get('train_steps', 0):5.1f}"
        print(f"{r['method']:20} {accuracy}  {scores}  {taken}   {deltas.get(r['method'], '')}")


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    policies = find_policies(args, "qa")
    recipes = own_recipes(args, policies)
    fixed = fixed_settings(args)  # complains now rather than later
    refuse_training_passages(passages, args)
    model, tok = load(args)
    student = load_student(args, model, tok)
    lora_config(args, student[0])  # complains now rather than after sampling
    out = Path(args.out)
    free = "out work match steps recipes seeds run policy proxy no_study".split()
    free += ["told", "fixed", "policy_notes"]
    settings = {k: v for k, v in vars(args).items() if k not in free}  # free: may change on resume
    settings |= {"data_sha256": digest(args.data), "policies": policy_digests(policies)}
    work = open_run(args.work, settings, model, student[0])
    how = (passages, policies, args, recipes, fixed, work)
    tables, records = ladder((model, tok), student, *how)
    write_jsonl(work / "answers.jsonl", records)
    head = result_head(args, model) | counts(passages)
    head["settings"] = settings | {k: getattr(args, k) for k in ("steps", "recipes", "seeds")}
    head["settings"]["fixed"] = fixed
    for protocol, table in tables.items():
        result = head | {"protocol": protocol} | summarize(table, args.seed)
        write_json(out.with_stem(f"{out.stem}_{protocol}") if len(tables) > 1 else out, result)
        title = f"{len(passages)} passages, {protocol_title(result)}"
        show(result["rows"], result["steps"], title)
    learnt = [r for r in records if r["passage"] == passages[0].id and r["notes"]]
    print(f"\nSelf-edits for {passages[0].title!r}: {passages[0].text}" if learnt else "")
    for r in learnt:
        print("\n".join([f"\n--- {r['method']}", *r["notes"]]))


if __name__ == "__main__":
    run_main(main, GOES_ON, alone=False)
