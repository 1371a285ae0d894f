"""Many processes at one run, as torchrun starts them: each takes its share of what is sampled and
studied, and all go on with what all have found. Alone, a process has everything.

    torchrun --nproc-per-node 2 train_outer.py qa --out runs/qa       # and eval_qa.py, eval_arc.py

Work is dealt item by item, each result stands under its item's name, and none depends on who did
it: so the number of processes changes results only by rounding. Only rank 0 speaks, and writes
what a run leaves; until a stage is done each keeps its own progress beside it (own_file()). Of the
outer update each takes its share of a step's rows (--outer-batch above 1), or with --compile makes
all of it (but with --outer grpo or pairs); the policy is then the same for all.

    torchrun --nproc-per-node 8 train_outer.py qa --shard 4 --model ...

A model too large for one device is held by several (--shard, by torch's FSDP2): each has a share of
every layer, and gathers the others' when the layer runs. So they run the same layers in step, and
are dealt work as if they were one process: rows of a step are then shared out among them, and
whatever else they compute, all of them do.
"""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MESH = None  # with --shard: the processes that hold a copy of the model with this one


def start(device: str, shard: int = 1) -> str:
    """Find the other processes, if there are any, of which `shard` hold one copy of the model; the
    device that this one computes on. Exits, on rank 0 with one line, if they do not divide."""
    global MESH
    if WORLD % shard:
        told = (
            f"error: --shard {shard}: so many processes hold a copy, and there are {WORLD} in all"
        )
        raise SystemExit(1 if RANK else f"{told} (torchrun --nproc-per-node)")
    if WORLD == 1:
        return device
    import torch  # here: what only reads files goes without it

    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= (n := torch.cuda.device_count()):
            told = f"error: more processes than this machine's {n} GPUs (torchrun --nproc-per-node)"
            raise SystemExit(1 if RANK else told)
        torch.cuda.set_device(device)
    elif shard > 1:
        if device not in ("auto", "cpu"):
            told = f"error: --shard is for --device auto, cuda or cpu, and not {device}"
            raise SystemExit(1 if RANK else told)
        device = "cpu"
    if torch.distributed.is_initialized():  # a second model is loaded
        return device
    patience = timedelta(weeks=1)  # shares are dealt once, and some take longer than others
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=patience))
    # torchrun that starts all again has the addresses of those that are gone in its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    options = {"store": store, "rank": RANK, "world_size": WORLD, "timeout": patience}
    kind = device.split(":")[0]
    backend = "cpu:gloo,cuda:nccl" if shard > 1 and kind == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, **options)
    agree({"shard": shard})
    if shard > 1:
        MESH = mesh_of_copy(shard, kind, patience)
    return device


def mesh_of_copy(shard: int, kind: str, patience: timedelta):
    """The processes that hold this one's copy of the model, on devices of a kind."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    groups = []  # each of which all processes take part in making
    for first in range(0, WORLD, shard):
        ranks = list(range(first, first + shard))
        groups.append(torch.distributed.new_group(ranks, timeout=patience))
    return DeviceMesh.from_group(groups[RANK // shard], kind)


def holders() -> int:
    """How many processes hold one copy of the model, one after another by rank."""
    return MESH.size() if MESH else 1


def replicas() -> tuple[int, int]:
    """Which copy of the model this process holds, or has a share of, and how many there are."""
    return RANK // holders(), WORLD // holders()


def together(collective, *args) -> None:
    """collective(*args), which all processes call. Exits with one line if another one has ended
    (which FSDP, when it gathers a layer, says in words of its own)."""
    try:
        collective(*args)
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0]
        raise SystemExit(f"error: another process of this run has ended? {reason:.200}") from e


def dealt(items: list) -> list:
    """This process's share of a list, of which every process has the whole."""
    mine, of = replicas()
    return items[mine::of]


def gathered(items: list) -> list:
    """All processes' lists, one after another, each copy's once; all wait for the last one."""
    return [item for own in lists_of_all(items)[:: holders()] for item in own]


