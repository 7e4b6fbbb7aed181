"""Answers to the validation data, and what they were worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.cluster.agreement import by_rank_0
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig, TrainerConfig, ValidationSampling
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.loop.collector import VALIDATION, Collector, RequestMaker
from mmr1_ds.loop.metrics import reward_metrics, validation_lengths
from mmr1_ds.loop.shared_queue import SharedQueue, unread
from mmr1_ds.loop.sharing import with_prompt
from mmr1_ds.loop.step_records import StepRecords
from mmr1_ds.loop.turns import Turns
from mmr1_ds.loop.validation_metrics import Answered, part_name, validation_metrics
from mmr1_ds.monitoring.answers import AnswerLog
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.monitoring.pass_rates import PassRates
from mmr1_ds.records import SamplingSettings, ScoredGroup
from mmr1_ds.rewards.answers import final_answer
from mmr1_ds.rewards.scoring import RewardCounts

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder


logger = logging.getLogger(__name__)

_GATHERED = 64  # prompts of a rank whose texts are sent at once
_KEPT = 256  # prompts at most between two additions to a table of pass rates


@dataclass(kw_only=True, eq=False)
class Validation:
    """Samples and rewards answers to the validation data where that is due."""

    val_data: PromptDataset | None  # None = there is nothing to validate on, and every method returns no metrics
    sampling: ValidationSampling
    data: DataConfig
    trainer: TrainerConfig
    seed: int  # of the rollouts
    num_steps: int  # after the last of which a validation is due as well
    policy: str  # the model's name, for a table of pass rates
    collector: Collector
    encoder: PromptEncoder
    turns: Turns
    records: StepRecords
    metrics_logger: MetricsLogger
    answer_log: AnswerLog
    ranks: Ranks
    # Of the validation data, from which the ranks take the requests of all; None = each samples its own.
    queue: SharedQueue | None = None

    def before_training(self, step: int) -> dict[str, float]:
        """Validate a run that begins now, or that only validates. Collective. Returns: as `run`, or no metrics."""
        return self.run(step) if self.trainer.val_only or (self.trainer.val_before_train and step == 0) else {}

    def run_if_due(self, step: int) -> dict[str, float]:
        """Validate after `step` where `trainer.val_freq` says so. Collective. Returns: as `run`, or no metrics."""
        every = self.trainer.val_freq
        return self.run(step) if every > 0 and (step == self.num_steps or step % every == 0) else {}

    def run(self, step: int) -> dict[str, float]:
        """Validate after `step` steps. Collective. Returns: metrics `val/*`, of all ranks."""
        data, ranks, sampling = self.val_data, self.ranks, self.sampling
        if data is None:
            return {}
        table, known = self._open_table(step)
        left = [i for i, name in enumerate(data.prompt_ids) if name not in known] if known else [*range(len(data))]
        clock = self.records.clock()
        groups: list[ScoredGroup] = []
        failures: list[RewardCounts] = []
        answered: list[Answered] = []
        with (
            clock("testing"),
            self.turns.rollout(),
            self.answer_log.of_step(step, continued=bool(known)) as log,
            self.metrics_logger.progress(len(left) * sampling.n, f"validation after step {step}, answers") as advance,
        ):
            for scored, counts in self._sample(data, left, _of_all_ranks(advance, ranks.size, len(left) * sampling.n)):
                groups += scored
                failures.append(counts)
                for pairs in self._gathered(data, scored):
                    answered += [one for one, _ in pairs]
                    log([row for _, rows in pairs for row in rows])
                    if table is not None:
                        table.add([_rate(one, rows[0]) for one, rows in pairs])
        if table is not None:
            logger.info("%s", table.histogram())
        if known:  # the figures of the rest alone would be taken for those of the whole
            return {}
        self._log_generations(step, groups[: self.trainer.val_generations_to_log])
        metrics = self.records.stages(clock)
        metrics |= validation_lengths([item.group for item in groups], self.data.max_prompt_length, ranks)
        for name, value in reward_metrics([group.rewards for group in groups], failures, ranks).items():
            part = name.removeprefix("reward/")
            metrics[f"val/{part}" if part.startswith("num_") else f"val/{part}_reward"] = value
        metrics |= validation_metrics(answered, sampling.n)
        return metrics | {"val/reward_score": metrics["val/overall_reward"]}

    def _open_table(self, step: int) -> tuple[PassRates | None, frozenset[str]]:
        """Open the table of pass rates, where there is one. Collective. Returns: it on rank 0, and its prompts."""
        if self.trainer.pass_rates is None or not self.trainer.val_only:
            return None, frozenset()
        path, table = Path(self.trainer.pass_rates), None
        chosen = {name: value for name, value in asdict(self.sampling).items() if name != "n"}
        policy = f"{self.policy} after {step} steps, {', '.join(f'{name} {value}' for name, value in chosen.items())}"

        def open_table() -> frozenset[str]:
            nonlocal table
            table = PassRates(path, policy, self.sampling.n)
            return table.prompt_ids

        found = by_rank_0(self.ranks, "read the pass rates", open_table)
        if found:
            logger.info("%s has %d prompts already", self.trainer.pass_rates, len(found))
        return table, found

    def _sample(
        self, data: PromptDataset, indices: Sequence[int], advance: Callable[[int], None]
    ) -> Iterator[tuple[list[ScoredGroup], RewardCounts]]:
        """Yield this rank's scored groups, call by call. Collective."""
        ranks, sampling = self.ranks, self.sampling
        most_tokens = sampling.max_tokens or self.data.max_response_length
        settings = SamplingSettings(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            most_tokens,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            stop=tuple(sampling.stop or ()),
        )
        chunk = self.data.val_batch_size if self.data.val_batch_size > 0 else len(indices)
        if self.trainer.pass_rates is not None:
            chunk = max(1, min(chunk, _KEPT))
        for start in range(0, len(indices), chunk):
            own = indices[start : start + chunk][ranks.rank :: ranks.size]
            # Step 0 for all: validation at different steps shares its seeds, so that runs compare.
            requests = RequestMaker(self.seed)(unread(data, self.queue), own, sampling.n, VALIDATION, 0, own)
            scored, counts = self.collector.collect(requests, settings, StageClock(ranks.stage), advance, self.queue)
            yield [with_prompt(item, data) for item in scored], counts

    def _gathered(
        self, data: PromptDataset, scored: Sequence[ScoredGroup]
    ) -> Iterator[list[tuple[Answered, list[dict[str, Any]]]]]:
        """Yield what all ranks have, a few prompts at a time, in the order of the data. Collective."""
        ranks = self.ranks
        most = max(ranks.all_gather_objects(len(scored), "count the answers"))
        for first in range(0, most, _GATHERED):
            own = [self._answers(data, item) for item in scored[first : first + _GATHERED]]
            everyone = ranks.all_gather_objects(own, "gather answers")
            yield sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0].index)

    def _answers(self, data: PromptDataset, item: ScoredGroup) -> tuple[Answered, list[dict[str, Any]]]:
        """Return what the answers to one prompt were worth, and a row for each."""
        prompt, rewards = item.group.prompt, item.rewards
        texts = [self.encoder.decode(response.token_ids.tolist()) for response in item.group.responses]
        file = data.source_name(prompt.index)
        parts = [prompt.category] + ([file] if len(data.source_names) > 1 else [])
        overall = np.where(rewards.is_unknown, np.nan, rewards.overall).astype(np.float32)
        answered = Answered(
            prompt.index,
            prompt.prompt_id,
            tuple(dict.fromkeys(name for part in parts if (name := part_name(part)))),
            overall,
            rewards.accuracy,
            tuple(map(final_answer, texts)),
        )
        rows = [
            {
                "prompt_id": prompt.prompt_id,
                "category": prompt.category,
                "file": file,
                "answer": k,
                "response": text,
                "ground_truth": prompt.ground_truth,
                "reward": _number(overall[k]),
                "accuracy": _number(rewards.accuracy[k]),
                "num_tokens": len(response.token_ids),
                "finished": response.finished,
            }
            for k, (text, response) in enumerate(zip(texts, item.group.responses, strict=True))
        ]
        return answered, rows

    def _log_generations(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        decode = self.encoder.decode
        rows = [
            {
                "prompt": decode(item.group.prompt.token_ids),
                "response": decode(response.token_ids.tolist()),
                "ground_truth": item.group.prompt.ground_truth,
                "score": float(reward),
            }
            for item in groups
            for response, reward in zip(item.group.responses[:1], item.rewards.overall[:1], strict=True)
        ]
        self.metrics_logger.generations(step, rows)


def _rate(answered: Answered, row: Mapping[str, Any]) -> dict[str, Any]:
    known = answered.known
    return {
        "prompt_id": answered.prompt_id,
        "pass_rate": float(known.mean(dtype=np.float64)) if len(known) else None,
        "num_answers": len(known),
        "category": row["category"],
        "file": row["file"],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _of_all_ranks(advance: Callable[[int], None], num_ranks: int, total: int) -> Callable[[int], None]:
    """Count for all ranks, up to `total`, what this one has done: they sample side by side."""
    done = 0

    def counted(count: int) -> None:
        nonlocal done
        before, done = min(done, total), done + count * num_ranks
        advance(min(done, total) - before)

    return counted
