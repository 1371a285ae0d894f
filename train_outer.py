"""SEAL's outer loop: reinforcement learning (ReST-EM) teaches the model to write self-edits that help it learn.

    python train_outer.py --out runs/demo --limit 12 --samples 3 --rounds 1    # minutes on two cores
    python train_outer.py --out runs/qa --samples 8 --outer-epochs 1 --reward asked --select notes    # a proxy reward
    python train_outer.py --out runs/paper --samples 5 --rounds 2 --temperature 1 --rank 32 --alpha 64 \\
        --targets q_proj v_proj --top-layers 0 --lr 1e-3 --steps 0 --epochs 10 --row-len 0 \\
        --learner policy --style implications-long --shots 0 --max-new 512 --select improving \\
        --outer-lr 3e-4 --outer-row-len 0 --outer-batch 10        # the paper's settings

    for each round:
        for each passage C:     SE_1 .. SE_M ~ LM_theta( . | C)                  sample
            for each SE_i:      theta_i = SFT(theta_0, C + SE_i)                 study  (inner update, a small LoRA)
                                r_i = score of LM_theta_i on C's quiz            quiz   (C is not in the prompt)
        theta <- SFT(theta, {(C, SE_i): SE_i was rewarded})                      reinforce

How this departs from the paper (arXiv 2506.10943, section 3):
 1. The reward needs no judge: quiz accuracy by string match, or the mean log-probability of the reference answers. With
    --reward asked nothing is studied, and notes that are questions earn how closely they ask what the quiz asks: a proxy
    without the noise of a study, which also tells what a single note is worth. --select notes imitates, of what all of a
    passage's self-edits ask about a sentence, the --keep notes that ask it best, if they are better than the average.
 2. Candidates train and answer as populations (lora.py), not one by one.
 3. The policy is the base model plus one adapter that all rounds go on training. It writes; the base model studies and
    answers (--learner base). The paper's policy does both; a small model that has been taught to write notes to whatever
    a user says may be the worse for answering questions.
 4. A self-edit whose parts are about one sentence each is rewarded part by part: a part earns what the questions about its
    sentence earn, and the best of its kind is imitated if it is better than the average (--select parts). One reward for
    the whole tells little about six parts. What is written about a sentence that no question is about is never imitated.
 5. What is imitated is not the text as sampled but what was made use of: without list markers, repetitions and what was cut
    off by the length limit. A self-edit, or part, that has no notes or copies the worked example is scored, but never
    imitated.
 6. All self-edits get the same number of steps, however long they are (--steps).

Each round writes to OUT/round-K/: sampled.jsonl and studied.jsonl (progress), candidates.jsonl (one record per self-edit:
parts, notes, settings, scores, which parts are kept and why), policy/ (a PEFT adapter); OUT/metrics.jsonl gets one line
per round.
Kill it at any time: the same command goes on where it was, and ends with the same result.
"""

import argparse
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common import Progress, digest, open_run, read_jsonl, sub_seed, write_jsonl
from data.arc import LARGEST
from data.qa import Question, load_passages
from inner import Study, arrange, inner_update, row_tokens
from lora import PROJECTIONS, Adapters, LoRAConfig, load_adapter, merged, save_adapter
from puzzle import Puzzles
from quiz import (
    Candidate,
    add_learner,
    asks,
    at_least,
    learner,
    load,
    lora_config,
    make_parser,
    mean_scores,
    normalize,
    score_answer,
    study_all,
    study_settings,
)
from selfedit import QA_PAIR, STYLES, SelfEdit, ask_for_notes, policy_example, sample_self_edits, sentences

# What another task than qa changes in the defaults. ARC's LoRA is the paper's in its targets only: a small model needs more.
ARC = {
    "data": "downloads/arc/arc1.json",
    "select": "improving",
    "outer_row_len": 0,
    "outer_batch": 2,
    "max_new": 160,
    "targets": ["q_proj", "v_proj", "gate_proj", "down_proj", "up_proj"],
    "top_layers": 0,
    "population": 4,
}
DEFAULTS = {"qa": {}, "arc": ARC}
# What a task has no use for: an ARC self-edit says itself how to train.
UNUSED = {"qa": ["tasks", "largest", "augmented"], "arc": ["style", "lr", "steps", "epochs", "row_len"]}


