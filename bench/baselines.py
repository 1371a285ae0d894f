"""What people use for the same work today: transformers + peft, as a careful user would write it.
speed.py times it.

Careful: weights in the same dtype as ours, sequences padded to the longest of their batch only,
torch's fused AdamW, no Trainer, no gradients for frozen weights, greedy and sampled decoding by
generate() with its key-value cache. `trainer_steps` is the one exception: it is the way of the
paper's code, Trainer with every sequence padded to 2048 tokens.
"""

import tempfile
import time

import peft
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from inner import SFTConfig
from lm.adapters import save_adapter
from lm.packing import Example
from lora import Adapters


class Baseline:
    def __init__(self, folder, dtype=torch.bfloat16, device="cpu"):
        transformers.logging.set_verbosity_error()
        self.folder, self.device = folder, device
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.to(device)
        self.setup = 0.0  # seconds spent on attaching adapters and building trainers, so far

    def attach(self, adapters: Adapters) -> peft.PeftModel:
        """A PeftModel with every adapter of a population loaded, named "0", "1", ..."""
        start, model = time.perf_counter(), None
        for row in range(len(adapters)):
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(adapters, folder, self.folder, row)
                if model is None:
                    model = peft.PeftModel.from_pretrained(
                        self.model, folder, adapter_name="0", is_trainable=True
                    )
                else:
                    model.load_adapter(folder, adapter_name=str(row))
        self.setup += time.perf_counter() - start
        return model

    def train(
        self, start: Adapters, batches: list[list[Example]], sft: SFTConfig, steps: int = 0
    ) -> list[float]:
        """Train one candidate that begins as `start`, a batch a step. Returns the loss of each
        step.

        `steps`: take only so many, of the len(batches) that the learning rate's schedule is made
        for.
        """
        model = self.attach(start)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=sft.lr, weight_decay=0.0, fused=True)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(batches))
        losses = []
        for batch in batches[: steps or None]:
            ids = pad_sequence([torch.tensor(e.ids) for e in batch], batch_first=True)
            counts = pad_sequence([torch.tensor(e.counts) for e in batch], batch_first=True)
            labels = ids.masked_fill(~counts, -100)
            lengths = torch.tensor([len(e.ids) for e in batch])
            mask = (torch.arange(ids.size(1)) < lengths[:, None]).long()
            ids, mask, labels = (m.to(self.device) for m in (ids, mask, labels))
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, sft.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        model.unload()
        return losses

    def trainer_steps(
        self, start: Adapters, examples: list[Example], sft: SFTConfig, steps: int, pad: int = 2048
    ):
        """`steps` optimiser steps of transformers' Trainer, batch 1, each sequence padded to `pad`
        tokens."""
        rows = []
        for e in examples:
            ids = torch.tensor(e.ids + (0,) * (pad - len(e.ids)))
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": (torch.arange(pad) < len(e.ids)).long(),
                    "labels": ids,
                }
            )
        model = self.attach(start)
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "per_device_train_batch_size": 1,
                "max_steps": steps,
                "learning_rate": sft.lr,
                "use_cpu": True,
            }
            options |= {
                "report_to": [],
                "save_strategy": "no",
                "disable_tqdm": True,
                "logging_strategy": "no",
            }
            args = transformers.TrainingArguments(folder, **options)
            start = time.perf_counter()
            seconds = (
                transformers.Trainer(model, args, train_dataset=rows)
                .train()
                .metrics["train_runtime"]
            )
            self.setup += time.perf_counter() - start - seconds
        model.unload()

    @torch.inference_mode()
    def generate(
        self, prompts, max_new, model=None, copies=1, temperature=0.0, top_p=1.0, ends=None, **more
    ):
        """Continue prompts, padded left, `copies` times each; to exactly max_new tokens unless
        `ends` are given."""
        ids = pad_sequence([torch.tensor(p[::-1]) for p in prompts], batch_first=True).flip(1)
        mask = pad_sequence(
            [torch.ones(len(p), dtype=torch.long) for p in prompts], batch_first=True
        ).flip(1)
        self.model.generation_config.eos_token_id = list(ends) if ends else None
        how = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        out = (model or self.model).generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max_new,
            num_return_sequences=copies,
            pad_token_id=0,
            **how | more,
        )
        return out[:, ids.size(1) :].tolist()
