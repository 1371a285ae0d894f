"""SEAL's outer loop: reinforcement learning (ReST-EM) teaches the model to write self-edits that
help it learn.

    python train_outer.py qa --out runs/first --limit 12 --samples 3 --rounds 1     # minutes
    python train_outer.py qa --out runs/proxy --samples 8 --reward proxy --select notes
    python train_outer.py qa --settings --samples 8 --outer-row-len 2048 --out runs/settings
    python train_outer.py arc --tasks results/arc_tasks.json --out runs/puzzles --samples 5

    for each round:
        for each context C, a passage or a puzzle's demonstrations:
                            SE_1 .. SE_M ~ LM_theta( . | C)            sample
            for each SE_i:  theta_i = SFT(theta_0, C + SE_i)           inner update, a small LoRA
                            r_i = score of LM_theta_i on C's quiz      quiz, C is not in the prompt
        theta <- SFT(theta, {(C, SE_i): r_i is the best})              reinforce (--select, --outer)

theta is the base model and one adapter, the policy, that all rounds go on training; theta_0 is the
base model. With --student another model studies and answers. With --agents several policies on one
base write, all of it is studied, and each imitates the best of all, whoever wrote it (--exchange).
What earns what, and what is imitated, is in reward.py. docs/PAPER.md says where this departs from
the paper (arXiv 2506.10943, section 3), and has the command with its settings.

Each round writes to OUT/round-K/: sampled.jsonl and scored.jsonl (progress), candidates.jsonl (one
record per self-edit: parts, notes, credits, scores, what is kept and why), policy/ (a PEFT
adapter); a second agent's are sampled-2.jsonl and policy-2/. OUT/metrics.jsonl gets one line per
round (docs/OUTPUT.md defines them). Kill it at any time: the same command goes on where it was, and
ends with the same result. It skips finished rounds and, of the one it was in, batches that are
sampled and populations that are scored; credit, selection and the outer update are made again.
"""

import time
from dataclasses import replace

import arc
import data.arc
import data.qa
import inner
import reward
import selfedit
from inner import SFTConfig, inner_update, learner, lora_config, update_one
from lm.adapters import load_adapter, save_adapter
from lm.files import GOES_ON, chunks, run_main, sub_seed, write_jsonl
from lm.flags import Parser, add_model_flags, at_least, load, load_student, refuse_unused
from lm.outer import by_gradient
from lm.runs import Rounds, open_run
from lora import PROJECTIONS, Adapters, LoRAConfig, merged
from reward import select
from selfedit import STYLES, policy_example, settle

# -----------------------------------------------------------------------------
# settings

ABOUT = {
    "qa": "SEAL on passages: a self-edit is notes on a passage. (train_outer.py -h: the loop.)",
    "arc": "SEAL on ARC: a self-edit says how to train on a puzzle. (train_outer.py -h: the loop.)",
}
EXCHANGE = {
    "all": "the best of all, whoever wrote it",
    "own": "the best of its own",
    "special": "those of the best of all that it wrote itself",
}
OUTER = {
    "restem": "what is imitated, 1 (the paper)",
    "weighted": "what is imitated, as much as it earned",
    "grpo": "every sample, by how far it is from the mean of its prompt's (lm/outer.py)",
    "pairs": "of each prompt the best sample against the worst",
}
RULES = {
    "parts": "the best of each part",
    "best": "each context's best",
    "improving": "all that do better than without (the paper)",
    "notes": "the best notes about each sentence, whoever wrote them",
}


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    domains = parser.add_subparsers(dest="domain", required=True, metavar="qa|arc")
    sub = {}
    for name, text in ABOUT.items():
        sub[name] = p = domains.add_parser(name, help=text, description=text)
        add_model_flags(p, alone=False)
        (data.qa if name == "qa" else data.arc).add_flags(p, "train")
        selfedit.add_flags(p)
        inner.add_lora_flags(p)
    selfedit.add_style_flag(sub["qa"])
    selfedit.add_settings_flags(sub["qa"])
    inner.add_sft_flags(sub["qa"])
    arc.add_flags(sub["arc"])
    add_loop_flags(sub["qa"], "runs/qa", ["accuracy", "logprob", "proxy"], list(RULES))
    about = "--select notes: most notes imitated about each sentence"
    sub["qa"].add_argument("--keep", type=at_least(1), default=6, help=about)
    add_loop_flags(sub["arc"], "runs/arc", ["accuracy", "logprob"], ["improving", "best"])
    sub["arc"].set_defaults(**arc.DEFAULTS, outer_row_len=0, outer_batch=2, keep=0)
    args = parser.parse_args(argv)
    if args.domain == "qa":
        settle(args)
    refuse_contradictions(sub[args.domain], args)
    return args


