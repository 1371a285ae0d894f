"""Make a trained policy small enough to come with the code: its adapter in bfloat16, how it was
trained, and a fingerprint of the base model that it belongs to.

    python experiments/ship.py --run runs/seal      # -> policies/smollm2-135m-instruct/

Of the run's last round, or --round K; at most 6 MB, which train_outer.py --outer-rank 8 makes of
the 135M model. What the rounding costs is measured on some of what that round was taught to
imitate: "logprob" is its mean log-likelihood per token for the untrained model, the policy as the
run has it, and the policy as it is written.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np
import torch

from data.qa import load_passages
from lm.adapters import base_of, load_adapter, save_adapter
from lm.files import check_output, chunks, digest, run_main, write_json
from lm.flags import Parser, add_model_flags, at_least, load, result_head
from lm.runs import POLICY, Rounds, read_settings
from lora import merged
from quiz import answer_logprobs
from reward import to_imitate
from sampler import prefill
from selfedit import note_prompts, policy_example, read_edits

LARGEST = 6_000_000  # bytes
SCORED = 24  # texts by which the rounding is judged: each is read with all of its prompt
NEEDED = "model data data_sha256 split skip limit style shots select keep".split()


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("policy").add_argument
    add("--run", required=True, help="folder of a train_outer.py qa run")
    add("--round", type=at_least(0), default=0, help="whose policy; 0: the last")
    add("--out", default="policies/smollm2-135m-instruct", help="folder to write")
    return parser.parse_args()


def round_of(run: str, wanted: int) -> Path:
    """The folder of the wanted round, or of the last one. Exits with one line if it is not
    finished."""
    rounds = Rounds(run, 0)
    if not 0 < (k := wanted or rounds.done) <= rounds.done:
        raise SystemExit(f"error: --run {run}: round {k} is not finished, of {rounds.done}")
    return rounds.folder(k)


def logprob(model, tok, pairs: list[tuple]) -> float:
    """Mean log-likelihood per token of replies to their prompts."""
    found = []
    for group in chunks(sorted(pairs), 8):
        prompts, replies = [], []
        for prompt, *reply in group:
            prompts.append(prompt)
            replies.append(list(policy_example(tok, prompt, *reply).ids[len(prompt) :]))
        with torch.inference_mode():
            batch, x = prefill(model, prompts, [0] * len(group), max(map(len, replies)))
            means = answer_logprobs(replies, batch, x)
        found += [(mean * len(reply), len(reply)) for mean, reply in zip(means, replies)]
    total, tokens = np.sum(found, axis=0)
    return float(total / tokens)


def imitated(tok, before: dict, folder: Path) -> list[tuple]:
    """What a round was taught to imitate. Exits with one line if its data has changed since, or if
    there is nothing."""
    if digest(before["data"]) != before["data_sha256"]:
        raise SystemExit(f"error: {before['data']} has changed since the run was trained on it")
    passages = load_passages(before["data"], before["split"], before["skip"], before["limit"])
    prompts = note_prompts(tok, passages, argparse.Namespace(**before))
    edits = read_edits(folder / "candidates.jsonl")
    if before.get("exchange", "all") != "all":  # folder/policy is the first agent's
        edits = [e for e in edits if e.agent == 1]
    how = (before["select"], before["keep"], before.get("outer", "restem"))
    pairs = [pair for pair in to_imitate(prompts, edits, *how) if pair[2] > 0]
    if not pairs:
        raise SystemExit(f"error: {folder}: nothing was imitated in this round")
    return pairs


def main() -> None:
    args = parse_arguments()
    check_output(args.out, folder=True)
    before = read_settings(args.run, *NEEDED)
    if before["domain"] != "qa":
        raise SystemExit(f"error: {args.run} was trained with train_outer.py {before['domain']}")
    if before["model"] != args.model:
        raise SystemExit(f"error: {args.run} was trained with --model {before['model']}")
    folder = round_of(args.run, args.round)
    model, tok = load(args)
    policy = load_adapter(model, folder / "policy")
    size = 2 * policy.size
    if size > LARGEST:
        raise SystemExit(
            f"error: {folder} has rank {policy.config.rank}, {size / 1e6:.1f} MB in bfloat16, of "
            f"at most {LARGEST / 1e6:.0f}; train it with a smaller --outer-rank"
        )
    pairs, rounded = imitated(tok, before, folder), policy.pick([0])
    pairs = pairs[:: max(1, len(pairs) // SCORED)][:SCORED]
    rounded.flat = policy.flat.bfloat16().float()
    scores = {"untrained": logprob(model, tok, pairs)}
    for name, adapter in (("float32", policy), ("bfloat16", rounded)):
        with merged(model, adapter):
            scores[name] = logprob(model, tok, pairs)
    about = {"base": base_of(model), "round": folder.name, "bytes": size, "n": len(pairs)}
    about |= {"logprob": scores, "settings": before}
    write_json(Path(args.out) / POLICY, result_head(args, model) | about)
    save_adapter(policy, args.out, args.model, dtype=torch.bfloat16)
    print(f"{args.out}: {size / 1e6:.1f} MB, logprob {scores}")


if __name__ == "__main__":
    run_main(main)
