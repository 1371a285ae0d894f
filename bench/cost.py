"""What does a candidate cost, in seconds and bytes, and what would it cost for a larger model, and
on more devices?

    python bench/cost.py                            # -> results/cost.json: four minutes

Inner updates of random models of several widths and depths are timed, each in a process of its own.
A model of the cost is fitted to them, by least squares of relative errors:
    seconds of a step  = a * FLOPs + b * adapted layers + c * numbers
                         products, what an operation costs however small it is, element-wise work
    bytes of a step    = d * numbers * bytes of a number
                         activations; what is held of an adapter, held_of_adapter(), is taken off
    numbers            = tokens * adapted layers * (width + width of the MLP)
"fit" has a to d, "rows" what was measured and what the model says of it, and "check" the same for
--model with the default recipe, which it was not fitted to.

"predictions" carry the arithmetic over to models and GPUs that were never tried. They assume WORK
and GPU below and are no measurements: a to c are of this CPU, and replaced by a share of the GPU's
peak. docs/SCALE.md says what would break first.
"""

import ctypes
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np
import torch

from bench.scaling import inner_flops
from inner import SFTConfig, inner_update
from lm.checkpoint import load_model, pick_dtype
from lm.files import check_output, run_main, write_json
from lm.flags import Parser, add_model_flags, at_least, command_line
from lm.kernels import swap_in
from lm.packing import Example
from lora import PROJECTIONS, Adapters, LoRAConfig
from model import Config, Transformer

# (layers, width, candidates, tokens of each in a step)
SHAPES = [
    (4, 256, 1, 256),
    (4, 256, 8, 256),
    (4, 1024, 1, 256),
    (4, 1024, 4, 256),
    (8, 512, 1, 128),
    (8, 512, 4, 256),
    (8, 1536, 1, 256),
    (16, 512, 1, 256),
    (16, 512, 8, 128),
    (24, 768, 2, 256),
]
VOCAB = 4096  # small: the output projection runs for counted tokens only, and is counted as FLOPs

# -----------------------------------------------------------------------------
# predictions: what is assumed

# As many self-edits, and studies of each, as in the paper's round (arXiv 2506.10943): 50 passages,
# five each, three adapters each. Their length is that of our runs, and all projections are adapted.
WORK = {"candidates": 750, "samples": 250, "epochs": 10, "tokens": 700, "counted": 500}
WORK |= {"asked": 300, "written": 500, "questions": 5, "prompt": 60, "answer": 32, "rank": 32}
WORK |= {"population": 8, "row_len": 256, "batch": 128}  # at most 8; of 128 samples side by side
# NVIDIA's data sheet of the H100 SXM: dense bfloat16 products, memory and its bandwidth. The shares
# of them are assumptions.
GPU = {"name": "H100", "flops": 989e12, "bytes": 80e9, "bytes_per_s": 3.35e12}
GPU |= {"share_of_flops": 0.4, "share_of_bandwidth": 0.5}
# NVLink: 900 GB/s, to and fro together, among the eight GPUs of a machine, which is as many as a
# copy of a model may be shared out to.
GPU |= {"link": 450e9, "to_a_copy": [1, 2, 4, 8]}
# layers, width, width of the MLP, width of all queries, and of all keys, vocabulary, is it there
# twice (as embedding and as output)?
MODELS = {
    "Llama-3.2-1B": (16, 2048, 8192, 2048, 512, 128256, False),
    "Qwen2.5-7B": (28, 3584, 18944, 3584, 512, 152064, True),
    "Llama-3.1-70B": (80, 8192, 28672, 8192, 1024, 128256, True),
}
DEVICES = (1, 2, 8, 64)


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("bench").add_argument
    add("--shapes", type=at_least(4), default=len(SHAPES), help="how many random models")
    add("--steps", type=at_least(2), default=6, help="steps that are timed, after one that is not")
    add("--repeats", type=at_least(1), default=3, help="turns; the median counts")
    add("--out", default="results/cost.json", help="result file")
    args = parser.parse_args()
    if args.device not in ("cpu", "auto") or args.compile != "off":
        parser.error("--device, --compile: this measures a CPU; bench/gpu.py measures a GPU")
    return args


