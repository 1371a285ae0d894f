"""A warm-up for ARC: teach the model what a grid is, on other puzzles than those it will be tested
on.

    python experiments/warm.py --data downloads/arc/arc2.json --skip 60
                                        # on ARC-AGI-2's training tasks, but the 60 smallest

(`make results-arc` goes on from there: which of the 60 can be solved, RL on half of those, the
ladder on the other half.)

A model of 135M parameters has hardly seen a grid. Test-time training on three demonstrations then
has to teach it what rows, shapes and colours are along with the rule, and mostly fails. So a LoRA
on all layers learns from whole tasks, each in --augmented views, drawn anew in each of --parts: a
symmetry, other colours, the pairs in another order. It is merged into the weights; what comes out
is a model folder for the --model of every script.

The paper has no such step (it takes a larger model). That no task is trained on here and tested
there is seen to: the folder's config.json names the tasks, and train_outer.py and eval_arc.py
refuse them, by these names.

Kill it at any time: the same command goes on after the last part that was finished.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.arc
import inner
from arc import SEEN, task_example
from data.arc import SYMMETRIES, Task, chosen_tasks, recolour
from inner import SFTConfig, lora_config, update_one
from lm.adapters import load_adapter, save_adapter
from lm.checkpoint import save_model
from lm.files import GOES_ON, check_output, run_main, sub_seed
from lm.flags import Parser, add_model_flags, at_least, load
from lm.runs import open_run
from lora import PROJECTIONS, Adapters, merge


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    data.arc.add_flags(parser, "train")
    inner.add_lora_flags(parser, population=False)
    add = parser.add_argument_group("warm-up").add_argument
    add(
        "--lr", type=at_least(0.0), default=5e-4, help="peak learning rate; falls from part to part"
    )
    about = "views of a task in each part"
    add("--augmented", type=at_least(1), default=4, help=about)
    about = "times that all tasks are trained on, each time in other views"
    add("--parts", type=at_least(1), default=4, help=about)
    add("--batch", type=at_least(1), default=4, help="sequences per step")
    about = "leave out tasks of more than N tokens: attention takes N x N"
    add("--longest", type=at_least(1), default=640, help=about)
    add("--out", default="checkpoints/smollm2-135m-arc", help="new model folder")
    add("--work", default="runs/warm", help="folder for progress, to resume a killed run")
    parser.set_defaults(largest=10)
    parser.set_defaults(rank=64, alpha=128.0, targets=list(PROJECTIONS), top_layers=0)
    args = parser.parse_args()
    data.arc.refuse_other_source(parser, args)
    return args


def view(task: Task, rng: np.random.Generator) -> Task:
    """All pairs of a task, test pairs among them, in another order, under a symmetry and with other
    colours, or not."""
    pairs = (*task.train, *task.test)
    seen = Task(task.id, tuple(pairs[i] for i in rng.permutation(len(pairs))), ())
    changes = [lambda g: g, *SYMMETRIES.values()]
    seen = seen.map(changes[rng.integers(len(changes))])
    return seen.map(recolour(rng)) if rng.random() < 0.5 else seen


def train_part(model, tok, tasks: list[Task], adapter: Adapters, k: int, args) -> None:
    """Part k of args.parts trains `adapter` in place on other views than the parts before, at a
    lower learning rate."""
    rng = np.random.default_rng([args.seed, k])
    views = [view(t, rng) for t in tasks for _ in range(args.augmented)]
    examples = [task_example(tok, v, every_token=False) for v in views]
    # A view may have more rows than its task.
    examples = [e for e in examples if len(e.ids) <= model.config.max_seq_len]
    lr = args.lr * (1 - (k - 1) / args.parts)
    config = SFTConfig(lr=lr, epochs=1, schedule="constant", row_len=0, batch=args.batch)
    outcome = update_one(
        model, adapter, examples, config, sub_seed(args.seed, k), f"part {k}/{args.parts}"
    )
    if outcome.diverged:
        raise SystemExit(
            f"error: training diverged at step {outcome.steps} of part {k}; try a lower --lr than "
            f"{args.lr}"
        )
    tenth = max(1, outcome.steps // 10)
    first, last = (
        float(np.mean(losses)) for losses in (outcome.losses[:tenth], outcome.losses[-tenth:])
    )
    print(
        f"part {k}: {outcome.steps} steps, lr {lr:.2g}, loss {first:.3f} in the first tenth, "
        f"{last:.3f} in the last",
        flush=True,
    )


def main() -> None:
    args = parse_arguments()
    if Path(args.out).exists():
        raise SystemExit(f"error: --out {args.out} exists already; choose another folder")
    check_output(args.out, folder=True)
    model, tok = load(args)
    config = lora_config(args, model)
    tasks, room = chosen_tasks(args), min(args.longest, model.config.max_seq_len)
    tasks = {
        i: t for i, t in tasks.items() if len(task_example(tok, t, every_token=False).ids) <= room
    }
    if not tasks:
        raise SystemExit(
            f"error: {args.tasks or args.data}: no task of at most {room} tokens to train on"
        )
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "work")}
    work = open_run(args.work, settings | {"ids": list(tasks)}, model)
    print(f"{len(tasks)} tasks")
    adapter, done = Adapters.init(model, config, 1, sub_seed(args.seed, 0)), 0
    while (work / f"part-{done + 1}" / "adapter_config.json").is_file():
        done += 1
    if done:
        adapter = load_adapter(model, work / f"part-{done}")
    for k in range(done + 1, args.parts + 1):
        train_part(model, tok, list(tasks.values()), adapter, k, args)
        save_adapter(adapter, work / f"part-{k}", args.model)
    merge(model, adapter)
    model.config.hf[SEEN] = sorted({*model.config.hf.get(SEEN, []), *tasks})
    save_model(model, args.out, args.model)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_main(main, GOES_ON)
