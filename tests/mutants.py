"""Do the tests notice when the code is wrong?

    python tests/mutants.py                 # -> results/mutants.json

Each of MUTANTS is a small fault that somebody could have made: a sign, an index one off, a check
left out. In a copy of the repository, one at a time, it is put into the source, and the tests that
are named beside it must fail. All these tests must pass on the source as it is, or their failing
would say nothing: that is tried first. What was found is kept under --work, and is tried again when
a fault, its source or the file of its tests has changed. Some tests need what `make model` and
`python data/prepare.py vocab` fetch.

"tried" and "held" count faults; "failures" are those that no test noticed, or for which no test
ran, and tests that fail without a fault (with "before" and "after" empty).
"""

import ast
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

from lm.files import (
    GOES_ON,
    check_output,
    digest,
    fingerprint,
    read_jsonl,
    run_main,
    write_json,
    write_jsonl,
)
from lm.flags import Parser, at_least, command_line
from lm.log import Progress

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for a fault's tests; if they take longer, it is noticed
PYTEST = ["-m", "pytest", "-n", "0", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
OUTCOMES = {0: "survived", 1: "noticed"}  # by pytest's return code; with any other no test ran
LINKS = (".venv", "checkpoints", "downloads")  # what git ignores and the tests need


@dataclass(frozen=True)
class Mutant:
    """A fault: `before`, which stands once in `file`, becomes `after`. `tests` are a test file, and
    words by which its tests are chosen: "tests/test_reward.py -k imitated"."""

    file: str
    before: str
    after: str
    tests: str

    @property
    def test_file(self) -> str:
        return self.tests.partition(" -k ")[0]

    @property
    def words(self) -> str:
        return self.tests.partition(" -k ")[2]


# fmt: off
MUTANTS = [
    Mutant("model.py", ".tril(S - T)", ".tril()", "tests/test_model.py -k masks"),
    Mutant("model.py", "masked_fill_(~mask,", "masked_fill_(mask,", "tests/test_model.py -k masks"),
    Mutant("model.py", "torch.cat((-sin, sin), dim=-1)", "torch.cat((sin, -sin), dim=-1)",
        "tests/test_model.py -k same_logits and not smollm2"),
    Mutant("model.py", 'freq / s["factor"]', 'freq * s["factor"]',
        "tests/test_model.py -k same_logits and not smollm2"),
    Mutant("model.py", "(q @ k.mT * D**-0.5)", "(q @ k.mT)",
        "tests/test_model.py -k same_logits and not smollm2"),
    Mutant("model.py", "h.square().mean(-1, keepdim=True)", "h.square().sum(-1, keepdim=True)",
        "tests/test_model.py -k same_logits and not smollm2"),
    Mutant("model.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)",
        "F.silu(self.up_proj(x)) * self.gate_proj(x)",
        "tests/test_model.py -k same_logits and not smollm2"),
    Mutant("model.py", "self.k_norm(self.k_proj(x)", "self.q_norm(self.k_proj(x)",
        "tests/test_model.py -k same_logits and not smollm2"),
    Mutant("model.py", "past = cache[0].length if cache else 0", "past = 0",
        "tests/test_model.py -k cached_and_uncached"),
    Mutant("model.py", "torch.cat((self.v, v), dim=1)", "torch.cat((v, self.v), dim=1)",
        "tests/test_model.py -k cached_and_uncached"),
    Mutant("model.py", "attend[i] if isinstance", "attend[0] if isinstance",
        "tests/test_model.py -k any_range"),
    Mutant("model.py", "enumerate(self.layers[start:stop], start)",
        "enumerate(self.layers[start:stop])", "tests/test_model.py -k any_range"),
    Mutant("lora.py", "return self.alpha / self.rank", "return self.alpha / self.rank**0.5",
        "tests/test_lora.py -k peft_loads"),
    Mutant("lora.py", "a.uniform_(-1, 1,", "a.uniform_(0, 1,",
        "tests/test_lora.py -k drawn_as_in_peft"),
    Mutant("lora.py", "(offset, a, offset + math.prod(a), b)", "(offset, a, offset, b)",
        "tests/test_lora.py -k fresh_adapters_change_nothing"),
    Mutant("lora.py", "self.ragged.join(low * self.scale @ self.b.mT)",
        "self.ragged.join(low @ self.b.mT)", "tests/test_inner.py -k population_update"),
    Mutant("lora.py", ", alpha=self.scale)", ")", "tests/test_lora.py -k peft_loads"),
    Mutant("lora.py", "set_submodule(path, module.base)", "set_submodule(path, module)",
        "tests/test_lora.py -k detaching_restores"),
    Mutant("lora.py", "+ adapters.config.scale * (b @ a)", "+ (b @ a)",
        "tests/test_lora.py -k merging"),
    Mutant("lora.py", "if any(isinstance(m, LoRALinear)", "if all(isinstance(m, LoRALinear)",
        "tests/test_lora.py -k attaching_twice"),
    Mutant("lora.py", " or config.rank < 1:", ":", "tests/test_lora.py -k bad_settings"),
    Mutant("inner.py", "/ counted[owner]", "/ counted.sum()",
        "tests/test_inner.py -k population_update"),
    Mutant("inner.py", "row.at + n for row, n", "row.at for row, n",
        "tests/test_inner.py -k population_update"),
    Mutant("inner.py", "default_rng([seed, epoch])", "default_rng([seed])",
        "tests/test_inner.py -k plans"),
    Mutant("inner.py", "left = 1 - step / total", "left = 1 - (step + 1) / total",
        "tests/test_inner.py -k plans"),
    Mutant("inner.py", "math.ceil(n_rows / self.batch)", "(n_rows // self.batch)",
        "tests/test_inner.py -k plans"),
    Mutant("inner.py", "-s[:, 1:].to(p.dtype)", "s[:, 1:].to(p.dtype)",
        "tests/test_inner.py -k against_a_teacher"),
    Mutant("inner.py", "grad *= weight[:, None].to(x.dtype)", "grad *= weight.mean().to(x.dtype)",
        "tests/test_inner.py -k loss_in_chunks"),
    Mutant("inner.py", "configs[i].lr_at(outcomes[i].steps, len(plans[i]))",
        "configs[i].lr_at(0, len(plans[i]))", "tests/test_inner.py -k same_training_as_peft"),
    Mutant("inner.py", "(clips / (norms + 1e-6)).clamp(max=1)",
        "(clips / (norms + 1e-6)).clamp(min=1)", "tests/test_grid.py -k same_is_learnt"),
    Mutant("inner.py", "outcome.diverged |= ruined or not finite", "outcome.diverged |= not finite",
        "tests/test_inner.py -k forgot_everything"),
    Mutant("inner.py", "outcomes[i].tokens += n_tokens(own)", "outcomes[i].tokens = n_tokens(own)",
        "tests/test_inner.py -k one_adapter"),
    Mutant("inner.py", "if longest > model.config.max_seq_len:",
        "if longest > model.config.max_seq_len + 1:",
        "tests/test_inner.py -k longer_than_the_context"),
    Mutant("lm/packing.py", "own[0] and sum(own) > SHORT", "sum(own) > SHORT",
        "tests/test_packing.py -k share_a_prefix"),
    Mutant("inner.py", "attend_to(rows, model), stop=stop)",
        "attend_to(rows, model), stop=stop - 1)", "tests/test_inner.py -k lower_layers_make"),
    Mutant("inner.py", "if sum(lengths.values()) > KEPT_STATES:", "if False:",
        "tests/test_inner.py -k too_many_tokens"),
    Mutant("sampler.py", "u[:, None] * total.gather(-1, last), right", "u[:, None], right",
        "tests/test_sampler.py -k nucleus"),
    Mutant("sampler.py", "sub_seed(seed, c, *prompt)", "sub_seed(seed, *prompt)",
        "tests/test_sampler.py -k seeded"),
    Mutant("sampler.py", "& self.valid[:, None, :]", "& torch.ones_like(self.valid)[:, None, :]",
        "tests/test_sampler.py -k batch_reads"),
    Mutant("sampler.py", "pos = self.valid.sum(1, keepdim=True) +",
        "pos = torch.full((len(lengths), 1), self.valid.size(1)) +",
        "tests/test_sampler.py -k batch_reads"),
    Mutant("sampler.py", "if len(kept) < len(self.counts):", "if False:",
        "tests/test_sampler.py -k batch_forks"),
    Mutant("sampler.py", "order = sorted(range(len(prompts)), key=lambda i: owner[i])",
        "order = list(range(len(prompts)))", "tests/test_sampler.py -k own_adapter"),
    Mutant("sampler.py", "if longest + room > limit:", "if longest > limit:",
        "tests/test_sampler.py -k without_room"),
    Mutant("sampler.py", "logits[:, model.unused] = -torch.inf", "pass",
        "tests/test_sampler.py -k never_sampled"),
    Mutant("selfedit.py", "        parts = parts[:-1]\n", "        parts = parts[:]\n",
        "tests/test_selfedit.py -k test_parsing"),
    Mutant("selfedit.py", "repeats = form.by_sentence and", "repeats =",
        "tests/test_selfedit.py -k test_parsing"),
    Mutant("selfedit.py", "name in note and name not in passage", "name in note",
        "tests/test_selfedit.py -k in_parts"),
    Mutant("selfedit.py", "not (shots and copies_example(n, passage))",
        "not copies_example(n, passage)", "tests/test_selfedit.py -k in_parts"),
    Mutant("selfedit.py", "80 if STYLES[style].by_sentence else 320",
        "320 if STYLES[style].by_sentence else 80", "tests/test_selfedit.py -k room_for"),
    Mutant("selfedit.py", "(0, len(words) - half, (len(words) - half) // 2)",
        "(0, half, half // 2)", "tests/test_selfedit.py -k clozes"),
    Mutant("selfedit.py", "edits = edits[:made]", "edits = list(edits)",
        "tests/test_selfedit.py -k not_sampled_again"),
    Mutant("selfedit.py", " and len(set(data)) == len(data)", "",
        "tests/test_settings.py -k what_is_a_flaw"),
    Mutant("selfedit.py", '1 <= value["epochs"] <= MAX_EPOCHS', 'value["epochs"] <= MAX_EPOCHS',
        "tests/test_settings.py -k what_is_a_flaw"),
    Mutant("selfedit.py", "set(value) != set(KEYS) or", "not set(KEYS) <= set(value) or",
        "tests/test_settings.py -k what_is_a_flaw"),
    Mutant("selfedit.py", "if len(value) < len(pairs):", "if False:",
        "tests/test_settings.py -k what_is_a_flaw"),
    Mutant("selfedit.py", 'part.style == "settings" or self.asks_for', "self.asks_for",
        "tests/test_settings.py -k only_what_is_studied"),
    Mutant("selfedit.py", "return min(args.max_new, usual_length(style))",
        "return max(args.max_new, usual_length(style))", "tests/test_settings.py -k own_length"),
    Mutant("quiz.py", 'f" {g} " in f" {a} "', "g in a", "tests/test_quiz.py -k test_scores"),
    Mutant("quiz.py", '" ".join(pair.groups()) if pair else note', "note",
        "tests/test_quiz.py -k word_question"),
    Mutant("quiz.py", '[QA_PAIR.fullmatch(note) for note in own]',
        '[QA_PAIR.search(note) for note in own]', "tests/test_quiz.py -k word_question"),
    Mutant("lm/template.py", "out, MADE[0] = Printed(), 0", "out = Printed()",
        "tests/test_tokenizer.py -k chat_equals or cannot_follow"),
    Mutant("lm/template.py", "if len(template) > LONGEST:", "if False:",
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/template.py", "except (SyntaxError, MemoryError):", "except SyntaxError:",
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/template.py", 'return bounded(function(', 'return (function(',
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("data/arc.py", "len(pairs) > MOST_PAIRS:", "len(pairs) > MOST_PAIRS + 1:",
        "tests/test_arc_data.py -k names_the_task"),
    Mutant("selfedit.py", "if settings and settings_flaw(settings):", "if False:",
        "tests/test_train_outer.py -k log_that_was_changed"),
    Mutant("lm/log.py", 'if type(r.get("diverged", False)) is not bool:', "if False:",
        "tests/test_train_outer.py -k log_that_was_changed"),
    Mutant("lm/template.py", "sum(len(part) for part in x", "sum(0 for part in x",
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/template.py", "float, NoneType)", "float)",
        "tests/test_tokenizer.py -k chat_equals"),
    Mutant("lm/template.py", "if value(condition, names | bound(loop.target, x))", "if True",
        "tests/test_tokenizer.py -k chat_equals"),
    Mutant("report.py", "said = said[:1000]", "said = said", "tests/test_report.py -k any_grid"),
    Mutant("lm/template.py", "if self.length > MOST:", "if False:",
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/template.py", "if len(items) > LOOPS:", "if False:",
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/files.py", '(b"{", b"[", b",")', '(b"{", b"[")', "tests/test_files.py -k gigabytes"),
    Mutant("lm/files.py", "if path.is_dir() and not path.is_symlink()", "if path.is_dir()",
        "tests/test_memory.py -k link_is_no_document"),
    Mutant("lm/memory.py", "if path.is_symlink():", "if False:",
        "tests/test_memory.py -k link_is_no_document"),
    Mutant("lm/memory.py", "if os.path.lexists(gone):", "if False:",
        "tests/test_memory.py -k cannot_be_removed"),
    Mutant("lm/log.py", "[r[name] for name in self.needed]", "pass",
        "tests/test_train_outer.py -k log_that_was_changed"),
    Mutant("lm/log.py", " and abs(x) < 1e30 for", " for",
        "tests/test_log.py -k another_shape"),
    Mutant("lm/ranks.py", "if WORLD > 1 or parts_of(path):", "if WORLD > 1:",
        "tests/test_ranks.py -k parts_of"),
    Mutant("lm/runs.py", "or abs(metrics[key]) > 1e9:", "or False:",
        "tests/test_runs.py -k no_numbers"),
    Mutant("selfedit.py", "not isinstance(record[f.name], kinds)", "False",
        "tests/test_train_outer.py -k log_that_was_changed"),
    Mutant("data/qa.py", "if len(text) > LONGEST_TEXT:", "if len(text) > LONGEST_TEXT + 1:",
        "tests/test_data.py -k malformed_file"),
    Mutant("data/text.py", "if len(name) <= 100 else", "if True else",
        "tests/test_text.py -k table_does_not_grow"),
    Mutant("learn.py", "memory.refuse_other_base(weights_of(model))\n        if args.action",
        "if args.action", "tests/test_learn.py -k study_ask"),
    Mutant("quiz.py", 'score_answer(passage.title, q.answers)["accuracy"] > 0',
        "any(a in passage.title for a in q.answers)", "tests/test_quiz.py -k whole_words"),
    Mutant("quiz.py", "return 2 * common /", "return common /",
        "tests/test_quiz.py -k test_scores"),
    Mutant("quiz.py", 'unicodedata.normalize("NFC", text).casefold()', "text.casefold()",
        "tests/test_quiz.py -k any_script"),
    Mutant("quiz.py", '"" if told and not show_passage else passage.title', "passage.title",
        "tests/test_quiz.py -k title_that_tells"),
    Mutant("quiz.py", 'passage.text if show_passage else ""', "passage.text",
        "tests/test_quiz.py -k only_when_told"),
    Mutant("quiz.py", "float(part.mean())", "float(part.sum())", "tests/test_quiz.py -k one_token"),
    Mutant("quiz.py", "        batch.take_back(longest)\n", "", "tests/test_quiz.py -k one_token"),
    Mutant("quiz.py", "ids[:max_new] if t not in", "ids if t not in",
        "tests/test_quiz.py -k plain_forward and logprobs"),
    Mutant("quiz.py", "next(right[True]) > next(right[False])",
        "next(right[True]) >= next(right[False])", "tests/test_quiz.py -k tell_what_is_learnt"),
    Mutant("quiz.py", "q.casefold() not in trained and ", "",
        "tests/test_quiz.py -k tell_what_is_learnt"),
    Mutant("experiments/stream.py", "math.exp(total / tokens)", "math.exp(total / len(texts))",
        "tests/test_stream.py -k perplexity"),
    Mutant("quiz.py", "np.mean([s[name] for s in scores])", "np.sum([s[name] for s in scores])",
        "tests/test_reward.py -k what_the_quiz_says"),
    Mutant("reward.py", "part.target, part.credit / mean)", "part.target, 1.0)",
        "tests/test_reward.py -k kept_is_imitated"),
    Mutant("reward.py", "earned = [(prompt, part) for prompt, part in pairs if part.credit]",
        "earned = pairs", "tests/test_reward.py -k kept_is_imitated"),
    Mutant("reward.py", "top > mean + 1e-9", "top >= mean", "tests/test_reward.py -k selection"),
    Mutant("reward.py", "e.reward > alone.get(passage, math.inf)",
        "e.reward >= alone.get(passage, math.inf)", "tests/test_reward.py -k selection"),
    Mutant("reward.py", ' and c > NOTHING["logprob"]]', "]",
        "tests/test_settings.py -k no_measure"),
    Mutant("reward.py", "return max(told, key=", "return min(told, key=",
        "tests/test_reward.py -k question_credits"),
    Mutant("reward.py", "float(np.mean(v)) if v else None for v",
        "float(np.sum(v)) if v else None for v", "tests/test_reward.py -k question_credits"),
    Mutant("reward.py", "if told == [0.0, 1.0]:", "if told[1] == 1.0:",
        "tests/test_reward.py -k questions_of_the_notes"),
    Mutant("reward.py", "goal = words(question.question) - given",
        "goal = words(question.question)", "tests/test_reward.py -k questions_of_the_notes"),
    Mutant("reward.py", "reverse=True)[:keep]", "reverse=True)",
        "tests/test_reward.py -k ask_most_closely"),
    Mutant("reward.py", "if e.parts[k].target:", "if e.parts[k].text:",
        "tests/test_reward.py -k ask_most_closely"),
    Mutant("reward.py", 'min(how["epochs"], args.budget // max(1, tokens))', 'how["epochs"]',
        "tests/test_settings.py -k beyond_the_budget"),
    Mutant("reward.py", 'if how["loss"] == "all":', 'if how["loss"] != "all":',
        "tests/test_settings.py -k loss_counts"),
    Mutant("reward.py", '{piece}"), tok.end_ids[0]]', '{piece}")]',
        "tests/test_reward.py -k training_sequences"),
    Mutant("reward.py", "title or passage.title, list(notes)", "passage.title, list(notes)",
        "tests/test_reward.py -k training_sequences"),
    Mutant("reward.py", "(c.tokens * c.config.epochs, c.name)", "(c.tokens, c.name)",
        "tests/test_reward.py -k like_work"),
    Mutant("reward.py", "first = math.ceil(len(rest) / left)", "first = size",
        "tests/test_reward.py -k groups_are_even"),
    Mutant("reward.py", "answers = [a | NOTHING for a in answers]", "answers = list(answers)",
        "tests/test_reward.py -k diverged_candidate"),
    Mutant("reward.py", "part.credit = value if e.uses(part) else None", "part.credit = value",
        "tests/test_settings.py -k only_what_is_studied"),
    Mutant("reward.py", "steps=config.steps * len(teachers)", "steps=config.steps",
        "tests/test_distill.py -k many_adapters"),
    Mutant("reward.py", "return notes[1:] + notes[:1],", "return notes[-1:] + notes[:-1],",
        "tests/test_reward.py -k something_else"),
    Mutant("data/qa.py", '[] if args.split == "train" else trained_as', "trained_as",
        "tests/test_eval_qa.py -k do_not_fit"),
    Mutant("reward.py", "torch.cat([rest, share * shares], dim=1)",
        "torch.cat([rest, shares], dim=1)", "tests/test_distill.py -k half_of_what"),
    Mutant("reward.py", "if counts][-len(ids) :]", "if counts][: len(ids)]",
        "tests/test_distill.py -k half_of_what"),
    Mutant("experiments/distill.py", "QA_PAIR.fullmatch(note)[1], passage.text)",
        "QA_PAIR.fullmatch(note)[1])", "tests/test_distill.py -k sees_the_passage"),
    Mutant("arc.py", "(every_token, every_token or n > 0)", "(every_token, every_token or n >= 0)",
        "tests/test_arc.py -k training_sequences"),
    Mutant("arc.py", "if max(len(rows), len(rows[0])) > LARGEST:",
        "if max(len(rows), len(rows[0])) > LARGEST + 1:", "tests/test_arc.py -k no_grid"),
    Mutant("arc.py", "room = 2 + 2 * max(", "room = 2 + max(", "tests/test_arc.py -k answer_room"),
    Mutant("arc.py", 'r["solved"] = min(r["solved"])', 'r["solved"] = max(r["solved"])',
        "tests/test_arc.py -k predictions_are_scored"),
    Mutant("arc.py", "adapters.pick([n]), views", "adapters.pick([0]), views",
        "tests/test_arc.py -k own_adapter"),
    Mutant("arc.py", "float(all(right))", "float(any(right))", "tests/test_arc.py -k own_adapter"),
    Mutant("arc.py", "or len(groups[-1]) >= size", "or len(groups[-1]) > size",
        "tests/test_arc.py -k train_apart"),
    Mutant("arc.py", "if c.config.total_steps(len(c.examples)) > MAX_STEPS",
        "if c.config.epochs > MAX_STEPS", "tests/test_arc.py -k too_many_steps"),
    Mutant("arc.py", "if not (MIN_LR <= lr <= MAX_LR and", "if not (0 < lr <= MAX_LR and",
        "tests/test_arc.py -k bad_settings"),
    Mutant("arc.py", '[] if self.args.learner == "policy" else sorted(others)', "sorted(others)",
        "tests/test_arc.py -k what_is_known"),
    Mutant("arc.py", " and c.name not in log.known}", "}", "tests/test_arc.py -k what_is_known"),
    Mutant("reward.py", " and e.reward > nothing]", "]",
        "tests/test_settings.py -k round_with_settings"),
    Mutant("train_outer.py", "with merged(model, policy):", "with merged(model, None):",
        "tests/test_train_outer.py -k policy_is_in_the_weights"),
    Mutant("train_outer.py", "last = rounds.folder(rounds.done)", "last = rounds.folder(1)",
        "tests/test_train_outer.py -k one_more_round"),
    Mutant("train_outer.py", ', "batch": args.outer_batch}', "}",
        "tests/test_train_outer.py -k kept_is_imitated"),
    Mutant("train_outer.py", "if outcome.diverged:", "if False:",
        "tests/test_train_outer.py -k update_that_diverges"),
    Mutant("train_outer.py", "sub_seed(args.seed, k, 0, a - 1)", "sub_seed(args.seed, k, 0)",
        "tests/test_train_outer.py -k every_agent"),
    Mutant("train_outer.py", 'edits if args.exchange == "all" else own[a]', "own[a]",
        "tests/test_train_outer.py -k learns_from_whom"),
    Mutant("train_outer.py", 'own if args.exchange == "own" else [edits]', "[edits]",
        "tests/test_train_outer.py -k learns_from_whom"),
    Mutant("train_outer.py", 'folder / f"policy{tag}"', 'folder / "policy"',
        "tests/test_train_outer.py -k every_agent"),
    Mutant("train_outer.py", 'last / f"policy{tag}"', 'last / "policy"',
        "tests/test_train_outer.py -k its_own_policy"),
    Mutant("lm/ranks.py", "if torch.distributed.is_initialized():", "if False:",
        "tests/test_ranks.py"),
    Mutant("lm/runs.py", "if key in settings} | before", "if False} | before",
        "tests/test_runs.py -k came_later"),
    Mutant("train_outer.py", "replace(e, agent=a)", "replace(e)",
        "tests/test_train_outer.py -k every_agent"),
    Mutant("train_outer.py", "domain.quiz(student, its_tok", "domain.quiz(student, tok",
        "tests/test_train_outer.py -k another_studies"),
    Mutant("reward.py", "= edit_candidate(self.its_tok", "= edit_candidate(self.tok",
        "tests/test_train_outer.py -k another_studies"),
    Mutant("eval_qa.py", "base = without_update(*student", "base = without_update(*writer",
        "tests/test_eval_qa.py -k a_student_is_asked"),
    Mutant("eval_arc.py", "icl.append(predict(self.student,", "icl.append(predict(self.model,",
        "tests/test_eval_arc.py -k a_student_trains"),
    Mutant("lm/runs.py", 'elif re.fullmatch("round-[1-9][0-9]*", round_k.name):', "elif False:",
        "tests/test_runs.py -k trained_as_the_run"),
    Mutant("lm/runs.py", "if proxy and getattr", "if getattr",
        "tests/test_runs.py -k trained_as_the_run"),
    Mutant("lm/runs.py", "if student not in (None, model):", "if False:",
        "tests/test_train_outer.py -k another_studies"),
    Mutant("lm/flags.py", 'if args.learner == "policy":', "if False:",
        "tests/test_train_outer.py -k has_no_policy"),
    Mutant("train_outer.py", 'args.outer == "weighted" and args.reward', "False and args.reward",
        "tests/test_train_outer.py -k bad_input"),
    Mutant("train_outer.py", "settings | domain.pinned, model, student)", "settings)",
        "tests/test_train_outer.py -k passages_that_changed"),
    Mutant("eval_qa.py", "if q.direction == direction]", "if q.direction != direction]",
        "tests/test_eval_qa.py -k directions"),
    Mutant("eval_qa.py", "np.mean([row[name] for row in rows], axis=0)",
        "np.sum([row[name] for row in rows], axis=0)",
        "tests/test_eval_qa.py -k test_the_ladder and not with"),
    Mutant("eval_qa.py", "*unrelated(passages, notes))", "notes)",
        "tests/test_eval_qa.py -k notes_of_a_row"),
    Mutant("eval_qa.py", "and 0 < lr < np.inf and", "and 0 < lr and",
        "tests/test_eval_qa.py -k recipes"),
    Mutant("eval_qa.py", 'dict.fromkeys(others, best["passage+self-edit"])',
        'dict.fromkeys(others, best["passage"])', "tests/test_eval_qa.py -k recipes"),
    Mutant("eval_qa.py", "with merged(model, policy):", "with merged(model, None):",
        "tests/test_eval_qa.py -k policy_writes"),
    Mutant("eval_arc.py", '"heldout": solvable[1::2]}', '"heldout": solvable[::2]}',
        "tests/test_eval_arc.py -k test_choosing and not smallest"),
    Mutant("eval_arc.py", "[t for t in self.tasks if first[t.id] is None]", "list(self.tasks)",
        "tests/test_eval_arc.py -k smallest_first"),
    Mutant("eval_arc.py", '[] if args.split == "train" else trained_as', "trained_as",
        "tests/test_eval_arc.py -k not_judged"),
    Mutant("eval_arc.py", "len(copied) / max(1, len(sound))", "len(copied) / len(edits)",
        "tests/test_eval_arc.py -k outer_loop"),
    Mutant("learn.py", "folder = shipped_policy(model, args.model)", "folder = None",
        "tests/test_learn.py -k policies_writes"),
    Mutant("learn.py",
        "elif known and studied_with(known.settings) != now:",
        "elif False:", "tests/test_learn.py -k study_ask"),
    Mutant("learn.py", "adapter = self.memory.adapter(self.model, about.id) if about.id else None",
        "adapter = None", "tests/test_learn.py -k study_ask"),
    Mutant("learn.py", r'if not text.endswith("\ufffd"):', "if text:",
        "tests/test_learn.py -k study_ask"),
    Mutant("learn.py", "except SystemExit as e:", "except ValueError as e:",
        "tests/test_learn.py -k too_long"),
    Mutant("learn.py", " if note in pointed[p.title]]", "]",
        "tests/test_learn.py -k same_question"),
    Mutant("learn.py", "rank=8, alpha=16.0", "rank=16, alpha=32.0",
        "tests/test_learn.py -k fifty"),
    Mutant("learn.py", "under[p.title] += dict", "under[p.title] = dict",
        "tests/test_learn.py -k same_question"),
    Mutant("learn.py", "must_exist=True", "must_exist=False", "tests/test_learn.py -k mistyped"),
    Mutant("learn.py", "answers[0]] |= said", "answers[0]] = said",
        "tests/test_learn.py -k asked_again"),
    Mutant("learn.py", '["f1"] >= 0.8', '["f1"] >= 0.0', "tests/test_learn.py -k asked_again"),
    Mutant("learn.py", "(len(tok.encode(statement)) + 1 for", "(1 for",
        "tests/test_learn.py -k longer_than_a_quizs"),
    Mutant("learn.py", '"compile", "model", "population")', '"compile", "model")',
        "tests/test_learn.py -k study_ask"),
    Mutant("learn.py", 'right["all documents"] = sum(right[d.name] for d in documents)',
        'right["all documents"] = 0', "tests/test_learn.py -k one_set_of_weights"),
    Mutant("learn.py", "if e.args:  # another signal", "if False:  # another signal",
        "tests/test_learn.py -k study_ask"),
    Mutant("learn.py", "len(answers[question.casefold()]) == 1",
        "len(answers[question.casefold()]) >= 1", "tests/test_learn.py -k no_one_statement"),
    Mutant("learn.py", "(words(question) & words(answer)) - words(title)",
        "words(question) & words(answer)", "tests/test_learn.py -k no_one_statement"),
    Mutant("learn.py", "for note, _, answer in pairs if answer in served}",
        "for note, _, answer in pairs}", "tests/test_learn.py -k no_one_statement"),
    Mutant("learn.py", "max(1, args.fall / 100 * n)", "args.fall / 100 * n",
        "tests/test_learn.py -k one_set_of_weights"),
    Mutant("learn.py", "if known and known.digest != document.digest:", "if False:",
        "tests/test_learn.py -k not_replaced"),
    Mutant("report.py", "width:{100 * (high - low):.2f}%", "width:{100 * high:.2f}%",
        "tests/test_report.py -k test_the_ladder"),
    Mutant("report.py", 'm.startswith("seal-")][-1:]', 'm.startswith("seal-")][:1]',
        "tests/test_report.py -k right_or_wrong"),
    Mutant("report.py", 'escape(a["answer"].strip())', 'a["answer"].strip()',
        "tests/test_report.py -k escaped"),
    Mutant("seal.py", "s.outer_epochs, s.seed + 1]", "s.outer_epochs]",
        "tests/test_seal.py -k make_no_sense"),
    Mutant("seal.py", "lr * (1 - step / len(order))", "lr",
        "tests/test_seal.py -k lesson_is_the_engine"),
    Mutant("seal.py", 'any(f" {normalize(a)} " in f" {normalize(answer)} " for',
        "any(normalize(a) in normalize(answer) for", "tests/test_seal.py -k prompts_and_scores"),
    Mutant("lm/adapters.py", "layers[0], layers[-1] + 1)", "layers[0], layers[-1])",
        "tests/test_lora.py -k load_pefts"),
    Mutant("lm/adapters.py", "adapters.flat[row : row + 1]", "adapters.flat[:1]",
        "tests/test_lora.py -k peft_loads_ours"),
    Mutant("lm/adapters.py", 'return not layers or int(path.split(".")[1]) in layers',
        "return True", "tests/test_lora.py -k broken_adapter"),
    Mutant("lm/adapters.py",
        'if shipped.is_file() and read_json(shipped).get("base") != base_of(model):', "if False:",
        "tests/test_ship.py -k another_base"),
    Mutant("lm/checkpoint.py", '("default", "llama3")', '("default", "llama3", "yarn")',
        "tests/test_model.py -k broken_folder"),
    Mutant("lm/checkpoint.py", ".isfinite().all()", ".isfinite().any()",
        "tests/test_model.py -k broken_folder"),
    Mutant("lm/checkpoint.py", "not 1 <= found <= most", "not found <= most",
        "tests/test_model.py -k config_that_cannot_be"),
    Mutant("lm/checkpoint.py", "if low >= high:", "if low > high:",
        "tests/test_model.py -k config_that_cannot_be"),
    Mutant("lm/files.py", "if n < last or not resume:", "if n < last:",
        "tests/test_files.py -k cut_last_record"),
    Mutant("lm/files.py", "except BaseException:\n        remove(scratch)\n",
        "except BaseException:\n", "tests/test_files.py -k half_a_file"),
    Mutant("lm/files.py", "if len(value) < len(pairs):", "if False:",
        "tests/test_files.py -k bad_json"),
    Mutant("lm/files.py", " & ~mask", "", "tests/test_files.py -k permissions"),
    Mutant("lm/files.py", "SeedSequence([seed, *keys])", "SeedSequence([seed, sum(keys)])",
        "tests/test_files.py -k sub_seeds"),
    Mutant("lm/files.py", "range(0, len(items), n)", "range(0, len(items) - 1, n)",
        "tests/test_files.py -k few_at_a_time"),
    Mutant("lm/files.py", 'data.decode("utf-8-sig")', 'data.decode("utf-8")',
        "tests/test_files.py -k byte_order_mark"),
    Mutant("lm/files.py", "if is_folder != folder:", "if is_folder and not folder:",
        "tests/test_files.py -k output_is_refused"),
    Mutant("lm/flags.py", "if not low <= value:", "if not low < value:",
        "tests/test_train_outer.py -k bad_input"),
    Mutant("lm/flags.py", "if not value < below:", "if not value <= below:",
        "tests/test_eval_arc.py -k without_effect"),
    Mutant("lm/flags.py", '"allow_abbrev": False', '"allow_abbrev": True',
        "tests/test_eval_arc.py -k settings_without_effect"),
    Mutant("lm/flags.py", "(rows := model.config.vocab_size) <= (last",
        "(rows := model.config.vocab_size) < (last", "tests/test_sampler.py -k tokenizer_says"),
    Mutant("lm/grid.py", "while size < n:", "while size <= n:", "tests/test_grid.py -k by_hand"),
    Mutant("lm/grid.py", "grid.weight[p] /= max(1, n)", "grid.weight[p] /= L",
        "tests/test_grid.py -k by_hand"),
    Mutant("lm/grid.py", "row.pos, row.at + t", "row.pos, row.at", "tests/test_grid.py -k by_hand"),
    Mutant("lm/grid.py", "sequences + len(lengths)", "sequences + 1",
        "tests/test_grid.py -k by_hand"),
    Mutant("lm/grid.py", ".clamp(min=math.log(1e-38))", "",
        "tests/test_grid.py -k held_for_impossible"),
    Mutant("lm/grid.py", "scatter_add(1, t, -s)", "scatter_add(1, t, s)",
        "tests/test_grid.py -k same_is_learnt"),
    Mutant("lm/grid.py", "steps = active & alive & sound", "steps = alive & sound",
        "tests/test_grid.py -k same_is_learnt"),
    Mutant("lm/grid.py", "(1 - 0.999**t)", "(1 - 0.99**t)", "tests/test_grid.py -k same_is_learnt"),
    Mutant("lm/grid.py", "(seen == segment[:, :, None]) | (seen == prefix[:, :, None])",
        "seen == segment[:, :, None]", "tests/test_grid.py -k same_is_learnt"),
    Mutant("lm/intervals.py", "np.quantile(means, [0.025, 0.975])",
        "np.quantile(means, [0.25, 0.75])", "tests/test_intervals.py -k bootstrap"),
    Mutant("lm/intervals.py", "delta = values[b] - values[a]", "delta = values[a] - values[b]",
        "tests/test_intervals.py -k same_passages"),
    Mutant("lm/intervals.py", "np.isfinite(drawn).all()", "drawn.size",
        "tests/test_intervals.py -k ratio"),
    Mutant("lm/intervals.py", "(gap <= 0).any()", "(gap <= 0).all()",
        "tests/test_intervals.py -k gap"),
    Mutant("lm/kernels.py", ".reshape(R, K, -1, D) * D**-0.5", ".reshape(R, K, -1, D)",
        "tests/test_kernels.py -k attention_swapped_in"),
    Mutant("lm/kernels.py", "if weight is not self.weight or version != weight._version:",
        "if weight is None:", "tests/test_kernels.py -k merge_is_noticed"),
    Mutant("lm/kernels.py", 'if model.device.type != "cpu":', 'if model.device.type == "cuda":',
        "tests/test_kernels.py -k off_the_cpu"),
    Mutant("lm/log.py", "repr((candidate.examples, candidate.config))", "repr(candidate.examples)",
        "tests/test_log.py -k another_configuration"),
    Mutant("lm/log.py", "if not all(c.name in self.done and", "if not any(c.name in self.done and",
        "tests/test_log.py -k some_are_logged"),
    Mutant("lm/log.py", "if len(found) < n:", "if False:", "tests/test_log.py -k another_shape"),
    Mutant("lm/log.py", "n > 0 and self.done >= self.total", "n > 0 and self.done > self.total",
        "tests/test_log.py -k counts_to_the_end"),
    Mutant("lm/memory.py", "/ (f + self.norm)", "/ (f + self.k1)", "tests/test_memory.py -k bm25"),
    Mutant("lm/memory.py", "for word in dict.fromkeys(question):", "for word in question:",
        "tests/test_memory.py -k bm25"),
    Mutant("lm/memory.py", "n = max(1, self.found_in[word])", "n = self.found_in[word]",
        "tests/test_memory.py -k best_text"),
    Mutant("lm/memory.py", "LEAST = 0.5", "LEAST = 0.3", "tests/test_learn.py -k study_ask"),
    Mutant("lm/memory.py", "if any(self.folders()) and self.base != base:", "if False:",
        "tests/test_memory.py -k no_memory"),
    Mutant("lm/memory.py", "if any(self.folders()) and self", "if self.documents and self",
        "tests/test_memory.py -k all_damaged"),
    Mutant("lm/memory.py", "type(seed) is not int or seed < 0", "type(seed) is not int",
        "tests/test_memory.py -k damaged_documents"),
    Mutant("lm/memory.py", 'folder.glob("[!.]*") if p.is_dir()', 'folder.glob("*") if p.is_dir()',
        "tests/test_memory.py -k while_adding"),
    Mutant("lm/memory.py", "        self.keep_to_itself()\n        self.read()",
        "        self.read()", "tests/test_memory.py -k two_cannot_write"),
    Mutant("lm/memory.py", '*self.folder.glob(".*.forgotten"), ', "",
        "tests/test_memory.py -k while_forgetting"),
    Mutant("lm/memory.py", "for file in ADAPTER:", "for file in ADAPTER[:1]:",
        "tests/test_memory.py -k half_copied"),
    Mutant("lm/memory.py", 'q["right"] in (0, 1)', 'q["right"] >= 0',
        "tests/test_memory.py -k damaged_documents"),
    Mutant("lm/packing.py", "key=lambda i: -lengths[i])", "key=lambda i: lengths[i])",
        "tests/test_packing.py -k fill_rows"),
    Mutant("lm/packing.py", "*(len(e.ids) - 1 for e in examples)",
        "*(len(e.ids) for e in examples)", "tests/test_packing.py -k leaves_each_sequence"),
    Mutant("lm/packing.py", "in enumerate(shared) if counts]",
        "in enumerate(shared) if not counts]", "tests/test_packing.py -k begin_alike"),
    Mutant("lm/packing.py", "fewest = min(ways,", "fewest = max(ways,",
        "tests/test_packing.py -k several_kinds"),
    Mutant("lm/packing.py", "return prefix + sum(", "return sum(",
        "tests/test_packing.py -k begin_alike"),
    Mutant("lm/packing.py", "index[t - 1] for t in predicted", "index[t] for t in predicted",
        "tests/test_packing.py -k rows_as_documented"),
    Mutant("lm/packing.py", "pos += range(prefix, len(e.ids))", "pos += range(len(e.ids) - prefix)",
        "tests/test_packing.py -k rows_as_documented"),
    Mutant("lm/packing.py", "weight += [e.weight] *", "weight += [1.0] *",
        "tests/test_packing.py -k rows_as_documented"),
    Mutant("lm/packing.py", "grad.index_fill_(0, ctx.empty, 0)", "grad",
        "tests/test_packing.py -k passes_no_gradient"),
    Mutant("lm/packing.py", "(seen == segment[:, :, None]) | (seen == 0)",
        "seen == segment[:, :, None]", "tests/test_packing.py -k packed_masks"),
    Mutant("lm/packing.py", "% (4 * multiple)", "% (2 * multiple)",
        "tests/test_packing.py -k softmax_runs_over"),
    Mutant("lm/packing.py", "zip(prefixes.split(1), self.counts)]",
        "zip(prefixes.split(1), self.counts[::-1])]", "tests/test_packing.py -k behind_its_prefix"),
    Mutant("lm/ranks.py", "items[RANK::WORLD]", "items[RANK::1]",
        "tests/test_ranks.py -k known_to_all"),
    Mutant("lm/ranks.py", "found /= found[-1].clone()", "found /= WORLD",
        "tests/test_ranks.py -k shared_by_what_they_count"),
    Mutant("lm/ranks.py", "found *= sum(len(row.at) for row in own)", "found *= len(own)",
        "tests/test_ranks.py -k shared_by_what_they_count"),
    Mutant("lm/ranks.py", "if first.get(key) != other.get(key):", "if False:",
        "tests/test_ranks.py -k unlike_settings"),
    Mutant("lm/ranks.py", "return RANK == 0 or", "return True or",
        "tests/test_ranks.py -k known_to_all"),
    Mutant("lm/log.py", "for done in gathered([self.done]):", "for done in [self.done]:",
        "tests/test_ranks.py -k known_to_all"),
    Mutant("lm/log.py", "[*parts_of(self.path), self.path]", "[self.path]",
        "tests/test_ranks.py -k known_to_all"),
    Mutant("lm/runs.py", '- {"code", *SPEED}', '- {"code"}',
        "tests/test_runs.py -k cannot_change_a_result"),
    Mutant("lm/runs.py", '"weights": weights_of(model)}', "}",
        "tests/test_runs.py -k other_weights"),
    Mutant("lm/runs.py", '.bfloat16().float().cpu() for p', '.float().cpu() for p',
        "tests/test_runs.py -k other_weights"),
    Mutant("lm/runs.py", 'last["distinct"] < first["distinct"] / 2', "False",
        "tests/test_runs.py -k collapse"),
    Mutant("lm/runs.py", 'first["notes_mean"] / 2', 'first["notes_mean"] / 8',
        "tests/test_runs.py -k collapse"),
    Mutant("lm/files.py", "        if not e.filename:\n            raise\n", "",
        "tests/test_files.py -k system_refuses"),
    Mutant("lm/files.py", "signal.signal(signal.SIGTERM, stop)", "pass",
        "tests/test_torture.py -k stop"),
    Mutant("reward.py", "len(set(texts)) / len", "len(texts) / len",
        "tests/test_train_outer.py -k metrics"),
    Mutant("reward.py", '[flaw == "repeats"', '[flaw != "repeats"',
        "tests/test_train_outer.py -k metrics"),
    Mutant("lm/runs.py", "known[name] == now[name] for name in", "True for name in",
        "tests/test_runs.py -k come_and_go"),
    Mutant("lm/runs.py", "= known | now", "= now", "tests/test_runs.py -k come_and_go"),
    Mutant("lm/runs.py", "k is None or k in found", "k is None",
        "tests/test_runs.py -k named_after"),
    Mutant("lm/runs.py", 'metrics.get("round") != k', 'metrics.get("round") == 0',
        "tests/test_runs.py -k metrics_of_other_rounds"),
    Mutant("lm/runs.py", "max(found, default=0) + 1", "max(found, default=1)",
        "tests/test_runs.py -k in_order"),
    Mutant("lm/runs.py", "found[k] for k in sorted(found)", "found[k] for k in found",
        "tests/test_runs.py -k in_order"),
    Mutant("lm/runs.py", '"[1-9][0-9]*"', '"[0-9]+"', "tests/test_runs.py -k copy_of_a_round"),
    Mutant("lm/runs.py", 'before.get("reward") == "proxy"', 'before.get("reward") != "proxy"',
        "tests/test_runs.py -k another_inner_update"),
    Mutant("lm/runs.py", 'and before["budget"] != args.budget:', "and False:",
        "tests/test_eval_qa.py -k run_with_other_settings"),
    Mutant("lm/template.py", '"index": n + 1,', '"index": n,',
        "tests/test_tokenizer.py -k chat_equals"),
    Mutant("lm/template.py", '"last": n == len(items) - 1', '"last": n == len(items)',
        "tests/test_tokenizer.py -k chat_equals"),
    Mutant("lm/template.py", "== isinstance(node.op, ast.Or)", "== isinstance(node.op, ast.And)",
        "tests/test_tokenizer.py -k chat_equals"),
    Mutant("lm/tokenizer.py", "if control or m[0] not in self.control:", "if m[0]:",
        "tests/test_tokenizer.py -k never_becomes"),
    Mutant("lm/tokenizer.py", "ends.insert(0, first[0])", "ends.append(first[0])",
        "tests/test_tokenizer.py -k reply_ends"),
    Mutant("lm/tokenizer.py", "if merged != sorted(merged):", "if not merged:",
        "tests/test_tokenizer.py -k refused_by_name"),
    Mutant("lm/tokenizer.py", 'return unicodedata.normalize("NFC", text) if self.nfc else text',
        "return text", "tests/test_tokenizer.py -k is_honoured"),
    Mutant("lm/tokenizer.py", "        if i != n:", "        if i < n:",
        "tests/test_tokenizer.py -k refused_by_name"),
    Mutant("data/arc.py", '"rotate-90": "rotate-270",', '"rotate-90": "rotate-90",',
        "tests/test_arc_data.py -k symmetries_invert"),
    Mutant("data/arc.py", "np.hstack([np.fliplr(g), g])", "np.hstack([g, np.fliplr(g)])",
        "tests/test_arc_data.py -k test_augmentation"),
    Mutant("data/arc.py", "rng.integers(0, min(5, smallest), 2)", "rng.integers(0, 5, 2)",
        "tests/test_arc_data.py -k shift_wraps"),
    Mutant("data/arc.py", "np.concatenate([[0], 1 + rng.permutation(9)])", "rng.permutation(10)",
        "tests/test_arc_data.py -k shift_wraps"),
    Mutant("data/arc.py", "t.longest_side <= LARGEST and fits(t)", "t.longest_side <= LARGEST",
        "tests/test_arc.py -k too_long_is_not_drawn"),
    Mutant("lm/tokenizer.py", 'raise ValueError("it has no tokens")', "pass",
        "tests/test_tokenizer.py -k vocabulary_of_nothing"),
    Mutant("lm/tokenizer.py", "if \"Sequence\" not in last:", "if False:",
        "tests/test_tokenizer.py -k refused_by_name"),
    Mutant("reward.py", "if pair else tok.begin", "if pair else []",
        "tests/test_tokenizer.py -k learnt_behind"),
    Mutant("lm/template.py", 'return refuse(f"loop.{key}") if isinstance(x, Loop) else UNDEFINED',
        "return UNDEFINED", "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/template.py", "if MADE[0] > MOST:", "if MADE[0] > 9 * MOST:",
        "tests/test_tokenizer.py -k cannot_follow"),
    Mutant("lm/checkpoint.py", "not 0 < found < 1e38", "not 0 < found",
        "tests/test_model.py -k cannot_be_is_refused"),
    Mutant("data/arc.py", "if of != file and of.is_file():", "if False:",
        "tests/test_arc_data.py -k forms"),
    Mutant("data/arc.py", "if ids and name not in wanted:", "if False:",
        "tests/test_arc_data.py -k wrong_with_others"),
    Mutant("arc.py", "for some in chunks(seen, 4):", "for some in chunks(seen, 99):",
        "tests/test_arc.py -k turned_back"),
    Mutant("eval_arc.py", "WORKED * self.args.shots", "WORKED",
        "tests/test_eval_arc.py -k outer_loop_and_the_ladder"),
    Mutant("eval_arc.py", "attempts.get(method, 1)", "1",
        "tests/test_eval_arc.py -k outer_loop_and_the_ladder"),
    Mutant("eval_arc.py", 'flaws.count("too long")', "0",
        "tests/test_eval_arc.py -k does_not_fit"),
    Mutant("data/arc.py", "if t.longest_side <= LARGEST and", "if",
        "tests/test_arc_data.py -k large_and_equal"),
    Mutant("data/arc.py", "first = unique[: min(limit, own)]", "first = unique[:0]",
        "tests/test_arc_data.py -k test_training_tasks"),
    Mutant("data/arc.py", "if len(rest) > 1:", "if rest:", "tests/test_arc_data.py -k leave_out"),
    Mutant("data/arc.py", " + (len(self.train),)", "", "tests/test_arc_data.py -k key_is_that"),
    Mutant("data/arc.py", 'if split in ("", name) for item', "for item",
        "tests/test_arc_data.py -k test_forms"),
    Mutant("data/arc.py", "type(c) is int and 0 <= c <= 9", "isinstance(c, int) and 0 <= c <= 9",
        "tests/test_arc_data.py -k malformed_file"),
    Mutant("data/documents.py", '[:50] or "document"', ' or "document"',
        "tests/test_documents.py -k document_is_called"),
    Mutant("data/documents.py", 'unicodedata.normalize("NFC", Path(path).stem.casefold())',
        "Path(path).stem.casefold()", "tests/test_documents.py -k document_is_called"),
    Mutant("data/documents.py", "commonprefix([headings for headings, _ in sections(text)])",
        "sections(text)[0][0]", "tests/test_documents.py -k is_the_title"),
    Mutant("data/documents.py", "below = headings[1:] if top else headings", "below = headings",
        "tests/test_documents.py -k documents_passages"),
    Mutant("data/documents.py", "(commonprefix([found[-1][0], below]), joined)",
        "(found[-1][0], joined)", "tests/test_documents.py -k documents_passages"),
    Mutant("data/documents.py", " if word not in COMMON]", "]",
        "tests/test_documents.py -k words_that_tell"),
    Mutant("data/prepare.py", 'n_head if ".attn_q." in t.name else n_kv_head)', "n_head)",
        "tests/test_data.py -k gguf_file"),
    Mutant("data/prepare.py", "if digest != sha256:", "if not digest:",
        "tests/test_data.py -k failed_fetch"),
    Mutant("data/prepare.py", "if entries and len(entries) < expected:", "if False:",
        "tests/test_data.py -k test_the_split_of_squad"),
    Mutant("data/prepare.py", "key=lambda turn: turn[0])", "key=lambda turn: 0)",
        "tests/test_data.py -k test_the_split_of_squad"),
    Mutant("data/prepare.py", 'plain = " ".join(p.text.split())', "plain = p.text",
        "tests/test_data.py -k test_the_split_of_squad"),
    Mutant("data/qa.py", "return passages[:limit] if limit",
        "return passages[: limit + 1] if limit", "tests/test_data.py -k test_forms"),
    Mutant("data/qa.py", 'if not split or p.split in ("", split)]',
        "if not split or p.split == split]", "tests/test_data.py -k test_forms"),
    Mutant("data/qa.py", "        count[title] += 1\n", "", "tests/test_data.py -k test_forms"),
    Mutant("data/qa.py", "[qa for qa in qas if _answers(qa)]", "list(qas)",
        "tests/test_data.py -k forms_of_squad"),
    Mutant("data/qa.py", "isinstance(a, str) and a.strip() for a", "isinstance(a, str) for a",
        "tests/test_data.py -k malformed_file"),
    Mutant("data/text.py", 'f"(?<![.!?…؟۔։])[.', 'f"[.', "tests/test_text.py -k square"),
    Mutant("data/text.py", "or [text.strip()] * bool(text.strip())", "",
        "tests/test_text.py -k stays_whole"),
    Mutant("data/text.py", "for n, own in above.items() if n < level}",
        "for n, own in above.items()}", "tests/test_text.py -k test_sections"),
    Mutant("data/text.py", "mark = None if code else HEADING", "mark = HEADING",
        "tests/test_text.py -k test_sections"),
    Mutant("data/text.py", "            if full:\n", "            if True:\n",
        "tests/test_text.py -k test_sections"),
    Mutant("data/text.py", "0 < len(line.split()) <= 12", "0 < len(line.split()) <= 13",
        "tests/test_text.py -k underlined_headings"),
    Mutant("experiments/budget.py", '2 * r["tokens"] <= best["tokens"]',
        'r["tokens"] <= best["tokens"]', "tests/test_experiments.py -k at_half"),
    Mutant("experiments/choice.py", "passages, together, args", "passages, [()] * len(edits), args",
        "tests/test_choice.py -k whole_run"),
    Mutant("experiments/choice.py", "chosen(edits[:, half], judged)",
        "chosen(edits[:, other], judged)", "tests/test_choice.py -k judges_itself"),
    Mutant("experiments/credits.py", "1.0 if note in half else -1.0",
        "1.0 if note in half else 0.0", "tests/test_credits.py -k minus_without"),
    Mutant("experiments/credits.py", "np.isfinite(pairs).all(axis=1)",
        "np.isfinite(pairs).any(axis=1)", "tests/test_credits.py -k diverged_study"),
    Mutant("experiments/credits.py", '"alignment": product / lengths}', '"alignment": product}',
        "tests/test_credits.py -k influence_knows"),
    Mutant("experiments/credits.py", "values[1:].mean(0) if others else values[0]",
        "values[0] if others else values[1:].mean(0)", "tests/test_credits.py -k own_wording"),
    Mutant("experiments/distill.py", "in_view(model, tok, p, e.notes, share)",
        "in_view(model, tok, p, e.notes, 1.0)", "tests/test_distill.py -k the_experiment"),
    Mutant("experiments/exercises.py", "[(first, other) for other in others]",
        "[(other, first) for other in others]", "tests/test_exercises.py -k test_lines"),
    Mutant("experiments/figures.py", '[r["method"] for r in rows[::-1]])',
        '[r["method"] for r in rows])', "tests/test_figures.py -k beside_its_name"),
    Mutant("experiments/figures.py", '100 * np.array(r["matrix"])', '100 * np.array(r["matrix"]).T',
        "tests/test_figures.py -k matrix"),
    Mutant("experiments/figures.py", ' and r["tokens"]]', "]",
        "tests/test_figures.py -k budget_curve"),
    Mutant("experiments/grid.py", "return found[:count]", "return found[-count:]",
        "tests/test_experiments.py -k settings_to_try"),
    Mutant("experiments/grid.py", "best = max(rows", "best = min(rows",
        "tests/test_experiments.py -k test_the_grid"),
    Mutant("experiments/many.py", "alone[:count] - values", "values - alone[:count]",
        "tests/test_many.py -k every_row"),
    Mutant("experiments/many.py", "round(tokens / self.tokens_a_step(examples))",
        "self.args.steps * max(1, edits) * count", "tests/test_many.py -k every_row"),
    Mutant("experiments/noise.py", "candidate = (ms_c - ms_cq - ms_s + ms_rest) / (s * q)",
        "candidate = (ms_c - ms_rest) / (s * q)", "tests/test_noise.py -k components"),
    Mutant("experiments/noise.py", 'scores[:, -1, n:], "accuracy")',
        'scores[:, 0, n:], "accuracy")', "tests/test_noise.py -k other_wordings"),
    Mutant("experiments/notes.py", ">= 0.8 * len(w)", ">= 0.3 * len(w)",
        "tests/test_experiments.py -k test_measures"),
    Mutant("experiments/own_texts.py", "{p.id for p in texts} - IN_VIEW)", "{p.id for p in texts})",
        "tests/test_learn.py -k experiment_on_own_texts"),
    Mutant("experiments/proxy.py", "            x, y = x - x.mean(), y - y.mean()\n", "",
        "tests/test_experiments.py -k proxy_is_worth"),
    Mutant("experiments/recipes.py",
        'if found["accuracy"] > best.get(recipe.method, {"accuracy": -1})["accuracy"]:',
        "if recipe.method not in best:", "tests/test_experiments.py -k best_recipe"),
    Mutant("experiments/rewards.py", "x - x.mean(axis=1, keepdims=True)", "x - x.mean()",
        "tests/test_experiments.py -k within_passages"),
    Mutant("experiments/rewards.py", "two = [~mask for mask in one]", "two = one",
        "tests/test_experiments.py -k reliability"),
    Mutant("experiments/router.py", "order[size : size + OTHERS]", "order[:OTHERS]",
        "tests/test_memory.py -k experiment_on_routing"),
    Mutant("experiments/ship.py", 'if digest(before["data"]) != before["data_sha256"]:',
        "if False:", "tests/test_ship.py -k other_data"),
    Mutant("experiments/ship.py", "wanted or rounds.done) <= rounds.done:",
        "wanted or rounds.done):", "tests/test_ship.py -k cannot_be_shipped"),
    Mutant("experiments/ship.py", "args.out, args.model, dtype=torch.bfloat16)",
        "args.out, args.model)", "tests/test_ship.py -k what_is_shipped"),
    Mutant("experiments/stream.py", 'else r["matrix"][-1]', 'else r["matrix"][0]',
        "tests/test_stream.py -k several_seeds"),
    Mutant("experiments/stream.py", "once = list(dict.fromkeys(", "once = list((",
        "tests/test_stream.py -k answered_once"),
    Mutant("experiments/stream.py", "for n in range(1, count + 1)]\n        general = self",
        "for n in range(1, count)]\n        general = self", "tests/test_stream.py -k every_row"),
    Mutant("lm/memory.py", "return self.bits(word) * math.log", "return math.log",
        "tests/test_memory.py -k common_anywhere"),
    Mutant("lm/tokenizer.py", "self.encode(f\" {word}\"))", "self.encode(word))",
        "tests/test_tokenizer.py -k how_common"),
    Mutant("experiments/router.py", "in zip(numbers, values", "in zip(values[name], values",
        "tests/test_memory.py -k experiment_on_routing"),
    Mutant("experiments/stream.py", "(retained[name] < before - 1e-9)",
        "(retained[name] > before + 1e-9)", "tests/test_stream.py -k summary"),
    Mutant("experiments/stream.py", "< immediate - 1e-9", "< before - 1e-9",
        "tests/test_stream.py -k summary"),
    Mutant("experiments/stream.py", 'more = retained[name] - retained["seal"]',
        'more = retained["seal"] - retained[name]', "tests/test_stream.py -k summary"),
    Mutant("experiments/stream.py", '100 * (rows[0]["general"] - row["general"])',
        '100 * (row["general"] - rows[0]["general"])', "tests/test_stream.py -k summary"),
    Mutant("experiments/stream.py", "if n is None or shown else n", "if n is None else n",
        "tests/test_stream.py -k router_sees"),
    Mutant("experiments/stream.py", "asked, general = (self.routed(of, self.args.count)",
        "asked, general = (self.asked(of)", "tests/test_stream.py -k told_the_title"),
    Mutant("experiments/stream.py", "if not outcome.diverged:", "if outcome.losses:",
        "tests/test_stream.py -k not_merged"),
    Mutant("experiments/stream.py", 'replace(self.lora, start=0) if row == "seal" else self.lora',
        "self.lora", "tests/test_stream.py -k every_row"),
    Mutant("experiments/tools.py", "notes = list(e.notes) if written else []",
        "notes = [] if written else list(e.notes)",
        "tests/test_experiments.py -k test_tools and not copies"),
    Mutant("experiments/walkthrough.py", "    check_output(args.out)\n", "",
        "tests/test_scripts.py -k walkthrough_too"),
    Mutant("experiments/warm.py", "(1 - (k - 1) / args.parts)", "(1 - k / args.parts)",
        "tests/test_warm.py -k learning_rate_falls"),
    Mutant("experiments/warm.py", "default_rng([args.seed, k])", "default_rng([args.seed])",
        "tests/test_warm.py -k learning_rate_falls"),
    Mutant("bench/baselines.py", "labels = ids.masked_fill(~counts, -100)", "labels = ids.clone()",
        "tests/test_bench.py -k both_sides_train"),
    Mutant("bench/gpu.py", "except Exception as e:  # the others",
        "except ValueError as e:  # the others", "tests/test_bench.py -k gpus_script"),
    Mutant("bench/scaling.py", "return t * (t + 1) / 2", "return t * t / 2",
        "tests/test_bench.py -k flops"),
    Mutant("experiments/chosen.py", "if edge <= settings[key])", "if edge < settings[key])",
        "tests/test_chosen.py"),
    Mutant("experiments/chosen.py", "if e.passage == p), key", "), key", "tests/test_chosen.py"),
    Mutant("experiments/chosen.py", "x -= x.mean(axis=0)", "x -= 0",
        "tests/test_chosen.py -k is_worth"),
    Mutant("experiments/chosen.py", "if e.settings and not e.flaw]", "if e.settings]",
        "tests/test_chosen.py -k is_worth"),
    Mutant("experiments/chosen.py", "for edge in edges[1:]}", "for edge in edges}",
        "tests/test_chosen.py -k features"),
    Mutant("experiments/ranks.py", "args.alpha * rank / args.rank", "args.alpha",
        "tests/test_experiments.py -k test_ranks"),
    Mutant("experiments/ranks.py", "return 2 * Adapters", "return 4 * Adapters",
        "tests/test_experiments.py -k has_the_size"),
    Mutant("inner.py", "p[at, t[:, :1]] = 0  #", "#", "tests/test_inner.py"),
    Mutant("inner.py", "-s[:, 1:].to(p.dtype), acc", "s[:, 1:].to(p.dtype), acc",
        "tests/test_distill.py"),
    Mutant("bench/memory.py", "return seconds[1:]", "return seconds",
        "tests/test_bench.py -k is_filled"),
    Mutant("bench/cost.py", "if values.min() >= 0:", "if True:",
        "tests/test_bench.py -k below_zero"),
    Mutant("bench/cost.py", "columns[:, used] / measured[:, None]", "columns[:, used]",
        "tests/test_bench.py -k model_of_the_cost"),
    Mutant("bench/cost.py", "groups = devices // shards", "groups = 1",
        "tests/test_bench.py -k prediction_by_hand"),
    Mutant("bench/cost.py", "(4 * weights + 6 * adapter)", "(6 * weights + 6 * adapter)",
        "tests/test_bench.py -k prediction_by_hand"),
    Mutant("bench/cost.py", "if shards > devices:", "if False:",
        "tests/test_bench.py -k does_not_fit_is_said"),
    Mutant("bench/cost.py", "both[1] - both[0]", "both[1]",
        "tests/test_bench.py -k step_is_measured"),
    Mutant("bench/speed.py", "(seconds - setup) * part", "seconds * part",
        "tests/test_bench.py -k share_of_the_work"),
    Mutant("bench/speed.py", "total += len(batch) * max(len(e.ids) for e in batch)",
        "total += sum(len(e.ids) for e in batch)", "tests/test_bench.py -k padding_is_counted"),
]
# fmt: on


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    about = "try only the faults that have this in their file, their text or their tests"
    add("--only", default="", metavar="SUBSTRING", help=about)
    add("--workers", type=at_least(1), default=2, help="faults that are tried at the same time")
    add("--work", default="runs/mutants", help="folder for progress, to resume a killed run")
    add("--out", default="results/mutants.json", help="result file")
    return parser.parse_args()


def check_list() -> None:
    """Exits with one line if a fault cannot be put into its file, or makes no Python of it."""
    for m in MUTANTS:
        source = (ROOT / m.file).read_text(encoding="utf-8")
        where = f"error: {m.file}: {m.before!r:.60}"
        if (times := source.count(m.before)) != 1:
            raise SystemExit(f"{where} stands there {times} times, not once")
        try:
            ast.parse(source.replace(m.before, m.after))
        except SyntaxError as e:
            raise SystemExit(f"{where} cannot become {m.after!r:.60}: {e.msg}") from e


def without_fault(mutants: list[Mutant]) -> list[Mutant]:
    """For each test file: the tests that these faults name there, on the source as it is."""
    chosen, cases = {}, []
    for m in mutants:
        chosen.setdefault(m.test_file, {})[m.words] = f"({m.words})"
    for file, words in chosen.items():
        every = "" if "" in words else f" -k {' or '.join(words.values())}"
        cases.append(Mutant(file, "", "", file + every))
    return cases


def name_of(m: Mutant) -> str:
    """It changes with the fault, its source and its tests' file."""
    files = [digest(ROOT / file) for file in (m.file, m.test_file)]
    return fingerprint(repr((m, files)).encode())


def copy_to(folder: Path) -> None:
    """The repository's files as they are now, with links to what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise SystemExit(f"error: git cannot list the files of {ROOT}: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in LINKS:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)


def outcome_of(m: Mutant, folder: Path) -> str:
    """What its tests say of a fault, in a copy of the repository, which is then as it was."""
    command = [sys.executable, *PYTEST, m.test_file, *(["-k", m.words] if m.words else [])]
    # No *.pyc: it is looked up by the time and the size of its source, which two faults may share.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    quiet = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.DEVNULL)
    limit, path = SECONDS if m.before else 10 * SECONDS, folder / m.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(m.before, m.after, 1), encoding="utf-8")
    try:
        code = subprocess.run(command, cwd=folder, env=env, timeout=limit, **quiet).returncode
    except subprocess.TimeoutExpired:
        return "noticed"
    finally:
        path.write_text(source, encoding="utf-8")
    return OUTCOMES.get(code, f"no test ran: pytest ended with {code}")


def try_all(names: dict, args) -> dict:
    """{case: its outcome} for names {case: name_of(case)}. What is known is not tried again; where
    no test ran, nothing is known."""
    path, survived = Path(args.work) / "outcomes.jsonl", 0
    check_output(path)
    records = read_jsonl(path, resume=True) if path.is_file() else []
    known = {r["n"]: r for r in records if r["outcome"] in OUTCOMES.values()}
    left = [m for m in names if names[m] not in known]
    progress, folders = Progress("faults", len(left)), Queue()
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(args.workers) as pool:
        for n in range(args.workers if left else 0):
            copy_to(Path(scratch) / str(n))
            folders.put(Path(scratch) / str(n))

        def work(m: Mutant) -> str:
            folder = folders.get()
            try:
                return outcome_of(m, folder)
            finally:
                folders.put(folder)

        running = {pool.submit(work, m): m for m in left}
        try:
            for future in as_completed(running):
                m, outcome = running[future], future.result()
                known[names[m]] = {"n": names[m], **asdict(m), "outcome": outcome}
                write_jsonl(path, list(known.values()))
                survived += bool(m.before) and outcome == "survived"
                progress.step(survived=survived)
        finally:
            pool.shutdown(cancel_futures=True)
    return {m: known[name]["outcome"] for m, name in names.items()}


def main() -> None:
    args = parse_arguments()
    check_list()
    check_output(args.out)
    chosen = [m for m in MUTANTS if any(args.only in text for text in asdict(m).values())]
    if not chosen:
        raise SystemExit(f"error: --only {args.only}: no fault has this in it")
    outcomes = try_all({m: name_of(m) for m in [*without_fault(chosen), *chosen]}, args)
    failures, held = [], 0
    for m, outcome in outcomes.items():
        if not m.before and outcome == "noticed":
            outcome = "fails without a fault"
        if outcome == ("noticed" if m.before else "survived"):
            held += bool(m.before)
            continue
        failures.append(asdict(m) | {"outcome": outcome})
        print(f"{m.file}: {m.before!r} -> {m.after!r}, {m.tests}: {outcome}")
    result = {"command": command_line(), "part": "mutants", "tried": len(chosen), "held": held}
    write_json(args.out, result | {"failures": failures})
    print(f"{held} of {len(chosen)} faults noticed")
    if failures:
        raise SystemExit(f"error: {len(failures)} of {len(outcomes)} did not hold, see {args.out}")


if __name__ == "__main__":
    run_main(main, GOES_ON)
