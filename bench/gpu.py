"""On a GPU: does it do the same, and how fast is it? Eight minutes, without anybody beside it.

    python bench/gpu.py                             # -> results/gpu.json
    python bench/gpu.py --device cpu --populations 2 --repeats 1 --backends off --out runs/gpu.json

Parts; each is written to --out when it is done, and one that fails leaves its error there:
    same      in float32 on the device and on the CPU: losses and adapters of an inner update, and
              greedy tokens
    train     the inner update at P = --populations, for --backends of --compile: tokens per second,
              the share of the device's rate of products, the seconds until the first run was over
              (compiling takes them), and the peak of memory
    generate  tokens of P prompts, and answers to quiz questions under P adapters, per second, for
              the same backends
    other     peft's tuned loop, and generate(), on the same device (bench/baselines.py); a prompt
              that sequences of a row share counts once on both sides
The work is that of bench/speed.py, with the default recipe; figures are medians of --repeats.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import torch

import reward
from bench.scaling import inner_flops
from data.qa import load_passages
from inner import inner_update, lora_config, sft_config
from lm.checkpoint import load_model
from lm.files import check_output, read_json, run_main, write_json
from lm.flags import Parser, at_least, load, result_head
from lm.grid import Step
from lm.packing import arrange, row_tokens
from lora import Adapters
from quiz import quiz_items
from reward import passage_candidate
from sampler import generate
from selfedit import edit_prompts, settle

WORK = "data/bench_work.json"
TOKENS = 64  # of a continuation


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    add = parser.add_argument_group("bench").add_argument
    numbers = {"type": at_least(1), "nargs": "+"}
    add("--populations", **numbers, default=[1, 8, 32, 128], help="candidates side by side")
    backends = ["off", "cudagraphs", "inductor", "eager"]
    add("--backends", nargs="+", default=backends[:3], choices=backends, help="of --compile")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to run")
    add("--repeats", type=at_least(1), default=3, help="turns")
    add("--out", default="results/gpu.json", help="result file")
    parser.set_defaults(device="cuda")
    args = settle(parser.parse_args())
    if args.compile != "off":
        parser.error("--compile: it is --backends here")
    return args


class Bench:
    """The model on the device, and the work."""

    def __init__(self, args):
        self.args = args
        self.model, self.tok = load(args)
        self.lora, self.sft = lora_config(args, self.model), sft_config(args)
        passages = {p.id: p for p in load_passages(WORK)}
        self.candidates = []
        for e in read_json(WORK)["self_edits"]:
            how = (passages[e["passage"]], e["notes"], self.sft)
            self.candidates.append(passage_candidate(self.tok, 0, *how))
        self.prompts = []
        for p in passages.values():
            self.prompts += edit_prompts(self.tok, args.style, p.title, p.text, args.shots)

    def population(self, P: int) -> list:
        """P candidates; again from the first when there are no more."""
        return first(P, self.candidates)

    def train(self, P: int, model=None):
        """(outcomes, adapters) of one inner update."""
        model, own = model or self.model, self.population(P)
        adapters = Adapters.init(model, self.lora, P, self.args.seed)
        how = ([c.examples for c in own], [self.sft] * P, self.args.seed)
        return inner_update(model, adapters, *how), adapters

    def timed(self, run) -> float:
        """Seconds, until the device is done."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def median(self, run) -> float:
        return statistics.median(self.timed(run) for _ in range(self.args.repeats))

    def peak(self) -> float:
        """Gigabytes of the device's memory since this was last asked; 0 on a CPU."""
        if self.model.device.type != "cuda":
            return 0.0
        most = torch.cuda.max_memory_allocated(self.model.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.model.device)
        return most

    def product_rate(self, n: int = 4096) -> float:
        """FLOP/s of a square product in the model's type."""
        n = n if self.model.device.type == "cuda" else n // 4
        a = torch.ones(n, n, dtype=self.model.dtype, device=self.model.device)
        run = lambda: [a @ a for _ in range(10)]  # noqa: E731
        run()
        return 20 * n**3 / self.median(run)