def add_task_arguments(parser, split: str) -> None:
    """What self-edits are about; eval_arc.py asks the same."""
    add = parser.add_argument_group("task").add_argument
    add("--data", default="data/passages.json", help="qa: passages with questions; arc: tasks (data/arc.py has the forms)")
    add("--tasks", help="arc: JSON file {split: [task id, ...]} that says which tasks (eval_arc.py --choose writes one)")
    add("--largest", type=at_least(1), default=LARGEST, help="arc, without --tasks: longest side of a grid")
    add("--split", default=split, help="qa: of the passages; arc: of --tasks")
    add("--skip", type=at_least(0), default=0, help="leave out the first N passages or tasks")
    add("--limit", type=at_least(0), default=0, help="use at most N passages or tasks, 0: all")
    add("--augmented", type=at_least(1), default=32, help="arc: most training tasks made of one task")


def refuse_unused(parser, args, names, why: str) -> None:
    """One clear line if any of the settings `names` was given, which have no effect `why`."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {why}")


def refuse_other_source(parser, args) -> None:
    """ARC's tasks are either those of --tasks or the smallest: refuse what the other is chosen by."""
    refuse_unused(parser, args, *((["largest"], "with --tasks") if args.tasks else (["split"], "without --tasks")))


def hide(parser, names) -> None:
    """Leave the settings `names`, which refuse_unused() refuses, out of -h."""
    for action in parser._actions:
        action.help = argparse.SUPPRESS if action.dest in names else action.help


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    add_task_arguments(parser, "train")
    add = parser.add_argument_group("outer loop").add_argument
    add("--task", default="qa", choices=DEFAULTS, help="qa: passages with a quiz; arc: puzzles (--task arc -h)")
    add("--out", default="runs/qa", help="run folder")
    add("--rounds", type=at_least(1), default=2, help="outer rounds")
    add_learner(add)
    add("--samples", type=at_least(1), default=4, help="self-edits per passage, M; the paper: 5")
    rewards, selections = ["accuracy", "logprob", "asked"], ["parts", "best", "improving", "notes"]
    add("--reward", default="accuracy", choices=rewards, help="of the quiz; asked: without any study, see above")
    how = "the best of each part; each passage's best; all improving on the passage alone (the paper); the best notes"
    add("--select", default="parts", choices=selections, help=f"what is imitated: {how}")
    add("--keep", type=at_least(1), default=6, help="--select notes: most notes imitated about each sentence")
    add = parser.add_argument_group("outer update (policy adapter on all layers)").add_argument
    add("--outer-rank", type=at_least(1), default=64, help="LoRA rank")
    add("--outer-alpha", type=at_least(0.0), default=128.0, help="LoRA alpha")
    add("--outer-lr", type=at_least(0.0), default=5e-4, help="peak learning rate; the paper: 3e-4")
    add("--outer-epochs", type=at_least(1), default=2, help="passes over the rewarded self-edits")
    add("--outer-row-len", type=at_least(0), default=1024, help="tokens per packed row; 0: a row per self-edit or part")
    add("--outer-batch", type=at_least(1), default=1, help="rows per step; the paper: 10 self-edits")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task", nargs="?")
    task = first.parse_known_args(argv)[0].task  # before -h, which shows its defaults
    hide(parser, UNUSED.get(task or "qa", []))
    parser.set_defaults(**DEFAULTS.get(task, {}), vote=0)  # votes are the ladder's
    args = parser.parse_args(argv)
    refuse_unused(parser, args, UNUSED[args.task], f"on --task {args.task}")
    if args.task == "arc":
        refuse_other_source(parser, args)
        if args.reward == "logprob" and args.select == "improving":
            parser.error("--reward logprob needs --select best: nothing says what a task is worth without studying")
    if args.select == "parts" and args.samples < 2:
        parser.error("--select parts compares a passage's self-edits: it needs --samples of at least 2")
    if args.reward == "asked" and (args.select == "improving" or not STYLES[args.style].quotes or args.task != "qa"):
        parser.error("--reward asked is for --style questions, and not for --select improving")
    if args.select == "notes" and args.reward != "asked":
        parser.error("--select notes needs --reward asked, which tells what each note is worth")
    refuse_unused(parser, args, [] if args.select == "notes" else ["keep"], f"with --select {args.select}")
    return args


