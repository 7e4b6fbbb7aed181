"""The coordinator: draws each step's prompts and learns from their responses. The same object on every rank.

The table lives on rank 0; every method marked "Collective" must be called by all ranks in the same order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum import storage
from mmr1_ds.curriculum.estimator import EARLY_PROBING, PROBE_RESPONSES, probe_budget
from mmr1_ds.curriculum.group_sizes import SizeRange
from mmr1_ds.curriculum.history import TableHistory, batch_metrics, observations, size_metrics
from mmr1_ds.curriculum.lengths import ResponseLengths
from mmr1_ds.curriculum.metric_names import check_metrics
from mmr1_ds.curriculum.mixture import MixedSampler, source_metrics
from mmr1_ds.curriculum.online import OnlineTable
from mmr1_ds.curriculum.refresh import Refresh
from mmr1_ds.curriculum.sampler import PromptSampler
from mmr1_ds.curriculum.scores import variance_promotion_score
from mmr1_ds.curriculum.statistics import PromptStatistics, from_records, to_records
from mmr1_ds.curriculum.table import CurriculumTable
from mmr1_ds.errors import UserError

logger = logging.getLogger(__name__)

_REFUSED = -2  # in the header of a load: rank 0 could not use the state
_NEVER = -1
_KIND = "data.curriculum_refresh"


class Control(Protocol):
    """The control traffic between ranks. Both methods are collectives."""

    rank: int
    size: int

    def broadcast_array(self, array: np.ndarray | None, stage: str) -> np.ndarray:
        """Send rank 0's int64 array of one axis to every rank."""

    def all_gather_array(self, array: np.ndarray, stage: str) -> list[np.ndarray]:
        """Collect every rank's array, by rank; first axes may differ."""


class NextGroups(NamedTuple):
    """The prompts of a draw, (B,) int64 each."""

    indices: np.ndarray
    sizes: np.ndarray  # responses to each
    expected_tokens: np.ndarray  # of one response to each; 0 = nothing is known of any prompt yet


@dataclass(frozen=True)
class Position:
    """How far a coordinator is in its draws, see `Coordinator.position`; its size does not depend on P."""

    last_step: int
    num_draws: int
    num_probe_rollouts: int
    drawn: dict[int, list[np.ndarray]]
    observed: list[PromptStatistics]