def first(n: int, items: list) -> list:
    """n of the items; again from the first when there are no more."""
    return (items * -(-n // len(items)))[:n]


# -----------------------------------------------------------------------------
# parts


def same(b: Bench) -> list[dict]:
    found, answers = [], []
    for device in ("cpu", b.args.device):
        model = load_model(b.args.model, device, "float32")
        outcomes, adapters = b.train(2, model)
        start = Adapters.init(model, b.lora, 1, b.args.seed).flat.cpu()
        found.append((outcomes, adapters.flat.cpu()))
        answers.append(generate(model, b.prompts[:8], TOKENS, b.tok.end_ids))
    (one, a), (other, z) = found
    gaps, tokens = [], []
    for x, y in zip(one, other):
        gaps += [abs(p - q) for p, q in zip(x.losses, y.losses, strict=True)]
    for x, y in zip(*answers):
        tokens += [p == q for p, q in zip(x, y)]
    row = {"work": "same", "n_steps": len(gaps), "largest_loss_gap": max(gaps)}
    row["adapters"] = float((a - z).norm() / (a - start).norm())  # of what they have learnt
    return [row | {"same_tokens": sum(tokens) / len(tokens), "n_tokens": len(tokens)}]


def train(b: Bench) -> list[dict]:
    rate, rows = b.product_rate(), []
    for P in b.args.populations:
        own = b.population(P)
        flops = inner_flops(b.model, [c.examples for c in own], b.lora, b.sft)
        for backend in b.args.backends:
            b.model.step = Step(backend) if backend != "off" else None
            outcomes, row = [], {"work": "train", "P": P, "compile": backend}
            try:
                row["first_s"] = b.timed(lambda P=P, to=outcomes: to.append(b.train(P)[0]))
                b.peak()
                seconds = b.median(lambda P=P: b.train(P))
            except Exception as e:
                rows.append(row | {"error": f"{type(e).__name__}: {e}"[:300]})
                continue
            finally:
                b.model.step = None
            tokens = sum(o.tokens for o in outcomes[0])
            row |= {"seconds": seconds, "tokens_per_s": tokens / seconds}
            rows.append(row | {"of_peak": flops / seconds / rate, "peak_gb": b.peak()})
    return rows


def sample(b: Bench) -> list[dict]:
    rows = []
    for P in b.args.populations:
        prompts = first(P, b.prompts)
        how = {"temperature": 0.7, "top_p": 0.95, "seed": b.args.seed}
        sampled = lambda p=prompts, how=how: generate(b.model, p, TOKENS, (), **how)  # noqa: E731
        items = []
        for n, c in enumerate(b.population(P)):
            items += quiz_items(b.tok, c.subject, n)
        asked = {"adapters": Adapters.init(b.model, b.lora, P, b.args.seed)}
        asked |= {"owner": [i.owner for i in items]}
        prompts = [list(i.prompt) for i in items]
        answered = lambda p=prompts, how=asked: generate(b.model, p, 32, (), **how)  # noqa: E731
        for backend in b.args.backends:
            b.model.step = Step(backend) if backend != "off" else None
            for work, run, n in (("sample", sampled, P * TOKENS), ("quiz", answered, len(items))):
                unit = "tokens_per_s" if work == "sample" else "answers_per_s"
                row = {"work": work, "P": P, "compile": backend}
                try:
                    row["first_s"] = b.timed(run)
                    rows.append(row | {unit: n / b.median(run)})
                except Exception as e:
                    rows.append(row | {"error": f"{type(e).__name__}: {e}"[:300]})
        b.model.step = None
    return rows


def other(b: Bench) -> list[dict]:
    from bench.baselines import Baseline  # needs requirements-dev.txt

    theirs, c = Baseline(b.args.model, b.model.dtype, b.model.device), b.candidates[0]
    rows = arrange(c.examples, b.sft.row_len)
    rows = (rows * b.sft.steps)[: b.sft.steps]
    steps = [list(map(c.examples.__getitem__, row)) for row, _ in rows]
    one = Adapters.init(b.model, b.lora, 1, b.args.seed)
    tokens = sum(row_tokens(c.examples, *row) for row in rows)  # as ours are counted
    turns = []
    for _ in range(b.args.repeats):
        setup = theirs.setup
        seconds = b.timed(lambda: theirs.train(one, steps, b.sft))
        turns.append(seconds - (theirs.setup - setup))
    seconds = statistics.median(turns)
    found = [{"work": "train", "other": "peft, tuned loop", "tokens_per_s": tokens / seconds}]
    for P in b.args.populations:
        prompts = first(P, b.prompts)
        how = {"temperature": 0.7, "top_p": 0.95}
        run = lambda p=prompts, how=how: theirs.generate(p, TOKENS, **how)  # noqa: E731
        row = {"work": "sample", "other": "generate", "rows": P}
        found.append(row | {"tokens_per_s": P * TOKENS / b.median(run)})
    return found


PARTS = {"same": same, "train": train, "generate": sample, "other": other}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    b = Bench(args)
    name = torch.cuda.get_device_name(b.model.device) if b.model.device.type == "cuda" else "cpu"
    head = result_head(args, b.model) | {"device": name, "torch": torch.__version__}
    head |= {"settings": vars(args), "rows": []}
    for part in (name for name in PARTS if name in args.parts):
        start = time.perf_counter()
        try:
            rows = PARTS[part](b)
        except Exception as e:  # the others are worth having
            rows = [{"error": f"{type(e).__name__}: {e}"[:300]}]
        seconds = round(time.perf_counter() - start, 1)
        head["rows"] += [{"part": part} | row for row in rows]
        head.setdefault("minutes", {})[part] = round(seconds / 60, 2)
        write_json(args.out, head)
        for row in rows:
            print(part, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    run_main(main)
