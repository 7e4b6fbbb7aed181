"""What both sides of bench_step.py share: the model, the prompts, the reward, and taking turns."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS, RESPONSES, NEW_TOKENS = 8, 8, 64
LONGEST_PROMPT = 192  # tokens
LEARNING_RATE, KL_WEIGHT, TEMPERATURE = 1e-6, 0.04, 1.0
NUM_ROWS = 256
# What recipes for reasoning put after a question.
INSTRUCTION = (
    " Think about it first, between <think> and </think>. Then give the answer, and nothing else, in \\boxed{}."
)
OUR_REWARD_FILE = """from bench_step_sides import reward


def score(reward_inputs):
    return [{"overall": reward(item["response"]), "accuracy": 0.0} for item in reward_inputs]
"""
_POLL_SECONDS = 0.002  # a side that waits costs the other one nothing that could be measured
_OUT_OF_REACH = 10.0  # weight of the hidden state's first feature, which is near 7 at every position


def prepare(folder: Path, instruction: str) -> None:
    """Write a Qwen2 of 0.6 M parameters that cannot end a response, and the prompts.

    instruction: follows each question; a token a character, near enough.

    Every embedding's first feature is 1 and dwarfs the others, so the last hidden state's is the largest part of its
    norm, sqrt(128), everywhere. The end-of-sequence token's row of the output layer is -10 there: its logit is near
    -70, the others are near 0, and no sampler of either side ever draws it. So all responses have NEW_TOKENS tokens
    without a setting or a logits processor that one side has and the other has not.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mmr1_ds.commands.demo.model import END_OF_TURN, PADDING, VOCABULARY, build_tokenizer

    end, padding = VOCABULARY.index(END_OF_TURN), VOCABULARY.index(PADDING)
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
            eos_token_id=end, pad_token_id=padding, tie_word_embeddings=False, dtype="float32",
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[end, 0] = -_OUT_OF_REACH
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, padding
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    sums = [(7 * i, i * i) for i in range(NUM_ROWS)]
    rows = [{"question": f"What is {a} plus {b}?{instruction}", "answer": str(a + b)} for a, b in sums]
    (folder / "reward.py").write_text(OUR_REWARD_FILE, encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prompt_tokens(folder: Path) -> int:
    """Of the middle prompt."""
    from transformers import AutoTokenizer

    rows = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [{"role": "user", "content": json.loads(rows[len(rows) // 2])["question"]}]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def reward(response: str) -> float:
    """Share of capital letters: differs within every group, costs next to nothing."""
    return sum(character.isupper() for character in response) / NEW_TOKENS


class Turns:
    """One side's end of the protocol: it does step k when the file `go` says so, and then writes what it took.

    Files in the side's folder: go (the number of the step that may run), and for each rank a file of JSON lines.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._go, self._done = folder / "go", folder / f"rank{rank}.jsonl"
        self._step = 0

    def begin(self) -> None:
        """Wait for this side's turn."""
        self._step += 1
        while not self._go.exists() or int(self._go.read_text() or 0) < self._step:
            time.sleep(_POLL_SECONDS)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def end(self, stages: dict[str, float], response_lengths: list[int]) -> None:
        """Hand the turn back. stages: seconds; response_lengths: tokens of each response of this rank."""
        line = {
            "step": self._step,
            "seconds": time.perf_counter() - self._start,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "stages": stages,
            "tokens": sum(response_lengths),
            "cut": sum(length != NEW_TOKENS for length in response_lengths),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        with self._done.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class StageTimer:
    """Seconds of the calls it wraps, by name; `take` empties it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        """Replace a method of an object by one that is timed."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self(stage):
                return inner(*arguments, **named)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken


def peak_memory_bytes() -> int:
    """The most this process has had resident, its share of nothing left out (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
