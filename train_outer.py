"""SEAL's outer loop: reinforcement learning (ReST-EM) teaches the model to write self-edits that help it learn.

    python train_outer.py --out runs/demo --limit 16 --samples 3 --rounds 1    # minutes on two cores
    python train_outer.py --out runs/paper --samples 5 --rounds 2 --temperature 1 --rank 32 --alpha 64 \\
        --targets q_proj v_proj --top-layers 0 --lr 1e-3 --steps 0 --epochs 10 --row-len 0 \\
        --no-rehearse --style implications-long --shots 0 --max-new 512 \\
        --outer-lr 3e-4 --outer-batch 10        # the paper's settings

    for each round:
        for each passage C:     SE_1 .. SE_M ~ LM_theta( . | C)                  sample
            for each SE_i:      theta_i = SFT(theta, SE_i)                       study  (inner update, a small LoRA)
                                r_i = score of LM_theta_i on C's quiz            quiz   (C is not in the prompt)
        theta <- SFT(theta, {(C, SE_i): SE_i was rewarded})                      reinforce

How this departs from the paper (arXiv 2506.10943, section 3):
 1. The reward needs no judge: quiz accuracy by string match, or the mean log-probability of the reference answers.
 2. Candidates train and answer as populations (lora.py), not one by one.
 3. theta is the base model plus one policy adapter that all rounds go on training; it is merged into the weights
    while sampling, studying and quizzing.
 4. A self-edit, or the part of one about one sentence, that was cut off by the length limit, is empty or not in the asked
    form is scored, but never reinforced.
 5. Every inner step of the reward also takes the passage (--rehearse), and all self-edits get the same number of steps.

Each round writes to OUT/round-K/: sampled.jsonl and studied.jsonl (progress), candidates.jsonl (one record per self-edit:
text, settings, scores, selected or why not), policy/ (a PEFT adapter); OUT/metrics.jsonl gets one line per round.
Kill it at any time: the same command goes on where it was, and ends with the same result.
"""

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common import Progress, digest, open_run, read_jsonl, sub_seed, write_jsonl
from data.qa import load_passages
from inner import Study, inner_update
from lora import PROJECTIONS, Adapters, LoRAConfig, load_adapter, merge, save_adapter, unmerge
from puzzle import Puzzles
from quiz import Candidate, at_least, load, lora_config, make_parser, mean_scores, study_all, study_settings
from selfedit import SelfEdit, ask_for_notes, policy_example, sample_self_edits

# What another task than qa changes in the defaults. ARC's LoRA is the paper's in its targets only: a small model needs more.
ARC = {"data": "downloads/arc/arc1.json", "select": "improving", "temperature": 1.0, "max_new": 160}
ARC |= {"targets": ["q_proj", "v_proj", "gate_proj", "down_proj", "up_proj"], "top_layers": 0, "population": 4}
DEFAULTS = {"qa": {}, "arc": ARC}


def add_task_arguments(parser, split: str) -> None:
    """What self-edits are about; eval_arc.py asks the same."""
    add = parser.add_argument_group("task").add_argument
    add("--data", default="data/passages.json", help="qa: passages with questions; arc: tasks (data/arc.py has the forms)")
    add("--tasks", help="arc: JSON file {split: [task id, ...]} that says which tasks (eval_arc.py --choose writes one)")
    add("--split", default=split, help="qa: of the passages; arc: of --tasks")
    add("--skip", type=at_least(0), default=0, help="leave out the first N passages or tasks")
    add("--limit", type=at_least(0), default=0, help="use at most N passages or tasks, 0: all")
    add("--vote", type=at_least(0), default=0, help="arc: also predict by majority over N views of the test")
    add("--augmented", type=at_least(1), default=64, help="arc: most training tasks made of one task")


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    add_task_arguments(parser, "train")
    add = parser.add_argument_group("outer loop").add_argument
    add("--task", default="qa", choices=DEFAULTS, help="qa: passages with a quiz; arc: ARC puzzles")
    add("--out", default="runs/qa", help="run folder")
    add("--rounds", type=at_least(1), default=2, help="outer rounds")
    add("--samples", type=at_least(1), default=4, help="self-edits per passage, M; the paper: 5")
    rewards, selections = ["accuracy", "logprob"], ["best", "improving"]
    add("--reward", default="accuracy", choices=rewards, help="of the quiz; ties in accuracy are broken by logprob")
    add("--select", default="best", choices=selections, help="each passage's best, or all better than the passage alone")
    add = parser.add_argument_group("outer update (policy adapter on all layers)").add_argument
    add("--outer-rank", type=at_least(1), default=64, help="LoRA rank")
    add("--outer-alpha", type=at_least(0.0), default=128.0, help="LoRA alpha")
    add("--outer-lr", type=at_least(0.0), default=5e-4, help="peak learning rate; the paper: 3e-4")
    add("--outer-epochs", type=at_least(1), default=2, help="passes over the rewarded self-edits")
    add("--outer-batch", type=at_least(1), default=2, help="self-edits per step; the paper: 10")
    parser.set_defaults(**DEFAULTS[parser.parse_args(argv).task])
    return parser.parse_args(argv)


