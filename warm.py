"""A warm-up for ARC: teach the model what a grid is, on other puzzles than those it will be tested on.

    python warm.py --data downloads/arc/arc2.json --skip 60       # on ARC-AGI-2's training tasks, but the 60 smallest

(`make results-arc` goes on from there: which of the 60 can be solved, RL on half of those, the ladder on the other half.)

A model of 135M parameters has hardly seen a grid. Test-time training on three demonstrations then has to teach it what
rows, shapes and colours are along with the rule, and mostly fails. So a LoRA on all layers learns from whole tasks, each
in --augmented views, drawn anew in each of --parts: a symmetry, other colours, the pairs in another order. It is merged
into the weights; what comes out is a model folder for the --model of every script.

The paper has no such step (it takes a larger model). That no task is trained on here and tested there is seen to: the
folder's config.json names the tasks, and train_outer.py and eval_arc.py refuse them.

Kill it at any time: the same command goes on after the last part that was finished.
"""

from pathlib import Path

import numpy as np

from checkpoint import save_model
from common import open_run, sub_seed
from data.arc import SYMMETRIES, Task, chosen_tasks, recolour
from inner import Study
from lora import PROJECTIONS, Adapters, load_adapter, merge, save_adapter
from puzzle import SEEN, task_example
from quiz import at_least, load, lora_config, make_parser
from train_outer import ARC, add_task_arguments, hide, refuse_other_source, refuse_unused, train_one

UNUSED = ["style", "shots", "temperature", "top_p", "max_new", "steps", "epochs", "row_len", "population"]


def parse_arguments():
    parser = make_parser(__doc__)
    add_task_arguments(parser, "train")
    add = parser.add_argument_group("warm-up").add_argument
    add("--parts", type=at_least(1), default=4, help="times that all tasks are trained on, each time in other views")
    add("--batch", type=at_least(1), default=4, help="sequences per step")
    add("--longest", type=at_least(1), default=640, help="leave out tasks of more than N tokens: attention takes N x N")
    add("--out", default="checkpoints/smollm2-135m-arc", help="new model folder")
    add("--work", default="runs/warm", help="folder for progress, to resume a killed run")
    hide(parser, UNUSED)
    parser.set_defaults(data=ARC["data"], largest=10, augmented=4)
    parser.set_defaults(rank=64, alpha=128.0, targets=list(PROJECTIONS), top_layers=0, lr=5e-4)
    args = parser.parse_args()
    refuse_unused(parser, args, UNUSED, "on a warm-up")
    refuse_other_source(parser, args)
    return args


def view(task: Task, rng: np.random.Generator) -> Task:
    """All pairs of a task, test pairs among them, in another order, under a symmetry and with other colours, or not."""
    pairs = (*task.train, *task.test)
    seen = Task(task.id, tuple(pairs[i] for i in rng.permutation(len(pairs))), ())
    changes = [lambda g: g, *SYMMETRIES.values()]
    seen = seen.map(changes[rng.integers(len(changes))])
    return seen.map(recolour(rng)) if rng.random() < 0.5 else seen


def train_part(model, tok, tasks: list[Task], adapter: Adapters, k: int, args) -> None:
    """Part k of args.parts trains `adapter` in place on other views than the parts before, at a lower learning rate."""
    rng = np.random.default_rng([args.seed, k])
    examples = [task_example(tok, view(t, rng), every_token=False) for t in tasks for _ in range(args.augmented)]
    examples = [e for e in examples if len(e.ids) <= model.config.max_seq_len]  # a view may have more rows than its task
    lr = args.lr * (1 - (k - 1) / args.parts)
    study = Study(lr=lr, epochs=1, schedule="constant", row_len=0, batch=args.batch)
    outcome = train_one(model, adapter, examples, study, sub_seed(args.seed, k), f"part {k}/{args.parts}")
    if outcome.diverged:
        raise SystemExit(f"error: training diverged at step {outcome.steps} of part {k}; try a lower --lr than {args.lr}")
    tenth = max(1, outcome.steps // 10)
    first, last = (float(np.mean(some)) for some in (outcome.losses[:tenth], outcome.losses[-tenth:]))
    print(
        f"part {k}: {outcome.steps} steps, lr {lr:.2g}, loss {first:.3f} in the first tenth, {last:.3f} in the last",
        flush=True,
    )


def main() -> None:
    args = parse_arguments()
    if Path(args.out).exists():
        raise SystemExit(f"error: --out {args.out} exists already; choose another folder")
    model, tok = load(args)
    config = lora_config(args, model)
    tasks, room = chosen_tasks(args), min(args.longest, model.config.max_seq_len)
    tasks = {i: t for i, t in tasks.items() if len(task_example(tok, t, every_token=False).ids) <= room}
    if not tasks:
        raise SystemExit(f"error: {args.tasks or args.data}: no task of at most {room} tokens to train on")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "work", *UNUSED)}
    work = open_run(args.work, settings | {"ids": list(tasks)})
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
    main()