def lists_of_all(items: list) -> list[list]:
    if WORLD == 1:
        return [items]
    import torch

    lists = [None] * WORLD
    together(torch.distributed.all_gather_object, lists, items)
    return lists


def agree(settings: dict) -> None:
    """Exits, on rank 0 with one line, if the processes were not all started with the same."""
    first, *others = lists_of_all(settings)
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                told = f"{key} = {first.get(key)!r}, rank {rank} with {other.get(key)!r}"
                raise SystemExit(1 if RANK else f"error: rank 0 was started with {told}")


def own_file(path):
    """Where this process writes its part of `path`: beside it, or there, if it is alone."""
    mine, of = replicas()
    if of == 1 or not path:
        return path
    return Path(path).with_stem(f"{Path(path).stem}.{mine + 1}-of-{of}")


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
    """Only rank 0 may, but for each copy's own part, which the first of its processes writes."""
    mine, of = replicas()
    return RANK == 0 or (RANK % holders() == 0 and f".{mine + 1}-of-{of}" in Path(path).name)


def shared(step, by_all: bool = True):
    """step(model, lora, active, taken) of inner.py, made by all processes, or only by those that
    hold one copy of the model: each takes its share of the rows, and all get the losses and
    gradients of all rows."""

    def shared_step(model, lora, active: list[int], taken: list[list]):
        rank, of = (RANK, WORLD) if by_all else (RANK % holders(), holders())
        if of == 1:
            return step(model, lora, active, taken)
        import torch

        rows, own = [(i, row) for i, each in enumerate(taken) for row in each], {}
        for i, row in rows[rank::of]:
            own.setdefault(i, []).append(row)
        # One that holds a share of the layers runs them even if no row is left for it.
        run = own or ({0: taken[0][:1]} if MESH else {})
        found = lora.adapters.flat.new_zeros(len(active), 1 + lora.adapters.size)
        results = step(model, lora, [active[i] for i in run], [*run.values()]) if run else ((), ())
        for i, loss, grad in zip(own, *results):
            # Means over the counted tokens of own rows -> over those of all.
            share = counted(own[i]) / counted(taken[i])
            found[i, 0], found[i, 1:] = share * loss, share * grad
        group = None if by_all else MESH.get_group()
        together(partial(torch.distributed.all_reduce, group=group), found)
        return found[:, 0], found[:, 1:]

    return shared_step


def counted(rows: list) -> int:
    return sum(len(row.at) for row in rows)


# -----------------------------------------------------------------------------
# one copy of the model among several processes


def split_layers(model) -> None:
    """Each layer's weights are from now on shared out among the processes of a copy, by rows. The
    embedding, the last norm and the output are not. What the model computes stays the same."""
    if not MESH:
        return
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=MESH, reshard_after_forward=True)


def share_of(weight, tensor):
    """What this process holds of `tensor` if `weight`, of the same shape, is shared out: rows, as a
    DTensor. If not: the tensor."""
    if not hasattr(weight, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor

    own = tensor[own_rows(len(tensor), holders(), MESH.get_local_rank())]
    own = own.clone()  # a view would keep the whole
    about = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(own, MESH, weight.placements, run_check=False, **about)


def own_rows(n: int, holders: int, mine: int) -> slice:
    """Of n rows those that FSDP gives to one of the holders: of 5 rows four have 2, 2, 1 and 0."""
    each = -(-n // holders)
    return slice(each * mine, each * (mine + 1))


def gather_once(model) -> None:
    """Once the weights are there. The first to gather makes the buffers, and that must not be
    generate(), whose tensors know no gradient."""
    for layer in model.layers if MESH else ():
        layer.unshard()
        layer.reshard()


def as_first(tokens):
    """The tokens that the first of a copy's processes has chosen: one that went on with others
    would end sooner or later than they, who would wait for it."""
    if MESH:
        import torch

        first = RANK - RANK % holders()
        together(partial(torch.distributed.broadcast, group=MESH.get_group()), tokens, first)
    return tokens
