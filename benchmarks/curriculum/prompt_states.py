"""The last hidden states of a data set's prompts, by transformers alone, for curriculum_features.py to judge.

    python benchmarks/curriculum/prompt_states.py --config FILE --data FILE --out FILE.npz

The configuration says how prompts are written and which model reads them. The file has prompt_ids (P,), texts (P,),
num_tokens (P,), and of the model's last layer `last` and `mean`, (P, H) float32: the state of the last token, and the
mean over the prompt's tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mmr1_ds.config.loading import load_config
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder

_BATCH_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = load_config([f"config={options.config}", f"data.train_files={options.data}"]).config
    encoder = PromptEncoder(config.worker.actor.model, config.data)
    data = load_dataset(config.data.train_files, config.data, encoder)
    prompts = data.prompts(range(len(data)))
    model = AutoModelForCausalLM.from_pretrained(config.worker.actor.model.model_path, dtype=torch.float32).eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    size = model.config.hidden_size
    last, mean = np.empty((len(prompts), size), np.float32), np.empty((len(prompts), size), np.float32)
    done, told, start = 0, time.monotonic(), time.monotonic()
    while done < len(order):
        longest = len(prompts[order[min(done + 64, len(order)) - 1]].token_ids)
        part = order[done : done + max(1, min(64, _BATCH_TOKENS // longest))]
        ids = [torch.tensor(prompts[i].token_ids) for i in part]
        lengths = torch.tensor([len(one) for one in ids])
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        with torch.no_grad():
            states = model.base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last[part] = states[torch.arange(len(part)), lengths - 1]
        mean[part] = (states * mask[:, :, None]).sum(dim=1) / lengths[:, None]
        done += len(part)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            sys.stdout.write(f"{done} of {len(order)}\n")
            sys.stdout.flush()
    np.savez(
        options.out, prompt_ids=np.array(list(data.prompt_ids)), last=last, mean=mean,
        texts=np.array([encoder.decode(prompt.token_ids) for prompt in prompts]),
        num_tokens=np.array([len(prompt.token_ids) for prompt in prompts]),
    )  # fmt: skip
    sys.stdout.write(f"{len(prompts)} prompts of {np.mean([len(p.token_ids) for p in prompts]):.1f} tokens in "
                     f"{time.monotonic() - start:.0f} s\n")  # fmt: skip


if __name__ == "__main__":
    main()
