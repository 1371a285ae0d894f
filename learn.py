"""Learn a text of your own, then ask about it: the inner update and the quiz, without the outer
loop.

    python learn.py study ambrel.txt --title "Port Ambrel" --out runs/ambrel
    python learn.py ask "Who founded Port Ambrel?" --adapter runs/ambrel

`study` lets the model write self-edits about the text, trains a LoRA on the text and its notes, and
saves it as a PEFT adapter, with the title in study.json. `ask` answers under that adapter; the text
is not in the prompt. With --policy (a round-K/policy folder of a train_outer.py run) that policy
writes the notes; with --learner policy it also studies them, and `ask` loads it below the adapter.
"""

from pathlib import Path

import inner
import reward
from data.qa import Passage
from inner import inner_update, learner, lora_config, sft_config
from lm.adapters import load_adapter, save_adapter
from lm.checkpoint import save_model
from lm.files import read_json, sub_seed, write_json
from lm.flags import Parser, at_least, load
from lm.tokenizer import Tokenizer
from lora import Adapters, merge, merged
from quiz import ANSWER_LEN, quiz_prompt
from reward import passage_examples
from sampler import generate
from selfedit import write_self_edits


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    add = parser.add_argument_group("learn.py").add_argument
    add("action", choices=["study", "ask"], help="what to do")
    add("text", help="study: a text file; ask: the question")
    add("--title", default="Notes", help="study: what the text is about, in a few words")
    about = "study: self-edits to sample; their notes are pooled"
    add("--samples", type=at_least(1), default=2, help=about)
    add("--policy", help="study: adapter folder of a trained policy")
    inner.add_learner_flag(parser)
    add("--out", default="runs/learned", help="study: folder for the adapter")
    about = "study: also write the updated model, whole, to this new folder"
    add("--merged", help=about)
    add("--adapter", default="runs/learned", help="ask: folder of the adapter")
    parser.set_defaults(steps=0)  # a text can be longer, and its notes more, than a passage's
    return parser.parse_args()


def study(model, tok: Tokenizer, args) -> None:
    """Sample notes, train on them and the text, save the adapter."""
    try:
        text = Path(args.text).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(
            f"error: cannot read {args.text}: {getattr(e, 'strerror', None) or e}"
        ) from e
    if not text:
        raise SystemExit(f"error: {args.text} is empty")
    if args.merged and Path(args.merged).exists():
        raise SystemExit(f"error: --merged {args.merged} exists already; choose another folder")
    policy = load_adapter(model, args.policy) if args.policy else None
    passage = Passage("text", args.title, text, ())
    with merged(model, policy):
        edits = write_self_edits(model, tok, [passage], args.samples, args, sub_seed(args.seed, 0))
    notes = list(dict.fromkeys(note for e in edits for note in e.notes))
    print("\n".join(["", f"{len(notes)} notes:", *notes, ""]))
    seed, config = sub_seed(args.seed, 1), sft_config(args)
    adapters = Adapters.init(model, lora_config(args, model), 1, seed)
    examples = passage_examples(tok, args.title, [text, *notes])
    with learner(model, policy, args):
        [outcome] = inner_update(model, adapters, [examples], [config], seed)
        if outcome.diverged:
            raise SystemExit(
                f"error: training diverged at step {outcome.steps}; try a lower --lr than {args.lr}"
            )
        save_adapter(adapters, args.out, args.model)
        studied_on = args.policy if args.learner == "policy" else None
        write_json(Path(args.out) / "study.json", {"title": args.title, "policy": studied_on})
        print(f"{outcome.steps} steps, last loss {outcome.loss:.3f}; adapter written to {args.out}")
        if args.merged:
            merge(model, adapters)
            save_model(model, args.merged, args.model)
            print(f"whole model written to {args.merged}")


def ask(model, tok: Tokenizer, args) -> None:
    """Answer a question under the adapter, on top of the policy if it was trained on one."""
    studied = read_json(Path(args.adapter) / "study.json")
    if studied.get("policy"):
        merge(model, load_adapter(model, studied["policy"]))
    prompt, ends = (
        quiz_prompt(tok, studied.get("title", ""), args.text),
        {*tok.end_ids, *tok.newline_ids},
    )
    [ids] = generate(model, [prompt], ANSWER_LEN, ends, adapters=load_adapter(model, args.adapter))
    print(tok.decode([t for t in ids if t not in tok.end_ids]).strip())


def main() -> None:
    args = parse_arguments()
    model, tok = load(args)
    study(model, tok, args) if args.action == "study" else ask(model, tok, args)


if __name__ == "__main__":
    main()
