"""Many processes at one run, as torchrun starts them: each takes its share of what is sampled,
studied and imitated, and all go on with what all have found. Alone, a process has everything.

    torchrun --nproc-per-node 2 train_outer.py qa --out runs/qa

Work is dealt item by item, whatever comes of it is known by its name, and none depends on who did
it: so the number of processes changes a result only by rounding. Only rank 0 speaks, and writes
what a run leaves; all write their own progress beside it (own_file()).
"""

import os
from pathlib import Path

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device: str) -> str:
    """Find the other processes, if there are any; the device that this one computes on."""
    import torch  # here: what only reads files goes without it

    if WORLD == 1:
        return device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group()
    return device


def share(items: list) -> list:
    """This process's part of a list, of which every process has the whole."""
    return items[RANK::WORLD]


def gathered(items: list) -> list:
    """All processes' lists, one after another. Exits with one line if another one has ended."""
    if WORLD == 1:
        return items
    import torch

    lists = [None] * WORLD
    try:
        torch.distributed.all_gather_object(lists, items)
    except RuntimeError as e:
        raise SystemExit("error: another process of this run has ended; start them again") from e
    return [item for own in lists for item in own]


def agree(settings: dict) -> None:
    """Exits with one line if the processes were not all started with the same."""
    first, *others = gathered([settings])
    for other in others:
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                told = f"{key} = {first.get(key)!r} here and {other.get(key)!r} there"
                raise SystemExit(f"error: the processes were started with unlike settings: {told}")


def own_file(path):
    """Where this process writes its part of `path`: beside it, or there, if it is alone."""
    if WORLD == 1 or not path:
        return path
    return Path(path).with_stem(f"{Path(path).stem}.{RANK + 1}-of-{WORLD}")


def may_write(path) -> bool:
    return RANK == 0 or f".{RANK + 1}-of-{WORLD}" in Path(path).name


def shared(step):
    """step(model, lora, active, taken) of inner.py, for one candidate: each process takes its share
    of the rows, and all get the losses and gradients of all rows."""

    def shared_step(model, lora, active: list[int], taken: list[list]):
        [rows] = taken
        if WORLD == 1 or len(rows) == 1:  # nothing to share: all do the same
            return step(model, lora, active, taken)
        import torch

        own, flat = share(rows), lora.adapters.flat
        losses, grads = step(model, lora, active, [own]) if own else (flat.new_zeros(1),) * 2
        # Means over the counted tokens of own rows -> over those of all.
        counted = sum(len(row.at) for row in own)
        found = (
            torch.cat((losses, grads.flatten().expand(flat.size(1)), flat.new_ones(1))) * counted
        )
        torch.distributed.all_reduce(found)
        found /= found[-1].clone()
        return found[:1], found[None, 1:-1]

    return shared_step