# -----------------------------------------------------------------------------
# measuring


def random_model(n_layer: int, width: int, dtype) -> Transformer:
    """As SmolLM2 is built, with heads of 64."""
    heads = width // 64
    sizes = {"n_layer": n_layer, "n_head": heads, "n_kv_head": max(1, heads // 4), "head_dim": 64}
    inner = round(width * 8 / 3 / 64) * 64
    sizes |= {"n_embd": width, "n_inner": inner, "vocab_size": VOCAB}
    rest = {"rope_theta": 1e4, "rope_scaling": None, "tie_embeddings": True, "norm_eps": 1e-5}
    rest |= {"qkv_bias": False, "qk_norm": False, "hf": {}, "max_seq_len": 2048}
    torch.manual_seed(0)
    return Transformer(Config(**sizes, **rest)).to(dtype).requires_grad_(False)


def texts(tokens: int, seed: int) -> list[Example]:
    """A row of two sequences, of which every second token counts."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens).tolist()
    half = tokens // 2
    counts = tuple(t % 2 == 1 for t in range(half))
    return [Example(tuple(ids[:half]), counts), Example(tuple(ids[half:]), counts)]


def memory(name: str) -> int:
    """Bytes that this process has under `name` in /proc: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(shape: tuple, args) -> dict:
    """A step of one shape, or of --model if that is (); in a process that measures nothing else."""
    dtype = pick_dtype(torch.device("cpu"), args.dtype)
    if shape:
        n_layer, width, P, tokens = shape
        model, start = random_model(n_layer, width, dtype), 0
    else:
        model, P, tokens = load_model(args.model, "cpu", args.dtype), 8, 256
        start = max(0, model.config.n_layer - 10)
    swap_in(model)
    c = model.config
    lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), start, c.n_layer)
    adapters = Adapters.init(model, lora, P, args.seed)
    examples = [texts(tokens, p) for p in range(P)]
    sft = SFTConfig(lr=1e-4, steps=1, row_len=tokens)

    def run(steps: int) -> float:
        began = time.perf_counter()
        configs = [replace(sft, steps=steps)] * P
        inner_update(model, adapters, examples, configs, args.seed)
        return time.perf_counter() - began

    run(1)  # brings the weights into their layout
    seconds = []
    for _ in range(args.repeats):
        one = run(1)
        seconds.append((run(1 + args.steps) - one) / args.steps)
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no longer held
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    run(2)
    taken = memory("VmHWM") - before - P * (held_of_adapter(dtype.itemsize) - 4) * adapters.size
    both = [inner_flops(model, examples, lora, replace(sft, steps=n)) for n in (1, 2)]
    row = {"n_layer": c.n_layer, "adapted": c.n_layer - start, "n_embd": c.n_embd}
    row |= {"n_inner": c.n_inner, "P": P, "tokens": P * tokens, "number": dtype.itemsize}
    row |= {"flops": both[1] - both[0], "seconds": statistics.median(seconds)}
    return row | {"bytes": max(taken, 1)}


def in_own_process(shape: tuple, args) -> dict:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, shape, args).result()


# -----------------------------------------------------------------------------
# the model of the cost


def terms(row: dict) -> list[float]:
    """What a to c are multiplied with."""
    return [row["flops"], row["adapted"], numbers(row)]


def numbers(row: dict) -> int:
    return row["tokens"] * row["adapted"] * (row["n_embd"] + row["n_inner"])


def activations(row: dict) -> int:
    """What d is multiplied with."""
    return numbers(row) * row["number"]


def held_of_adapter(number: int) -> int:
    """Bytes for each number of an adapter while it is trained: in float32 its value, gradient and
    AdamW's two moments, and in the model's type, of `number` bytes, it and its gradient."""
    return 16 + 2 * number