WHY = {  # selected? -> why
    "parts": ("no sound part is the best", "some parts are the best"),
    "best": ("not the best", "best"),
    "improving": ("no better than without it", "better than without it"),
    "notes": ("no note among the best", "some notes are among the best"),
}


def select(edits: list[SelfEdit], alone: dict, how: str, keep: int) -> None:
    """Mark which self-edits, or parts of them, are imitated, and say why or why not. `alone`: passage id -> reward of the
    passage alone. A part without notes, or with a note that copies the worked example, is never imitated.

    "notes" keeps the parts that have some of best_notes().
    "parts": of two self-edits with credits [1, 0, None] and [0, 0, None], the first one's first part: it earned most, and
    more than that part earns on average, over all self-edits that were studied to the end.
    """
    for passage in dict.fromkeys(e.passage for e in edits):
        mine = [e for e in edits if e.passage == passage]
        best = max((e for e in mine if not e.flaw), key=lambda e: (e.reward, e.score.get("logprob", 0.0)), default=None)
        for e in mine:
            win = how in ("parts", "notes") or (e is best if how == "best" else e.reward > alone[passage])
            e.kept = [bool(text) and not e.flaw and win for text in e.mended]
        if how == "parts":
            for k, credits in enumerate(zip(*(e.credits or [e.reward] for e in mine))):
                keep_best(mine, k, credits)
        if how == "notes":
            for k in range(len(mine[0].kept)):
                chosen = best_notes(mine, k, keep)
                for e in mine:
                    e.kept[k] = e.kept[k] and any(q in chosen for q in e.earned[k])
        for e in mine:
            e.why = e.flaw or WHY[how][e.selected]


def keep_best(mine: list[SelfEdit], k: int, credits: tuple) -> None:
    """Of the parts k of one passage's self-edits, what they earned in credits: keep the best if it is above the mean."""
    studied = [c for c, e in zip(credits, mine) if e.flaw != "diverged" and c is not None]
    top = max((c for c, e in zip(credits, mine) if e.kept[k] and c is not None), default=None)
    for c, e in zip(credits, mine):
        e.kept[k] = e.kept[k] and c is not None and c == top and c > float(np.mean(studied)) + 1e-9


def best_notes(mine: list[SelfEdit], k: int, keep: int) -> list[str]:
    """Of the parts k of one passage's self-edits: the `keep` notes that ask most closely what some quiz question asks, best
    first, of those that ask more closely than these notes do on average.

    Earned {"Who cast it?": [0.7, 0], "Who rang it?": [0.5, 0.6], "What is it?": [0, 0.2]}, closeness to each of two quiz
    questions: the first and the second.
    """
    earned = {note: max(each) for e in mine if e.mended[k] for note, each in e.earned[k].items()}
    mean = float(np.mean(list(earned.values()) or [0.0]))
    return sorted((n for n in earned if earned[n] > mean + 1e-9), key=earned.get, reverse=True)[:keep]


