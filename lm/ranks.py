"""Many processes at one run, as torchrun starts them: each takes its share of what is sampled and
studied, and all go on with what all have found. Alone, a process has everything.

    torchrun --nproc-per-node 2 train_outer.py qa --out runs/qa       # and eval_qa.py, eval_arc.py

Work is dealt item by item, each result stands under its item's name, and none depends on who did
it: so the number of processes changes results only by rounding. Only rank 0 speaks, and writes
what a run leaves; until a stage is done each keeps its own progress beside it (own_file()). Of the
outer update each takes its share of a step's rows (--outer-batch above 1), or with --compile makes
all of it (but with --outer grpo or pairs); the policy is then the same for all.
"""

import os
from datetime import timedelta
from pathlib import Path

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device: str) -> str:
    """Find the other processes, if there are any; the device that this one computes on."""
    if WORLD == 1:
        return device
    import torch  # here: what only reads files goes without it

    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= (n := torch.cuda.device_count()):
            told = f"error: more processes than this machine's {n} GPUs (torchrun --nproc-per-node)"
            raise SystemExit(1 if RANK else told)
        torch.cuda.set_device(device)
    if torch.distributed.is_initialized():  # a second model is loaded
        return device
    patience = timedelta(weeks=1)  # shares are dealt once, and some take longer than others
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=patience))
    # torchrun that starts all again has the addresses of those that are gone in its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    options = {"store": store, "rank": RANK, "world_size": WORLD, "timeout": patience}
    torch.distributed.init_process_group("gloo", **options)
    return device


def together(collective, *args) -> None:
    """collective(*args), which all processes call. Exits with one line if another one has ended."""
    try:
        collective(*args)
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0]
        raise SystemExit(f"error: another process of this run has ended? {reason:.200}") from e


def dealt(items: list) -> list:
    """This process's share of a list, of which every process has the whole."""
    return items[RANK::WORLD]


def gathered(items: list) -> list:
    """All processes' lists, one after another; all wait for the last one."""
    if WORLD == 1:
        return items
    import torch

    lists = [None] * WORLD
    together(torch.distributed.all_gather_object, lists, items)
    return [item for own in lists for item in own]


def agree(settings: dict) -> None:
    """Exits, on rank 0 with one line, if the processes were not all started with the same."""
    first, *others = gathered([settings])
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                told = f"{key} = {first.get(key)!r}, rank {rank} with {other.get(key)!r}"
                raise SystemExit(1 if RANK else f"error: rank 0 was started with {told}")


def own_file(path):
    """Where this process writes its part of `path`: beside it, or there, if it is alone."""
    if WORLD == 1 or not path:
        return path
    return Path(path).with_stem(f"{Path(path).stem}.{RANK + 1}-of-{WORLD}")


def parts_of(path: Path) -> list[Path]:
    """What processes have written of `path`, as many as there were."""
    return sorted(path.parent.glob(f"{path.stem}.*-of-*{path.suffix}"))


def whole(path, write) -> None:
    """The parts become one file: write(path), on rank 0, when all are done; then they go, also
    those of more processes before."""
    if not path:
        return
    path = Path(path)
    if WORLD > 1 or parts_of(path):
        write(path)
    gathered([])
    for part in () if RANK else (*parts_of(path), *path.parent.glob(f".{path.stem}.*-of-*")):
        part.unlink()


def may_write(path) -> bool:
    """Only rank 0 may, but for each one's own part."""
    return RANK == 0 or f".{RANK + 1}-of-{WORLD}" in Path(path).name


def shared(step):
    """step(model, lora, active, taken) of inner.py, for one candidate: each process takes its share
    of the rows, and all get the losses and gradients of all rows. Of a single row all get rank
    0's."""

    def shared_step(model, lora, active: list[int], taken: list[list]):
        if WORLD == 1:
            return step(model, lora, active, taken)
        import torch

        [rows], flat = taken, lora.adapters.flat
        own = rows if len(rows) == 1 else dealt(rows)
        losses, grads = step(model, lora, active, [own]) if own else (flat.new_zeros(1),) * 2
        found = torch.cat((losses, grads.flatten().expand(flat.size(1)), flat.new_ones(1)))
        if len(rows) == 1:
            together(torch.distributed.broadcast, found, 0)
        else:
            # Means over the counted tokens of own rows -> over those of all.
            found *= sum(len(row.at) for row in own)
            together(torch.distributed.all_reduce, found)
            found /= found[-1].clone()
        return found[:1], found[None, 1:-1]

    return shared_step