def add_loop_flags(parser, out: str, rewards: list[str], rules: list[str]) -> None:
    add = parser.add_argument_group("outer loop").add_argument
    add("--out", default=out, help="run folder")
    add("--rounds", type=at_least(1), default=2, help="outer rounds")
    inner.add_learner_flag(parser)
    add("--samples", type=at_least(1), default=4, help="self-edits per context, M; the paper: 5")
    about = "policies, each of which writes M self-edits; the paper: 1"
    add("--agents", type=at_least(1), default=1, help=about)
    about = "what each of --agents imitates. " + "; ".join(f"{k}: {v}" for k, v in EXCHANGE.items())
    add("--exchange", default="all", choices=EXCHANGE, help=about)
    about = "score of the quiz" + "; proxy: without any study, see reward.py" * ("proxy" in rewards)
    add("--reward", default=rewards[0], choices=rewards, help=about)
    about = "what is imitated. " + "; ".join(f"{rule}: {RULES[rule]}" for rule in rules)
    add("--select", default=rules[0], choices=rules, help=about)
    add = parser.add_argument_group("outer update (policy adapter on all layers)").add_argument
    about = "what counts, and how much. " + "; ".join(f"{k}: {v}" for k, v in OUTER.items())
    add("--outer", default="restem", choices=OUTER, help=about)
    add("--outer-rank", type=at_least(1), default=64, help="LoRA rank")
    add("--outer-alpha", type=at_least(0.0), default=128.0, help="LoRA alpha")
    add("--outer-lr", type=at_least(0.0), default=5e-4, help="peak learning rate; the paper: 3e-4")
    add("--outer-epochs", type=at_least(1), default=2, help="passes over what is imitated")
    about = "tokens per packed row; 0: a row per self-edit or part"
    add("--outer-row-len", type=at_least(0), default=1024, help=about)
    add("--outer-batch", type=at_least(1), default=1, help="rows a step; the paper: 10 self-edits")


def refuse_contradictions(parser, args) -> None:
    if args.agents == 1:
        refuse_unused(parser, args, ["exchange"], "with one of --agents")
    elif args.learner == "policy":
        parser.error("--learner policy: which of the --agents?")
    elif args.select == "notes" and args.exchange == "special":
        parser.error("--exchange special: notes that are pooled have no one agent (--select notes)")
    writers = 1 if args.exchange == "own" else args.agents
    if args.select == "parts" and args.samples * writers < 2:
        parser.error("--select parts compares self-edits: it needs --samples of at least 2")
    if args.outer in reward.GRADIENTS:
        what = f"with --outer {args.outer}, which learns from all that has a credit"
        refuse_unused(parser, args, ["select", "keep"], what)
        if args.samples < 2:
            parser.error(f"--outer {args.outer} compares self-edits: --samples of at least 2")
        if args.outer == "pairs":
            refuse_unused(parser, args, ["outer_row_len"], "with --outer pairs: a row is a pair")
        if args.agents > 1 or args.reward == "logprob":
            told = "the policy that wrote it all, and credits that begin at 0"
            parser.error(f"--outer {args.outer} needs {told}: no --agents, no --reward logprob")
    if args.outer == "weighted" and args.reward != "accuracy":
        told = "what is earned is the weight, and must not be negative"
        parser.error(f"--outer weighted needs --reward accuracy: {told}")
    if args.domain == "arc":
        data.arc.refuse_other_source(parser, args)
        if args.reward == "logprob" and args.select == "improving":
            told = "nothing says what doing nothing earns"
            parser.error(f"--reward logprob needs --select best: {told}")
        return
    if args.reward == "proxy":
        refuse_unused(parser, args, ["student"], "with --reward proxy, which studies nothing")
    if args.reward == "proxy" and (args.select == "improving" or not STYLES[args.style].quotes):
        parser.error("--reward proxy is for --style questions, and not for --select improving")
    if args.select == "notes" and args.reward != "proxy":
        parser.error("--select notes needs --reward proxy, which judges single notes")
    if args.settings and args.reward == "proxy":
        parser.error("--settings needs a study of each self-edit: no --reward proxy")
    if args.settings and args.style != "questions":
        parser.error("--settings asks for notes in all styles: leave out --style")
    if not args.settings:
        refuse_unused(parser, args, ["budget"], "without --settings")
    elif args.select != "improving":  # which studies the passages alone
        refuse_unused(parser, args, ["lr", "steps", "epochs"], "with --settings")
    if args.select != "notes":
        refuse_unused(parser, args, ["keep"], f"with --select {args.select}")