class Passages:
    """--task qa: self-edits are notes on passages, and earn what the quiz on the passage says."""

    def __init__(self, args, model, tok):
        self.passages = {p.id: p for p in load_passages(args.data, args.split, args.skip, args.limit)}
        self.prompts, self.read = ask_for_notes(tok, self.passages.values(), args)
        self.pinned = {"data_sha256": digest(args.data)}  # what a resumed run must find unchanged

    def score(self, model, tok, edits, args, seed: int, folder) -> dict:
        """Study and quiz every self-edit, filling in its scores and reward; returns {id: reward of the passage alone}.

        The passage alone is only studied when --select improving needs it.
        """
        if args.reward == "asked":
            return self.compare(edits)
        lora, study = lora_config(args, model), study_settings(args)
        candidates = [Candidate(self.passages[e.passage], tuple(e.notes)) for e in edits]
        if args.select == "improving":
            candidates += [Candidate(p, ()) for p in self.passages.values()]
        log = folder / "studied.jsonl"
        results = study_all(model, tok, candidates, lora, study, seed, args.population, log, f"{folder.name} study")
        for e, result in zip(edits, results):
            e.settings = asdict(study) | asdict(lora)
            e.score, e.steps, e.loss = mean_scores(result["answers"]), result["steps"], result["loss"]
            e.flaw = "diverged" if result["diverged"] else e.flaw
            e.reward = e.score[args.reward]
            e.credits = self.credit(e, result["answers"], args.reward)
        alone = zip(self.passages, results[len(edits) :])
        return {i: mean_scores(r["answers"])[args.reward] for i, r in alone}

    def compare(self, edits: list[SelfEdit]) -> dict:
        """--reward asked: how closely does a self-edit ask for what the quiz asks for? Nothing is studied."""
        for e in edits:
            passage, notes = self.passages[e.passage], [QA_PAIR.fullmatch(note) for note in e.notes]
            asked = asks(passage, e.notes)
            e.score = {"asked": float(np.mean(asked))}
            e.reward, e.credits = e.score["asked"], by_sentence(passage, asked)
            texts = sentences(passage.text)
            e.earned = [{m[1]: asks(passage, [m[0]]) for m in notes if m[2] == text} for text in texts]
        return {}

    def credit(self, e: SelfEdit, answers: list[dict], reward: str) -> list:
        """The reward of each part of a self-edit: the mean over the questions about its sentence; None if there are none.

        A self-edit that has only one part earns the whole reward.
        """
        if len(e.parts) == 1:
            return [e.reward]
        return by_sentence(self.passages[e.passage], [a[reward] for a in answers])


def by_sentence(passage, values: list[float]) -> list:
    """values of the quiz's questions -> for each sentence, the mean over the questions about it; None if there are none."""
    texts = sentences(passage.text)
    mine = [[] for _ in texts]
    for question, value in zip(passage.questions, values):
        mine[sentence_about(question, texts)].append(value)
    return [float(np.mean(v)) if v else None for v in mine]


def sentence_about(question: Question, texts: list[str]) -> int:
    """Which sentence a question is about: the one with its answer, and of several the one with most of its words.

    "Who cast it?" (Hessa Lorn) of ["A bell was cast.", "Hessa Lorn cast it."]: 1.
    """
    told = [score_answer(t, question.answers)["accuracy"] for t in texts]
    has, asked = [normalize(t).split() for t in texts], normalize(question.question).split()
    return max(range(len(texts)), key=lambda k: (told[k], sum(w in has[k] for w in asked)))


TASKS = {"qa": Passages, "arc": Puzzles}


def outer_study(args) -> Study:
    return Study(lr=args.outer_lr, epochs=args.outer_epochs, row_len=args.outer_row_len, batch=args.outer_batch)


def to_imitate(prompts: dict, edits: list[SelfEdit], how: str, keep: int) -> list[tuple]:
    """(prompt, text) of what is kept: parts as they are, or with --select notes the best notes of all that a prompt gave."""
    if how != "notes":
        kept = [part for e in edits for part in zip(prompts[e.passage], e.mended, e.kept, strict=True)]
        return [(prompt, text) for prompt, text, keep in kept if keep]
    pairs = []
    for passage in dict.fromkeys(e.passage for e in edits):
        mine = [e for e in edits if e.passage == passage]
        pairs += [(prompt, "\n".join(best_notes(mine, k, keep))) for k, prompt in enumerate(prompts[passage])]
    return [(prompt, text) for prompt, text in pairs if text]