def select(edits: list[SelfEdit], alone: dict, how: str) -> None:
    """Mark which self-edits are reinforced, and say why or why not. `alone`: passage id -> reward of the passage alone."""
    for passage in dict.fromkeys(e.passage for e in edits):
        mine = [e for e in edits if e.passage == passage]
        sound = [e for e in mine if not e.flaw]
        best = max(sound, key=lambda e: (e.reward, e.score["logprob"]), default=None)
        for e in mine:
            if e.flaw:
                e.why = e.flaw
            elif how == "best":
                e.selected, e.why = e is best, "best" if e is best else "not the best"
            else:
                e.selected = e.reward > alone[passage]
                e.why = "better than the passage alone" if e.selected else "no better than the passage alone"


class Passages:
    """--task qa: self-edits are notes on passages, and earn what the quiz on the passage says."""

    def __init__(self, args, model, tok):
        self.passages = {p.id: p for p in load_passages(args.data, args.split, args.skip, args.limit)}
        self.prompts, self.read = ask_for_notes(tok, self.passages.values(), args)

    def score(self, model, tok, edits, args, seed: int, folder) -> dict:
        """Study and quiz every self-edit, filling in its scores and reward; returns {id: reward of the passage alone}.

        The passage alone is only studied when --select improving needs it.
        """
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
        alone = zip(self.passages, results[len(edits) :])
        return {i: mean_scores(r["answers"])[args.reward] for i, r in alone}


TASKS = {"qa": Passages, "arc": Puzzles}


def reinforce(model, tok, prompts: dict, edits, policy: Adapters, args, seed, label) -> float:
    """Outer update: fine-tune the policy adapter in place on the selected self-edits' sound parts. Returns the last loss."""
    parts = [part for e in edits if e.selected for part in zip(prompts[e.passage], e.parts, e.flaws)]
    examples = [policy_example(tok, prompt, text) for prompt, text, flaw in parts if not flaw]
    study = Study(lr=args.outer_lr, epochs=args.outer_epochs, row_len=0, batch=args.outer_batch)
    progress = Progress(label, args.outer_epochs * sum(len(x.ids) for x in examples))
    [outcome] = inner_update(
        model, policy, [examples], [study], seed, tick=lambda tokens, loss: progress.step(tokens, loss=loss)
    )
    if outcome.diverged:
        raise SystemExit(
            f"error: the outer update diverged at step {outcome.steps}; try a lower --outer-lr than {args.outer_lr}"
        )
    return outcome.loss


def outer_round(model, tok, task, policy: Adapters, k: int, args, out: Path) -> dict:
    """Round k: sample, study, quiz, select, reinforce. Writes the round's files and returns its metrics."""
    folder, start = out / f"round-{k}", time.perf_counter()
    clean = merge(model, policy)
    how = (args.samples, args, sub_seed(args.seed, k, 0), folder / "sampled.jsonl", f"{folder.name} sample")
    edits = sample_self_edits(model, tok, task.prompts, task.read, *how)
    alone = task.score(model, tok, edits, args, sub_seed(args.seed, k, 1), folder)
    unmerge(model, clean)
    select(edits, alone, args.select)
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
        "accuracy_mean": float(np.mean([e.score["accuracy"] for e in edits])),
        "kept": len(kept),
        "total": len(edits),
        "flaws": dict(Counter(flaw for e in edits for flaw in (e.flaws if e.flaw != "diverged" else [e.flaw]) if flaw)),
        "notes_mean": float(np.mean([len(e.notes) for e in edits])),
        "outer_loss": loss,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    args = parse_arguments()
    model, tok = load(args)
    task = TASKS[args.task](args, model, tok)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "rounds")}
    out = open_run(args.out, settings | {"data_sha256": digest(args.data)})
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