def fitted(columns: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Factors of the columns (n, k), none below zero, by least squares of relative errors. One that
    would be below zero is 0, and the others are fitted again."""
    used, found = list(range(columns.shape[1])), np.zeros(columns.shape[1])
    while used:
        relative = columns[:, used] / measured[:, None]
        scale = np.abs(relative).max(axis=0)  # FLOPs and layers are 12 powers of ten apart
        values = np.linalg.lstsq(relative / scale, np.ones(len(measured)), rcond=None)[0] / scale
        if values.min() >= 0:
            found[used] = values
            break
        used.remove(used[int((values * scale).argmin())])
    return found


def fit(rows: list[dict]) -> dict:
    seconds = fitted(np.array([terms(r) for r in rows]), np.array([r["seconds"] for r in rows]))
    room = fitted(np.array([[activations(r)] for r in rows]), np.array([r["bytes"] for r in rows]))
    return dict(zip("abcd", map(float, [*seconds, *room])))


def with_model(row: dict, fit: dict) -> dict:
    """The row with what the model of the cost says of it."""
    seconds = float(np.dot([fit[k] for k in "abc"], terms(row)))
    return row | {"says_seconds": seconds, "says_bytes": fit["d"] * activations(row)}


# -----------------------------------------------------------------------------
# predictions


def predict(name: str, devices: int, d: float) -> dict:
    """Minutes of the inner updates, quizzes and samples of a round of WORK on GPUs, and gigabytes
    of each: with as many GPUs to a copy of the model, and as many candidates side by side, as make
    it shortest of what fits."""
    plans = []
    for shards in (n for n in GPU["to_a_copy"] if n <= devices):
        P = WORK["population"]
        while P:
            plans.append(planned(name, devices, d, shards, P))
            P //= 2
    fitting = [plan for plan in plans if plan["gb"] * 1e9 <= GPU["bytes"]]
    if not fitting:
        least = min(plans, key=lambda plan: plan["gb"])
        return {k: least[k] for k in ("model", "devices", "gb", "shards", "P")} | {"fits": False}
    return min(fitting, key=lambda plan: plan["minutes"]) | {"fits": True}


def planned(name: str, devices: int, d: float, shards: int, P: int) -> dict:
    """One way to do it: copies of the model on `shards` GPUs each (lm/ranks.py), each with a
    population of P at a time."""
    n_layer, width, inner, queries, keys, vocab, twice = MODELS[name]
    shapes = [(width, queries)] * 2 + [(width, keys)] * 2 + [(width, inner)] * 3
    weights = n_layer * sum(a * b for a, b in shapes)
    adapter = n_layer * WORK["rank"] * sum(a + b for a, b in shapes)
    output, own = vocab * width, math.ceil(P / shards)  # of a step's candidates each GPU has `own`
    layers = {"adapted": n_layer, "n_embd": width, "n_inner": inner, "number": 2}
    copies = devices // shards
    samples = math.ceil(WORK["samples"] / copies)

    # Held: the model, of a layer that is gathered what came and what it becomes, and the most of
    # what a study, an outer update of one sample a step, and a batch of samples need beside it.
    model = 2 * (weights / shards + output * (1 + twice))
    model += 2 * 2 * weights / n_layer * (shards > 1)
    study = (16 * P + 4 * own + 4 * P * (shards > 1)) * adapter  # summed gradients are there twice
    study += d * activations(layers | {"tokens": own * WORK["row_len"]})
    long = WORK["asked"] + WORK["written"]  # tokens of a sample
    outer = held_of_adapter(2) * adapter + d * activations(layers | {"tokens": long})
    cache = min(WORK["batch"], samples) * long * n_layer * 2 * keys * 2
    sampling = 2 * weights / shards + 4 * adapter + cache  # with the weights before merge()
    held = model + max(study, outer, sampling)

    rate = GPU["flops"] * GPU["share_of_flops"]
    read, link = (GPU[kind] * GPU["share_of_bandwidth"] for kind in ("bytes_per_s", "link"))
    gather = 2 * weights * (1 - 1 / shards) / link  # seconds, for all layers once
    reduce = 2 * 4 * P * adapter * (1 - 1 / shards) / link  # of a step's gradients
    populations = math.ceil(WORK["candidates"] / P / copies)
    # FLOPs: 2 for each weight and token forward, 2 more for the gradient of its input, 6 of LoRA.
    flops = WORK["tokens"] * (4 * weights + 6 * adapter) + WORK["counted"] * 4 * output
    steps = math.ceil(WORK["tokens"] / WORK["row_len"])
    epoch = own * flops / rate + steps * (2 * gather + reduce)
    # Of quizzes and samples each GPU of a copy computes all. Decoding reads the weights for each
    # token, and once for all rows: those of a population's quizzes, with its adapters, or a batch
    # of samples.
    forward = 2 * (weights + output)
    token = 2 * (weights + output) / read + gather
    answers, asked = P * WORK["questions"], WORK["prompt"] + WORK["answer"]
    quiz = answers * asked * forward / rate + WORK["answer"] * (token + 2 * P * adapter / read)
    quiz += 3 * gather  # what prompts have in common, the rest of them, and the right answers
    batches = math.ceil(samples / WORK["batch"])
    sample = samples * long * forward / rate + batches * WORK["written"] * token
    row = {"model": name, "devices": devices, "gb": held / 1e9, "shards": shards, "P": P}
    row |= {"study_min": populations * WORK["epochs"] * epoch / 60}
    row |= {"quiz_min": populations * quiz / 60, "sample_min": sample / 60}
    return row | {"minutes": row["study_min"] + row["quiz_min"] + row["sample_min"]}


def tables(result: dict) -> list[str]:
    """What docs/SCALE.md shows of a result, as lines of Markdown."""
    lines = ["| layers adapted | width | P | tokens | seconds | the model says | bytes | it says |"]
    lines.append("| ---: " * 8 + "|")
    for r in [*result["rows"], result["check"]]:
        cells = [f"{r['adapted']} of {r['n_layer']}", r["n_embd"], r["P"], r["tokens"]]
        cells += [f"{r['seconds']:.3f}", f"{r['says_seconds']:.3f}"]
        cells += [f"{r['bytes'] / 1e6:.0f} MB", f"{r['says_bytes'] / 1e6:.0f} MB"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("| model | GPUs | to a copy | P | GB each | study | quiz | sampling | minutes |")
    lines.append("| --- |" + " ---: |" * 8)
    for r in result["predictions"]:
        cells = [r["model"], r["devices"], r["shards"], r["P"], f"{r['gb']:.0f}"]
        names = ("study_min", "quiz_min", "sample_min", "minutes")
        cells += [f"{r[name]:.2f}" for name in names] if r["fits"] else ["does not fit", "", "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


# -----------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("error: what a process takes of memory is read from /proc: Linux only")
    rows = []
    for shape in [(), *SHAPES[: args.shapes]]:
        rows.append(in_own_process(shape, args))
        print({k: round(v, 4) if k == "seconds" else v for k, v in rows[-1].items()}, flush=True)
    factors = fit(rows[1:])
    check, *of_shapes = [with_model(row, factors) for row in rows]
    predictions = []
    for name in MODELS:
        predictions += [predict(name, devices, factors["d"]) for devices in DEVICES]
    head = {"command": command_line(), "seed": args.seed, "model": args.model}
    head |= {"threads": torch.get_num_threads(), "fit": factors, "rows": of_shapes, "check": check}
    result = head | {"work": WORK, "gpu": GPU, "predictions": predictions}
    write_json(args.out, result)
    print("\n".join(tables(result)))


if __name__ == "__main__":
    run_main(main)