def train_one(model, adapter: Adapters, examples: list, study: Study, seed: int, label: str):
    """An inner update of one adapter, in place, with a progress line in tokens. Returns its Outcome."""
    tokens = sum(row_tokens(examples, *row) for row in arrange(examples, study.row_len))
    progress = Progress(label, study.epochs * tokens)
    [outcome] = inner_update(
        model, adapter, [examples], [study], seed, tick=lambda tokens, loss: progress.step(tokens, loss=loss)
    )
    return outcome


def reinforce(model, tok, prompts: dict, edits, policy: Adapters, args, seed, label) -> float:
    """Outer update: fine-tune the policy adapter in place on what is kept of the self-edits. Returns the last loss."""
    examples = [policy_example(tok, *pair) for pair in to_imitate(prompts, edits, args.select, args.keep)]
    outcome = train_one(model, policy, examples, outer_study(args), seed, label)
    if outcome.diverged:
        raise SystemExit(
            f"error: the outer update diverged at step {outcome.steps}; try a lower --outer-lr than {args.outer_lr}"
        )
    return outcome.loss


def outer_round(model, tok, task, policy: Adapters, k: int, args, out: Path) -> dict:
    """Round k: sample, study, quiz, select, reinforce. Writes the round's files and returns its metrics."""
    folder, start = out / f"round-{k}", time.perf_counter()
    how = (args.samples, args, sub_seed(args.seed, k, 0), folder / "sampled.jsonl", f"{folder.name} sample")
    with merged(model, policy):
        edits = sample_self_edits(model, tok, task.prompts, task.read, *how)
    with learner(model, policy, args):
        alone = task.score(model, tok, edits, args, sub_seed(args.seed, k, 1), folder)
    select(edits, alone, args.select, args.keep)
    write_jsonl(folder / "candidates.jsonl", [e.record() for e in edits])
    kept = [e for e in edits if e.selected]
    loss = None
    if kept:
        seed, label = sub_seed(args.seed, k, 2), f"{folder.name} reinforce"
        loss = reinforce(model, tok, task.prompts, edits, policy, args, seed, label)
    save_adapter(policy, folder / "policy", args.model)
    return {
        "round": k,
        "reward_mean": float(np.mean([e.reward for e in edits])),
        "reward_kept": float(np.mean([e.reward for e in kept])) if kept else None,
        "accuracy_mean": float(np.mean([e.score["accuracy"] for e in edits])) if args.reward != "asked" else None,
        "kept": len(kept),
        "total": len(edits),
        "kept_parts": sum(sum(e.kept) for e in edits),
        "flaws": dict(Counter(flaw for e in edits for flaw in (e.flaws if e.flaw in ("", *e.flaws) else [e.flaw]) if flaw)),
        "notes_mean": float(np.mean([len(e.notes) for e in edits])),
        "outer_loss": loss,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    args = parse_arguments()
    model, tok = load(args)
    task = TASKS[args.task](args, model, tok)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "rounds", *UNUSED[args.task])}
    out = open_run(args.out, settings | task.pinned)
    metrics = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
    config = LoRAConfig(args.outer_rank, args.outer_alpha, tuple(PROJECTIONS), 0, model.config.n_layer)
    policy = Adapters.init(model, config, 1, sub_seed(args.seed, 0))
    if metrics:
        policy = load_adapter(model, out / f"round-{len(metrics)}" / "policy")
    for k in range(len(metrics) + 1, args.rounds + 1):
        metrics.append(outer_round(model, tok, task, policy, k, args, out))
        write_jsonl(out / "metrics.jsonl", metrics)
        print(
            "  ".join(f"{key} {v:.3f}" if isinstance(v, float) else f"{key} {v}" for key, v in metrics[-1].items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