class Coordinator:
    """Variance-Aware Sampling (arXiv 2509.21268), with a full or an online refresh, or plain shuffling.

    A step, counted from 1:

        if coordinator.refresh_due(step):
            for chunk in coordinator.refresh_chunks():   # after resume_refresh, those that are left
                tokens = coordinator.expected_tokens(chunk)
                coordinator.observe_refresh(statistics of this rank's part of the chunk)
            coordinator.finish_refresh(step)
        indices, sizes, tokens = coordinator.next_groups(step)   # again where online filtering needs more
        probes, tokens = coordinator.next_probes(step)           # none with a full refresh
        coordinator.observe(step, statistics of this rank's groups, probes included)
        coordinator.finish_step(step, the prompts trained on)
        metrics, records = coordinator.metrics(), coordinator.take_records()
    """

    def __init__(
        self,
        data: DataConfig,
        prompt_ids: Sequence[str],
        categories: Sequence[str],
        fingerprint: str,
        num_responses: int,
        num_steps: int,
        control: Control,
        sources: np.ndarray | None = None,
        source_names: Sequence[str] = (),
        features: np.ndarray | None = None,
        sizes: SizeRange | None = None,
    ) -> None:
        """
        Args:
            prompt_ids, categories: (P,), stable across runs.
            fingerprint: of the data set.
            num_responses: N of a training group, or their mean.
            num_steps: of the whole run, over which probes are spread.
            features: (P, D) int8 that the online refresh learns from besides the categories; of rank 0. All 0 where
                they come later, by a checkpoint or by `take_features`.
            sizes: of groups that differ, as the beliefs of the online refresh say; None = each has N.
            sources: (P,), the place of each prompt's source in `source_names`; None = there is one.
        Raises: UserError for a source that data.train_weights gives a share of and that has no prompt left.
        """
        check_metrics(data.curriculum_metrics, data.curriculum_metric_weights)
        self.data, self.control = data, control
        self.num_prompts = len(prompt_ids)
        self.num_responses, self.num_steps = num_responses, num_steps
        self._sizes = sizes
        self.steps_per_epoch = max(1, self.num_prompts // data.rollout_batch_size)  # as the run counts episodes
        self._is_curriculum = data.sampling_strategy == "curriculum"
        self._last_refresh_step = _NEVER
        self._refresh: Refresh | None = None
        self._last_step = 0
        self._num_draws = 0
        # The rest is rank 0's.
        self._sources, self._source_names = sources if self._is_rank_0 else None, source_names
        settings = (
            data.rollout_batch_size, data.seed, data.sampling_strategy, data.curriculum_mixture_ratio,
            data.curriculum_replacement, data.curriculum_draw, data.curriculum_candidates,
        )  # fmt: skip
        if data.train_weights and sources is not None:
            for k, name in enumerate(source_names):
                if not np.any(sources == k):
                    raise UserError(f"data.train_weights: no prompt of {name} is short enough; leave its file out")
        self._sampler: PromptSampler | MixedSampler = PromptSampler(self.num_prompts, *settings)
        if data.train_weights and self._sources is not None:
            self._sampler = MixedSampler(self._sources, data.train_weights, *settings)
        self._table: CurriculumTable | OnlineTable | None = None
        if self._is_rank_0 and self._is_online:
            self._table = OnlineTable(prompt_ids, fingerprint, categories, data, num_responses, features)
        elif self._is_rank_0:
            self._table = CurriculumTable(
                prompt_ids, fingerprint, data.curriculum_weight_floor, data.curriculum_momentum
            )
        self._lengths = ResponseLengths(self.num_prompts if self._is_rank_0 else 0)
        self._num_training_rollouts = 0  # that were trained on
        self._num_probe_rollouts = 0
        self._num_extra_rollouts = 0  # refresh, probes, and what online filtering dropped
        self._batch_metrics: dict[str, float] = {}
        self._history = TableHistory()
        self._records: dict[str, dict[str, Any]] = {}
        # What was drawn for the step underway, and for later ones begun ahead of it; and what came back.
        self._drawn: dict[int, list[np.ndarray]] = {}
        self._observed: list[PromptStatistics] = []
        self._has_kept_ids = False

    @property
    def _is_rank_0(self) -> bool:
        return self.control.rank == 0

    @property
    def _is_online(self) -> bool:
        return self._is_curriculum and self.data.curriculum_refresh == "online"

    @property
    def _is_posterior(self) -> bool:
        return self._is_online and self.data.curriculum_draw == "posterior"

    @property
    def table(self) -> CurriculumTable | OnlineTable:
        """The table; rank 0 only."""
        assert self._table is not None, f"the curriculum table lives on rank 0, asked on rank {self.control.rank}"
        return self._table

    def begin_from(self, indices: np.ndarray, num_right: np.ndarray, num_answers: np.ndarray) -> None:
        """Begin an online refresh from pass rates that were measured before the run; see `known_rates`. Rank 0's."""
        assert isinstance(self.table, OnlineTable) and self._num_draws == 0, "for the beginning of an online refresh"
        self.table.begin_from(indices, num_right, num_answers)

    @property
    def knows_features(self) -> bool:
        """Whether an online refresh has features that tell prompts apart. Rank 0's."""
        assert isinstance(self.table, OnlineTable), "features are an online refresh's"
        return self.table.knows_features

    def take_features(self, features: np.ndarray) -> None:
        """Put features, (P, D) int8, in the place of those that say nothing. Rank 0's; before `begin_from`."""
        assert isinstance(self.table, OnlineTable), "features are an online refresh's"
        self.table.take_features(features)

    # Drawing

    def next_batch(self, step: int) -> np.ndarray:
        """Draw the next prompts of `step` (from 1), (B,) int64; see `next_groups`. Collective."""
        return self.next_groups(step).indices

    def next_groups(self, step: int) -> NextGroups:
        """Draw the next prompts of `step` (from 1), the sizes of their groups, and the expected lengths of responses.

        The second batch of a step continues the walk and draws by the same weights as the first.
        Collective: rank 0 draws, all get the same, in one message.
        """
        self._last_step = step
        self._num_draws += 1
        drawn = None
        if self._is_rank_0:
            indices = self._draw()
            sizes = np.full(len(indices), self.num_responses, dtype=np.int64)
            if self._sizes is not None:
                assert isinstance(self.table, OnlineTable), "sizes follow from beliefs"
                sizes = self.table.group_sizes(indices, self.num_responses, self._sizes)
            drawn = np.concatenate([indices, sizes, self._lengths.expected(indices)])
        shared = self.control.broadcast_array(drawn, f"curriculum/next_batch of step {step}")
        found = NextGroups(*np.split(shared, 3))
        self._drawn.setdefault(step, []).append(found.indices)
        return found

    def _draw(self) -> np.ndarray:
        """Draw the next batch; rank 0 only."""
        if not self._is_posterior:
            return self._sampler.draw(self._num_draws, self.table.sampling_weights)
        assert isinstance(self.table, OnlineTable)
        scores = self.table.sampled_scores(self._sampler.noise(self._num_draws))
        unseen_steps = self.table.unseen_steps()
        for underway in self._drawn.values():  # nothing is known of these yet; they would be the best again
            for indices in underway:
                scores[indices], unseen_steps[indices] = -np.inf, 0
        return self._sampler.draw(self._num_draws, scores, unseen_steps)

    @property
    def num_probe_responses(self) -> int:
        """How many responses a probe asks for."""
        return PROBE_RESPONSES

    def next_probes(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts to roll out beside the batch of `step`, only to be observed, (K,) int64. Collective.

        Returns: them, and the expected tokens of a response to each, as `next_groups`.
        Over the run they take `curriculum_probe_fraction` of the training rollouts; see `probe_budget`. Call it after
        `next_batch`: prompts of steps underway are left out.
        """
        training = self.data.rollout_batch_size * self.num_responses
        if not self._is_online or self.data.curriculum_probe_fraction == 0.0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        shared = None
        if self._is_rank_0:
            allowed = probe_budget(
                step, self.num_steps, self.num_prompts, self.data.rollout_batch_size, self.num_responses,
                self.data.curriculum_probe_fraction,
            )  # fmt: skip
            # A run resumed with more steps or another fraction must not spend in one step what it saved before.
            highest = math.ceil(EARLY_PROBING * self.data.curriculum_probe_fraction * training / PROBE_RESPONSES)
            num_probes = min(int(allowed - self._num_probe_rollouts) // PROBE_RESPONSES, highest)
            drawn = [indices for draws in self._drawn.values() for indices in draws]
            probes = self.table.probes(num_probes, exclude=np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
            self._num_probe_rollouts += len(probes) * PROBE_RESPONSES
            shared = np.concatenate([probes, self._lengths.expected(probes)])
        probes, tokens = np.split(self.control.broadcast_array(shared, f"curriculum/next_probes of step {step}"), 2)
        return probes, tokens

    def expected_tokens(self, indices: np.ndarray) -> np.ndarray:
        """The expected tokens of a response to prompts of a refresh, (K,) int64, as `next_groups`. Collective."""
        tokens = self._lengths.expected(indices) if self._is_rank_0 else None
        return self.control.broadcast_array(tokens, "curriculum/expected_tokens")

    def observe(self, step: int, statistics: Sequence[PromptStatistics]) -> None:
        """Take in this rank's groups, probes included. Collective: all-gathers them to rank 0."""
        observed = self._gather(statistics, f"curriculum/observe of step {step}")
        if self._is_rank_0:
            self._observed += observed

    def position(self) -> Position:
        """What drawing and observing change before `finish_step`, for `go_back`. Not a collective."""
        return Position(
            self._last_step, self._num_draws, self._num_probe_rollouts,
            {step: list(draws) for step, draws in self._drawn.items()}, list(self._observed),
        )  # fmt: skip

    def go_back(self, position: Position) -> None:
        """Forget what was drawn and observed since `position`; no step was finished since. On every rank alike."""
        self._last_step, self._num_draws = position.last_step, position.num_draws
        self._num_probe_rollouts = position.num_probe_rollouts
        self._drawn, self._observed = position.drawn, position.observed

    def finish_step(self, step: int, trained: np.ndarray) -> None:
        """Learn from what the step observed; the next step draws by it. Not a collective.

        Args: trained: prompts of the groups that the step trains on, (B,), repeats counted.
        """
        self._drawn = {later: draws for later, draws in self._drawn.items() if later > step}
        observed, self._observed = self._observed, []
        if not self._is_rank_0:
            return
        num_training = self.data.rollout_batch_size * self.num_responses
        self._num_training_rollouts += num_training
        self._num_extra_rollouts += sum(prompt.num_responses for prompt in observed) - num_training
        predicted = self.table.predicted_pass_rates(np.array([prompt.index for prompt in observed], dtype=np.int64))
        self._batch_metrics = batch_metrics(observed, predicted)
        if self._sizes is not None:
            self._batch_metrics |= size_metrics(observed)
        if self._sources is not None and len(self._source_names) > 1:
            self._batch_metrics |= source_metrics(observed, self._sources, self._source_names)
        self._records["observations"] = observations(observed, predicted)
        self.table.finish_step(step, observed, trained)
        self._lengths.observe(observed)
        _ = self.table.sampling_weights  # computed here, in the time of this stage, and not with the metrics
        if self._is_online and step % self._renewal_steps == 0:
            self._record_table("online")

    def _gather(self, statistics: Sequence[PromptStatistics], stage: str) -> list[PromptStatistics]:
        return from_records(np.concatenate(self.control.all_gather_array(to_records(statistics), stage)))

    # Refreshing

    def refresh_due(self, step: int) -> bool:
        """Say whether to refresh before `step`: before the first, then every T steps; T = 0 = an epoch of P // B steps.

        The same on every rank, without communication.
        """
        if not self._is_curriculum or self._is_online:
            return False
        return self._last_refresh_step == _NEVER or step - self._last_refresh_step >= self._renewal_steps

    @property
    def _renewal_steps(self) -> int:
        """Steps between refreshes; online, between looks at the table."""
        return self.data.curriculum_update_freq or self.steps_per_epoch

    def refresh_chunks(self) -> Iterator[np.ndarray]:
        """Yield the prompts to sample, a chunk over all ranks at a time, int64; those done before a kill are left out.

        The same on every rank. Call `observe_refresh` for each chunk, then `finish_refresh`.
        """
        self._refresh = self._refresh or Refresh(self.num_prompts, self._is_rank_0)
        return self._refresh.chunks(self.data.curriculum_rollout_batch_size)

    def observe_refresh(self, statistics: Sequence[PromptStatistics]) -> None:
        """Take in this rank's part of a chunk. Collective.

        The parts of all ranks make up the chunk; a prompt that several of them hold counts once, by the lowest rank.
        """
        refresh = self._refresh
        assert refresh is not None, "observe_refresh outside a refresh: call refresh_chunks first"
        for prompt in self._gather(statistics, "curriculum/observe_refresh"):
            self._num_extra_rollouts += prompt.num_responses
            if refresh.done[prompt.index]:
                continue
            refresh.done[prompt.index] = True
            if not self._is_rank_0:
                continue
            refresh.scores[prompt.index] = variance_promotion_score(
                prompt, self.data.curriculum_metrics, self.data.curriculum_metric_weights
            )
            refresh.pass_rates[prompt.index] = prompt.pass_rate
            refresh.num_responses[prompt.index] = prompt.num_responses
            refresh.num_tokens[prompt.index] = prompt.num_tokens

    def save_refresh(self, path: Path, key: str) -> None:
        """Write what the refresh underway has found so far to a file of its own. Rank 0 writes, the others return.

        If the disk fails, nothing is lost unless the run is killed.
        """
        if self._is_rank_0 and self._refresh is not None:
            self._refresh.save_if_possible(path, key)

    def resume_refresh(self, path: Path, key: str) -> int:
        """Resume the refresh that `save_refresh` left under the same key, unless one is underway. Collective.

        Rank 0 reads. Returns: number of prompts that are done.
        """
        if self._refresh is None:
            self._refresh = Refresh(self.num_prompts, self._is_rank_0)
            if self._is_rank_0 and self._refresh.resume(path, key):
                self._num_extra_rollouts += int(self._refresh.num_responses.sum())
            self._share_done("curriculum/resume_refresh")
            if self._refresh.done.any():
                logger.info(
                    "resuming the refresh: %d of %d prompts are done", self._refresh.done.sum(), self.num_prompts
                )
        return int(np.count_nonzero(self._refresh.done))

    def _share_done(self, stage: str) -> None:
        """Share with every rank which prompts of the refresh are done, as rank 0 knows. Collective."""
        assert self._refresh is not None
        done = self.control.broadcast_array(np.flatnonzero(self._refresh.done) if self._is_rank_0 else None, stage)
        self._refresh.done[done] = True

    def finish_refresh(self, step: int) -> None:
        """Replace the weights by what the refresh before `step` found, with momentum."""
        refresh = self._refresh
        assert refresh is not None, "finish_refresh outside a refresh: call refresh_chunks first"
        assert refresh.done.all(), f"refresh at step {step} has {np.count_nonzero(~refresh.done)} prompts left"
        if self._is_rank_0:
            assert isinstance(self.table, CurriculumTable)
            self.table.replace_scores(refresh.scores, refresh.pass_rates, refresh.num_responses)
            self._lengths.observe_counts(np.arange(self.num_prompts), refresh.num_tokens, refresh.num_responses)
            self._record_table("full")
        self._last_refresh_step = step
        self._refresh = None

    # Reporting

    def metrics(self) -> dict[str, float]:
        """The step's `curriculum/*` metrics on rank 0, nothing elsewhere.

        Weights are those that prompts are drawn by, floor included. `effective_group_fraction` and `log_loss`
        describe the last observed batch. `log_loss` is in nats a rollout, `random_position` in prompts of the epoch.
        """
        if not self._is_rank_0:
            return {}
        weights = self.table.sampling_weights
        metrics = {
            "curriculum/mean_weight": float(weights.mean(dtype=np.float64)),
            "curriculum/std_weight": float(weights.std(dtype=np.float64)),
            "curriculum/min_weight": float(weights.min()),
            "curriculum/max_weight": float(weights.max()),
            "curriculum/consumed_batches": float(self._num_draws),
            "curriculum/random_position": float(self._sampler.random_position(self._num_draws)),
        }
        metrics["perf/num_rollouts"] = float(self._num_training_rollouts + self._num_extra_rollouts)
        if self._num_training_rollouts:
            metrics["curriculum/extra_rollout_fraction"] = self._num_extra_rollouts / self._num_training_rollouts
        return metrics | self.table.metrics() | self._batch_metrics

    def take_records(self) -> dict[str, dict[str, Any]]:
        """What is worth keeping of the last step or refresh, by its name in `writers.RECORDS`. Rank 0 has it, once."""
        records, self._records = self._records, {}
        return records

    def _record_table(self, kind: str) -> None:
        looks = self._history.look(self.table.sampling_weights, self.table.known_pass_rates())
        self._records["curriculum"] = {"kind": kind, **looks}

    # Saving

    def _state(self) -> dict[str, Any]:
        """Collect everything a resume needs but the prompt ids: numbers, and dictionaries of arrays, no copies."""
        return {
            "fingerprint": self.table.fingerprint,
            "settings": self._settings(),
            "last_step": self._last_step,
            "last_refresh_step": self._last_refresh_step,
            "num_draws": self._num_draws,
            "num_training_rollouts": self._num_training_rollouts,
            "num_extra_rollouts": self._num_extra_rollouts,
            "num_probe_rollouts": self._num_probe_rollouts,
            # Of steps begun ahead: their prompts are no probes of later steps, in a resumed run neither.
            "drawn": {str(step): np.concatenate(draws).tolist() for step, draws in self._drawn.items()},
            "numbers": self.table.numbers() | self._lengths.numbers(),
            "table": self.table.columns() | self._lengths.arrays(),
            "refresh": self._refresh.state_dict() if self._refresh is not None else {},
            "history": self._history.arrays(),
        }

    def save(self, folder: Path, kept_ids: Path | None = None) -> None:
        """Write the state as safetensors and JSON files into an existing folder. Rank 0 writes, the others return.

        Safe at any moment, in the middle of a refresh too; any number of ranks may resume from it.
        Args: kept_ids: a file on the same file system, to which the prompt ids are written the first time, and which
            is linked to later; None = they are written each time.
        """
        if not self._is_rank_0:
            return
        storage.write_state(self._state(), folder)
        if kept_ids is None:
            storage.write_prompt_ids(self.table.prompt_ids, folder)
            return
        if not self._has_kept_ids or not kept_ids.is_file():
            storage.keep_prompt_ids(self.table.prompt_ids, kept_ids)
            self._has_kept_ids = True
        storage.link_prompt_ids(kept_ids, folder)

    def load(self, folder: Path) -> None:
        """Resume from what `save` wrote; rank 0 reads. Collective.

        Raises: UserError, on every rank, when the state belongs to another data set.
        """
        header = np.array([_REFUSED, 0, 0, 0], dtype=np.int64)
        try:
            if self._is_rank_0:
                header = self._take_over(storage.read_state(folder))
        finally:
            # Also when rank 0 raises: the others wait here, and must hear of it.
            shared = self.control.broadcast_array(header if self._is_rank_0 else None, "curriculum/load")
        if shared[0] == _REFUSED:
            raise UserError("rank 0 could not use the checkpoint's curriculum; its message says why")
        self._last_refresh_step, self._last_step, self._num_draws = (int(number) for number in shared[:3])
        if not shared[3]:
            self._refresh = None
            return
        if not self._is_rank_0:
            self._refresh = Refresh(self.num_prompts, keeps_scores=False)
        self._share_done("curriculum/load of a refresh underway")

    def _take_over(self, state: Mapping[str, Any]) -> np.ndarray:
        """Fill rank 0 from the state. Returns: what every rank needs of it, as int64."""
        saved, refresh = state["settings"][_KIND], self._settings()[_KIND]
        if saved != refresh:
            raise UserError(
                f"the checkpoint's curriculum was kept with a refresh of kind {saved}, the run asks for {refresh}: "
                f"keep data.curriculum_refresh and data.sampling_strategy, or set trainer.resume=false"
            )
        positions = self.table.load(state["table"], state["numbers"], state["fingerprint"])
        self._lengths.load(state["table"], state["numbers"], positions)
        # Earlier versions had no other draw, and groups of one size.
        of_before = {"data.curriculum_draw": "proportional", "worker.rollout.n_min": None, "worker.rollout.n_max": None}
        settings = of_before | state["settings"]
        changed = {name: (old, self._settings().get(name)) for name, old in settings.items()}
        changed = {name: (old, new) for name, (old, new) in changed.items() if old != new}
        if changed:
            listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            logger.warning("the checkpoint drew with other settings (%s): draws differ from an unbroken run's", listed)
        if state["refresh"]:
            self._refresh = Refresh(self.num_prompts, self._is_rank_0)
            self._refresh.load_state_dict(state["refresh"], positions)
        self._num_training_rollouts = state["num_training_rollouts"]
        self._num_extra_rollouts = state["num_extra_rollouts"]
        self._num_probe_rollouts = state["num_probe_rollouts"]
        drawn = state.get("drawn", {})  # earlier versions did not keep it
        self._drawn = {int(step): [np.array(indices, dtype=np.int64)] for step, indices in drawn.items()}
        self._batch_metrics, self._records = {}, {}
        self._history.load(state.get("history", {}), positions)
        header = [state["last_refresh_step"], state["last_step"], state["num_draws"], bool(state["refresh"])]
        return np.array(header, dtype=np.int64)

    def _settings(self) -> dict[str, Any]:
        """The settings that a draw depends on, besides the table."""
        return {
            _KIND: "online" if self._is_online else "full",
            "data.seed": self.data.seed,
            "data.rollout_batch_size": self.data.rollout_batch_size,
            "data.sampling_strategy": self.data.sampling_strategy,
            **({"data.train_weights": list(self.data.train_weights)} if self.data.train_weights else {}),
            "data.curriculum_mixture_ratio": self.data.curriculum_mixture_ratio,
            "data.curriculum_replacement": self.data.curriculum_replacement,
            "data.curriculum_draw": self.data.curriculum_draw,
            "data.curriculum_candidates": self.data.curriculum_candidates,
            "data.curriculum_metrics": list(self.data.curriculum_metrics),
            "data.curriculum_metric_weights": list(self.data.curriculum_metric_weights),
            "data.curriculum_weight_floor": self.data.curriculum_weight_floor,
            "data.curriculum_probe_fraction": self.data.curriculum_probe_fraction if self._is_online else 0.0,
            **({"data.curriculum_features": self.data.curriculum_features} if self._is_online else {}),
            "steps of the run": self.num_steps if self._is_online else 0,
            "worker.rollout.n": self.num_responses,
            "worker.rollout.n_min": None if self._sizes is None else self._sizes.smallest,
            "worker.rollout.n_max": None if self._sizes is None else self._sizes.largest,
        }