# -----------------------------------------------------------------------------
# the loop

DOMAINS = {"qa": reward.Passages, "arc": arc.Puzzles}


def reinforce(model, tok, pairs: list[tuple], policy: Adapters, args, seed: int, label: str):
    """theta <- SFT(theta, pairs), each a prompt, a reply and its weight: trains the policy in
    place. Returns the last loss, None without pairs. Exits with one line if it diverges."""
    if not pairs:
        return None
    examples = [policy_example(tok, *pair) for pair in pairs]
    how = (outer_config(args), seed, label)
    if args.outer in reward.GRADIENTS:
        outcome = by_gradient(model, policy, examples, args.outer, *how)
    else:
        outcome = update_one(model, policy, examples, *how)
    if outcome.diverged:
        where = f"error: the outer update diverged, after {outcome.steps} steps"
        raise SystemExit(f"{where}; try a lower --outer-lr than {args.outer_lr}")
    return outcome.loss


def outer_config(args) -> SFTConfig:
    options = {"row_len": args.outer_row_len, "batch": args.outer_batch}
    return SFTConfig(lr=args.outer_lr, epochs=args.outer_epochs, **options)


def first_policy(model, args, agent: int) -> Adapters:
    """The adapter that makes theta of the base model: on all projections of all layers."""
    rank, alpha, n_layer = args.outer_rank, args.outer_alpha, model.config.n_layer
    config = LoRAConfig(rank, alpha, tuple(PROJECTIONS), 0, n_layer)
    return Adapters.init(model, config, 1, sub_seed(args.seed, 0, agent))


def main() -> None:
    args = parse_arguments()
    model, tok = load(args)
    student, its_tok = load_student(args, model, tok)
    lora = lora_config(args, student)  # complains now rather than after sampling
    domain = DOMAINS[args.domain](args, model, tok, student, its_tok)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "rounds")}
    rounds = Rounds(open_run(args.out, settings | domain.pinned, model, student), args.rounds)
    tags = ["", *(f"-{n}" for n in range(2, args.agents + 1))]  # of the agents' files
    policies = [first_policy(model, args, a) for a in range(args.agents)]
    if rounds.done:
        last = rounds.folder(rounds.done)
        policies = [load_adapter(model, last / f"policy{tag}") for tag in tags]

    for k, folder in rounds.remaining():
        start, name = time.perf_counter(), folder.name

        # sample: SE_1 .. SE_M ~ LM_theta( . | C)
        edits = []
        for a, (tag, policy) in enumerate(zip(tags, policies), 1):
            seed, log = sub_seed(args.seed, k, 0, a - 1), folder / f"sampled{tag}.jsonl"
            with merged(model, policy):
                written = domain.sample(model, k, seed, log, f"{name} sample{tag}")
            edits += [replace(e, agent=a) for e in written]
        own = chunks(edits, len(edits) // args.agents)  # each agent's

        # study: theta_i = SFT(theta_0, SE_i), a population at a time; then the quiz, without C
        seed, log = domain.seed(k), domain.log(folder / "scored.jsonl")
        candidates = domain.candidates(edits, seed)
        with learner(student, policies[0], args):
            for group in log.remaining(domain.populations(candidates, log), f"{name} study"):
                adapters = Adapters.init(student, lora, len(group), seed)
                examples, configs = [c.examples for c in group], [c.config for c in group]
                outcomes = inner_update(student, adapters, examples, configs, seed, log.tick)
                log.add(group, domain.quiz(student, its_tok, group, adapters, outcomes))

        # credit: r_i, of the whole and of each part; select: what is imitated
        alone, how = domain.credit(edits, candidates, log), (args.select, args.keep, args.outer)
        for group in own if args.exchange == "own" else [edits]:
            select(group, alone, *how)
        write_jsonl(folder / "candidates.jsonl", [e.record() for e in edits])

        # reinforce: theta <- SFT(theta, {(C, SE_i): kept}), ReST-EM
        losses = []
        for a, (tag, policy) in enumerate(zip(tags, policies)):
            shown = edits if args.exchange == "all" else own[a]
            pairs = reward.to_imitate(domain.prompts, shown, *how)
            seed, label = sub_seed(args.seed, k, 2, a), f"{name} reinforce{tag}"
            losses.append(reinforce(model, tok, pairs, policy, args, seed, label))
            save_adapter(policy, folder / f"policy{tag}", args.model)
        seconds = time.perf_counter() - start
        rounds.finish(reward.round_metrics(k, own, losses, args.reward, seconds))


if __name__ == "__main__":
    run_main(main, GOES_ON, alone=False)
