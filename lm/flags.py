"""What the scripts' command lines share: one kind of parser, the model's flags and loading, the
heads of result files."""

import argparse
import math
import shlex
import sys

import torch

from lm import ranks
from lm.checkpoint import load_model
from lm.grid import Step
from lm.kernels import swap_in
from lm.tokenizer import Tokenizer
from model import Transformer


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as written, and every option with its default."""


class Parser(argparse.ArgumentParser):
    """Refuses in one line, and takes no abbreviations: a flag that is added later would change what
    they mean."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False} | options)

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} -h)\n")


def at_least(low, below=math.inf):
    """An argparse type: a number of low's type that is not below it, but `below` the other."""

    def convert(text: str):
        value = type(low)(text)  # argparse turns a ValueError into its own message
        if not low <= value:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        if not value < below:
            raise argparse.ArgumentTypeError(f"{text} is not a number below {below}")
        return value

    convert.__name__ = type(low).__name__
    return convert


def refuse_unused(parser: argparse.ArgumentParser, args, names, why: str) -> None:
    """One clear line if any of the settings `names` was given, which have no effect `why`."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {why}")


def add_model_flags(
    parser: argparse.ArgumentParser, trains: bool = True, alone: bool = True
) -> None:
    """--model, --device and --dtype; of what `trains` or samples, --seed and --compile; and --shard
    of what does not run `alone`."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default="checkpoints/smollm2-135m-instruct", help="Hugging Face folder")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the base weights",
    )
    if alone:
        parser.set_defaults(shard=1)
    else:
        about = "processes (torchrun) that hold one copy of the model, each a share of every layer"
        add("--shard", type=at_least(1), default=1, metavar="K", help=about)
    if not trains:
        parser.set_defaults(compile="off")
        return
    add("--seed", type=at_least(0, below=1 << 63), default=0, help="same seed, same output")
    backends = ["off", "inductor", "cudagraphs"]
    about = "of updates (but --outer grpo and pairs), and of sampling; cudagraphs needs CUDA, "
    about += "but no Triton"
    add("--compile", default="off", choices=backends, help=about)


def load(args) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, as args say. Exits if one does not fit the other, or --compile
    the model's device."""
    if args.shard > 1 and args.compile != "off":
        raise SystemExit("error: --shard with --compile: not both")
    model = load_model(args.model, ranks.start(args.device, args.shard), args.dtype)
    swap_in(model)
    if args.compile == "cudagraphs" and model.device.type != "cuda":
        raise SystemExit(
            f"error: --compile cudagraphs needs a CUDA device, the model is on {model.device.type}"
        )
    if args.compile != "off":
        model.step = Step(args.compile)
        try:
            torch.compile(torch.sin, backend=args.compile)(torch.ones(8, device=model.device))
        except Exception as e:
            reason = str(e).strip().splitlines()[0]
            raise SystemExit(f"error: --compile {args.compile} does not work here: {reason}") from e
    tok = Tokenizer(args.model)
    if (rows := model.config.vocab_size) <= (last := max(tok.ids)):
        raise SystemExit(
            f"error: {args.model}: tokenizer.json has the token {tok.decode([last])!r} with id "
            f"{last}, config.json a vocab_size of {rows}"
        )
    model.unused = torch.tensor(tok.unused(rows), dtype=torch.long, device=model.device)
    return model, tok


def load_student(args, model: Transformer, tok: Tokenizer) -> tuple[Transformer, Tokenizer]:
    """The model that studies and is quizzed, and its tokenizer: those of --student, or without it
    the same that write. Exits with one line if it is to learn a policy, too."""
    if not args.student:
        return model, tok
    if args.learner == "policy":
        raise SystemExit("error: --learner policy: the policy is of --model, and not of --student")
    return load(argparse.Namespace(**vars(args) | {"model": args.student}))


def command_line() -> str:
    return shlex.join(["python", *sys.argv])


def result_head(args, model: Transformer) -> dict:
    """What every result file starts with."""
    about = {"command": command_line(), "seed": args.seed, "model": args.model}
    return about | {"dtype": str(model.dtype)}
