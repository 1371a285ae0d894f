"""A control for RL: a policy that is shown what the quizzes ask, without a sample or a reward.

    python experiments/shown.py --limit 24                          # -> runs/shown/
    python eval_qa.py --policy runs/shown --lr 0.008 --samples 2 --limit 24 \
        --out results/qa_shown.json

The quiz's questions about a sentence of a training passage are the reply to the prompt that asks
for questions on that sentence, and the policy imitates these as in the outer update. RL sees the
same quizzes by what they reward alone. The ladder's row seal-1 is then what this policy writes on
held-out passages, beside the untrained notes in passage+self-edit. A sentence that nothing is asked
about is left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import data.qa
from data.qa import load_passages
from data.text import sentences
from inner import SFTConfig, update_one
from lm.adapters import base_of, save_adapter
from lm.files import check_output, digest, run_main, sub_seed, write_json
from lm.flags import Parser, add_model_flags, at_least, load, result_head
from lm.runs import POLICY
from lora import PROJECTIONS, Adapters, LoRAConfig
from reward import sentence_about
from selfedit import edit_prompts, policy_example

STYLE = "questions"


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    data.qa.add_flags(parser, "train")
    add = parser.add_argument_group("policy").add_argument
    add("--rank", type=at_least(1), default=8, help="LoRA rank, on all layers")
    add("--alpha", type=at_least(0.0), default=16.0, help="LoRA alpha")
    add("--lr", type=at_least(0.0), default=5e-4, help="peak learning rate")
    add("--epochs", type=at_least(1), default=2, help="passes over what is shown")
    add("--row-len", type=at_least(0), default=1024, help="tokens per packed row")
    add("--out", default="runs/shown", help="adapter folder to write")
    return parser.parse_args()


def shown(tok, passage) -> list[tuple]:
    """(prompt, reply) for each sentence that the quiz asks about."""
    texts, pairs = sentences(passage.text), []
    asked = [sentence_about(q, texts) for q in passage.questions]
    for k, prompt in enumerate(edit_prompts(tok, STYLE, passage.title, passage.text)):
        about = [q.question for q, of in zip(passage.questions, asked) if of == k]
        if about:
            pairs.append((prompt, "\n".join(about)))
    return pairs


def main() -> None:
    args = parse_arguments()
    check_output(args.out, folder=True)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    everywhere = LoRAConfig(args.rank, args.alpha, tuple(PROJECTIONS), 0, model.config.n_layer)
    policy = Adapters.init(model, everywhere, 1, sub_seed(args.seed, 0))
    examples = [policy_example(tok, *pair) for p in passages for pair in shown(tok, p)]
    if not examples:
        raise SystemExit(f"error: {args.data}: no question is about a sentence of its passage")
    config = SFTConfig(lr=args.lr, epochs=args.epochs, row_len=args.row_len)
    outcome = update_one(model, policy, examples, config, sub_seed(args.seed, 1), "shown")
    if outcome.diverged:
        told = f"error: training diverged at step {outcome.steps}; try a lower --lr than {args.lr}"
        raise SystemExit(told)
    settings = vars(args) | {"domain": "qa", "style": STYLE, "shots": 1, "learner": "base"}
    about = {"base": base_of(model), "n": len(examples), "loss": outcome.loss}
    about["settings"] = settings | {"reward": "shown", "data_sha256": digest(args.data)}
    write_json(Path(args.out) / POLICY, result_head(args, model) | about)
    save_adapter(policy, args.out, args.model)
    print(f"{args.out}: shown {len(examples)} sentences, loss {outcome.loss:.3f}")


if __name__ == "__main__":
    run_main(main)
