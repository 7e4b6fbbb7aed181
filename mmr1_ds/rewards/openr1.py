"""The built-in rewards `openr1`, `openr1_vllm` (a language model as judge) and `openr1_wo_LMM` (rules alone).

overall = accuracy + format + cosine_len + repetition_penalty, upstream's weights and key names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmr1_ds.rewards.answers import answers_equal
from mmr1_ds.rewards.judge import Judge
from mmr1_ds.rewards.shaping import cosine_length, repetition_penalty
from mmr1_ds.rewards.tagged import tag_format, tagged_answer, with_opening
from mmr1_ds.rewards.truths import read_truth


class OpenR1Reward:
    """A reward by rules first; an answer that the rules refuse is put to the judge where there is one."""

    def __init__(self, cosine_values: Mapping[str, float], max_length: int, judge: Judge | None) -> None:
        """Take the settings. Args: cosine_values: the four of `cos_len_reward_config`; max_length: tokens."""
        self._cosine_values, self._max_length, self._judge = cosine_values, max_length, judge

    def compute_score(self, reward_inputs: list[dict[str, Any]]) -> list[dict[str, float]]:
        """Score responses. Items have `response`, `response_length` (tokens), `ground_truth`, `prompt`.

        Raises: Unscored when the judge was needed and did not answer.
        """
        return [self._score(item) for item in reward_inputs]

    def _score(self, item: Mapping[str, Any]) -> dict[str, float]:
        response = item["response"]
        whole = with_opening(response, item.get("prompt", ""))
        accuracy = self._accuracy(item, whole)
        length = cosine_length(accuracy == 1.0, item["response_length"], self._cosine_values, self._max_length)
        parts = {
            "accuracy": accuracy,
            "format": tag_format(whole),
            "cosine_len": length,
            "repetition_penalty": repetition_penalty(response),
        }
        return {"overall": sum(parts.values()), **parts}

    def _accuracy(self, item: Mapping[str, Any], response: str) -> float:
        answer = tagged_answer(response)
        if answer is None:
            return 0.0  # no committed answer: nothing to ask about
        if answers_equal(answer, item["ground_truth"]):
            return 1.0
        if self._judge is None:
            return 0.0
        return 1.0 if self._judge.accepts(item.get("prompt", ""), answer, read_truth(item["ground_truth"])) else 0.0
