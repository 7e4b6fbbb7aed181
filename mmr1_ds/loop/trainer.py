"""The training loop: GRPO with variance-aware sampling."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmr1_ds.algorithm.experience import Experience, make_experience
from mmr1_ds.cluster.preemption import Preempted, SamplingAbandoned
from mmr1_ds.config import RunConfig
from mmr1_ds.config.loading import dump_config
from mmr1_ds.curriculum.statistics import score_batch
from mmr1_ds.loop.collector import REFRESH, VALIDATION, RequestMaker
from mmr1_ds.loop.metrics import policy_lag_metrics, reward_metrics, stage_metrics, step_metrics, validation_lengths
from mmr1_ds.loop.parts import Parts
from mmr1_ds.monitoring.clock import StageClock, StageMemory
from mmr1_ds.records import SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts
from mmr1_ds.rollout.base import ServersGone

if TYPE_CHECKING:
    pass


_SAVE_PARTS = 3  # of a checkpoint, for its bar: what was begun ahead, the engines, digests


class Trainer:
    """Drives the parts, step by step. Every method is a collective."""

    def __init__(self, config: RunConfig, parts: Parts, num_steps: int) -> None:
        self._config, self._parts, self._num_steps = config, parts, num_steps
        self.step = 0  # steps done; within a step, its number
        self._num_learned = 0  # steps whose update is done
        self._last_saved: int | None = None  # step of the newest checkpoint
        self._requests = RequestMaker(config.worker.rollout.seed)
        self._memory = StageMemory(parts.ranks.on_gpu)

    def fit(self) -> None:
        """Train from the current step to the last. Raises: ServersGone and Preempted, what was learned saved."""
        self._parts.preemption.begin_training()
        try:
            self._fit()
        except (ServersGone, SamplingAbandoned) as stop:
            self.begin(self._num_learned)
            if self.step > 0:
                self._log(self.save(in_full=False))
            if self._parts.ranks.any(self._parts.preemption.is_asked, "ask whether to end"):
                raise self._preempted() from stop
            raise

    def _fit(self) -> None:
        config = self._config.trainer
        self._sync()
        if config.val_only or (config.val_before_train and self.step == 0):
            self._log(self.validate())
        if config.val_only:
            return
        if self._refresh_due():
            self._log(self._refresh())
        while self.step < self._num_steps:
            self._end_if_asked()
            self.begin(self.step + 1)
            metrics = self.train_step()
            last = self.step == self._num_steps
            try:
                if config.val_freq > 0 and (last or self.step % config.val_freq == 0):
                    metrics |= self.validate()
            finally:
                self._log(metrics)
            if self._refresh_due():
                # A refresh may take longer than a thousand steps: one that is cut off goes on from this checkpoint.
                if config.save_freq > 0:
                    self._log(self.save())
                self._log(self._refresh())
            # After the refresh, so that a resumed run draws by the same weights; after the log, so that a kill
            # in between leaves no step without its line.
            if last or (config.save_freq > 0 and self.step % config.save_freq == 0):
                self._log(self.save())
            self._parts.report.after_step(self.step)
        self._parts.report.finish()
        self._check_saved()

    def _end_if_asked(self) -> None:
        """Raises: Preempted, on every rank, when one was told to end; all is saved."""
        if not self._parts.ranks.any(self._parts.preemption.is_asked, "ask whether to end"):
            return
        if self.step > 0 and self._last_saved != self.step:
            self._log(self.save())
        raise self._preempted()

    def _check_saved(self) -> None:
        """Raises: RuntimeError at the end of a run whose last save failed: it must not look like one that is done."""
        if self._parts.checkpoints.failure:
            raise RuntimeError(f"the run ends unsaved: {self._parts.checkpoints.failure}")

    def _preempted(self) -> Preempted:
        self._check_saved()
        reason = self._parts.preemption.reason or "another rank was told to end"
        where = f"saved in {self._parts.checkpoints.root}" if self.step else "nothing was learned yet"
        return Preempted(f"{reason}: {self.step} of {self._num_steps} steps are done, {where}; start again to go on")

    def train_step(self) -> dict[str, float]:
        """Draw, roll out, score, observe, update, synchronise: one step of the algorithm."""
        clock, parts, start = self._clock(), self._parts, time.perf_counter()
        settings = self._training_settings()
        with self._sampling(then_learns=True):
            batch = parts.batches.make(self.step, settings, clock)
        with clock("draw"):
            parts.batches.begin_ahead(self.step, settings)  # servers sample on while the actor learns
        metrics = parts.rollout.metrics()
        if self._config.worker.rollout.engine == "server":
            groups = [item.group for item in batch.groups]
            metrics |= policy_lag_metrics(groups, parts.actor.num_updates_done, parts.ranks)
        experience, learning = self._update(batch.groups, batch.baselines, clock)
        self._num_learned = self.step
        parts.metrics_logger.record("draws", self.step, {"prompts": batch.prompts.tolist()})
        records = self._record()
        parts.samples.keep(self.step, batch.groups, records.get("observations"))
        with clock("sync"):
            self._sync()
        clock.seconds["step"] = time.perf_counter() - start
        parts.preemption.took(after_sampling=clock.seconds["step"] - clock.seconds.get("gen", 0.0))
        limit = self._config.data.max_prompt_length
        metrics |= step_metrics(batch.groups, experience.trajectories, experience.rewards_B, clock, limit, parts.ranks)
        metrics |= learning  # a critic's returns take the place of the others
        return batch.metrics | metrics | parts.coordinator.metrics()

    def _clock(self) -> StageClock:
        return StageClock(self._parts.ranks.stage, self._memory)

    def _record(self) -> dict[str, dict[str, Any]]:
        """Keep what the curriculum has to say of its last step or refresh. Returns: the same, on rank 0."""
        records = self._parts.coordinator.take_records()
        for name, row in records.items():
            self._parts.metrics_logger.record(name, self.step, row)
        return records

    @contextmanager
    def _sampling(self, then_learns: bool = False) -> Iterator[None]:
        """Inside, the devices are the rollout's, where the run asks for it; after, the actor's.

        then_learns: the actor's weights change before anything more is sampled.
        """
        with self._offloaded():
            try:
                yield
            except (ServersGone, SamplingAbandoned):
                self._parts.rollout.sleep(keep_weights=False)  # nothing more is sampled
                raise
            self._parts.rollout.sleep(keep_weights=not then_learns)  # before the actor's states come back

    def _sync(self) -> None:
        with self._offloaded(with_weights=False):  # room for the rollout's weights beside the actor's
            self._parts.rollout.sync_weights(self._parts.actor)

    @contextmanager
    def _offloaded(self, with_weights: bool = True) -> Iterator[None]:
        """The states of what learns in host memory. with_weights: False = the actor's weights stay, to be read."""
        critic = self._parts.critic
        with self._parts.actor.offloaded(with_weights), nullcontext() if critic is None else critic.offloaded():
            yield

    def _update(
        self, groups: Sequence[ScoredGroup], baselines: Sequence[float] | None, clock: StageClock
    ) -> tuple[Experience, dict[str, float]]:
        actor, critic, reference = self._parts.actor, self._parts.critic, self._parts.reference
        algorithm = self._config.algorithm
        pairs = [(item.group.prompt, tuple(r.token_ids.tolist())) for item in groups for r in item.group.responses]
        penalise = reference is not None and not algorithm.use_kl_loss  # the KL is taken off the reward
        old: list[Tensor] | None = None
        ref: list[Tensor] | None = None
        values: list[Tensor] | None = None
        actor_learns = self.step > self._config.trainer.critic_warmup
        if penalise or (actor_learns and actor.needs_old_log_probs(len(pairs))):
            with clock("old"):
                old = actor.log_probs(pairs)
        if reference is not None and (penalise or actor_learns):
            with clock("ref"):
                ref = reference.log_probs(pairs)
        if critic is not None:
            with clock("values"):
                values = critic.values(pairs)
        with clock("adv"):
            both = (old, ref) if penalise and old is not None and ref is not None else None
            experience = make_experience(groups, algorithm, both, actor.kl, self._parts.ranks, values, baselines)
        metrics = dict(experience.metrics)
        if critic is not None and values is not None and experience.returns is not None:
            with clock("update_critic"):
                metrics |= critic.update(pairs, values, experience.returns)
        if actor_learns:
            with clock("update_actor"):
                metrics |= actor.update(experience.trajectories, old, None if penalise else ref)
        return experience, metrics

    def _refresh_due(self) -> bool:
        return self.step < self._num_steps and self._parts.coordinator.refresh_due(self.step + 1)

    def _refresh(self) -> dict[str, float]:
        """Before the next step: roll the whole data set out and renew the weights (the paper's Algorithm 1).

        What is found is kept after every chunk; a run that was killed meanwhile goes on where it was.
        """
        clock, parts = self._clock(), self._parts
        settings, num_responses = self._training_settings(), self._config.data.curriculum_rollout_n
        title = f"curriculum refresh after step {self.step}"
        key = self._refresh_key()
        with (
            clock("refresh"),
            self._sampling(),
            parts.metrics_logger.progress(len(parts.train_data), title) as advance,
        ):
            advance(parts.coordinator.resume_refresh(self._kept_refresh, key))
            for chunk in parts.coordinator.refresh_chunks():
                if parts.ranks.any(parts.preemption.is_asked, "ask whether to end"):
                    raise SamplingAbandoned
                own = chunk[parts.ranks.rank :: parts.ranks.size]  # interleaved: long prompts often lie together
                requests = self._requests(parts.train_data, own, num_responses, REFRESH, self.step, own)
                groups, _ = parts.collector.collect(requests, settings, StageClock(parts.ranks.stage))
                found = score_batch(groups, parts.encoder.eos_token_ids, self._config.data.curriculum_metrics)
                parts.coordinator.observe_refresh(found)
                parts.coordinator.save_refresh(self._kept_refresh, key)
                advance(len(chunk))
            parts.coordinator.finish_refresh(self.step + 1)
        self._record()
        return stage_metrics(clock, parts.ranks)

    @property
    def _kept_refresh(self) -> Path:
        return self._parts.checkpoints.root / "refresh.safetensors"

    def _refresh_key(self) -> str:
        """What a refresh depends on: another run, another model or other settings do not go on with its findings."""
        rollout, parts = self._config.worker.rollout, self._parts
        settings = (self._training_settings(), rollout.seed, self._config.data, self._config.worker.reward)
        weights = parts.actor.weights_digest()
        return hashlib.sha256(f"{self.step} {parts.train_data.fingerprint} {weights} {settings}".encode()).hexdigest()

    def validate(self) -> dict[str, float]:
        """Rewards on the validation data, as `val/*`."""
        parts, data = self._parts, self._parts.val_data
        if data is None:
            return {}
        clock, sampling = self._clock(), self._config.worker.rollout.val_override_config
        settings = SamplingSettings(
            sampling.temperature, sampling.top_p, sampling.top_k, self._config.data.max_response_length
        )
        chunk = self._config.data.val_batch_size if self._config.data.val_batch_size > 0 else len(data)
        groups: list[ScoredGroup] = []
        failures: list[RewardCounts] = []
        with (
            clock("testing"),
            self._sampling(),
            parts.metrics_logger.progress(len(data), f"validation after step {self.step}") as advance,
        ):
            for start in range(0, len(data), chunk):
                own = range(start, min(start + chunk, len(data)))[parts.ranks.rank :: parts.ranks.size]
                # Step 0 for all: validation at different steps shares its seeds, so that runs compare.
                requests = self._requests(data, own, sampling.n, VALIDATION, 0, own)
                scored, chunk_failures = parts.collector.collect(requests, settings, StageClock(parts.ranks.stage))
                groups += scored
                failures.append(chunk_failures)
                advance(min(start + chunk, len(data)) - start)
        if self._config.trainer.val_generations_to_log > 0:
            self._log_generations(groups)
        metrics = stage_metrics(clock, parts.ranks)
        metrics |= validation_lengths([item.group for item in groups], self._config.data.max_prompt_length, parts.ranks)
        for name, value in reward_metrics([group.rewards for group in groups], failures, parts.ranks).items():
            part = name.removeprefix("reward/")
            metrics[f"val/{part}" if part.startswith("num_") else f"val/{part}_reward"] = value
        return metrics | {"val/reward_score": metrics["val/overall_reward"]}

    def _training_settings(self) -> SamplingSettings:
        rollout = self._config.worker.rollout
        return SamplingSettings(
            rollout.temperature, rollout.top_p, rollout.top_k, self._config.data.max_response_length
        )

    def begin(self, step: int) -> None:
        """Take up `step`: before its work, or after it when a checkpoint of it was loaded. Not a collective."""
        self.step = self._parts.ranks.step = step

    def _log(self, metrics: dict[str, float]) -> None:
        elapsed = {"perf/elapsed_seconds": self._parts.metrics_logger.elapsed_seconds}
        self._parts.metrics_logger.log(self.step, metrics | elapsed)

    def _log_generations(self, groups: Sequence[ScoredGroup]) -> None:
        decode = self._parts.encoder.decode
        rows = [
            {
                "prompt": decode(item.group.prompt.token_ids),
                "response": decode(response.token_ids.tolist()),
                "ground_truth": item.group.prompt.ground_truth,
                "score": float(reward),
            }
            for item in groups[: self._config.trainer.val_generations_to_log]
            for response, reward in zip(item.group.responses[:1], item.rewards.overall[:1], strict=True)
        ]
        self._parts.metrics_logger.generations(self.step, rows)

    def save(self, in_full: bool = True) -> dict[str, float]:
        """Write the checkpoint of this step. When the disk fails it, the run goes on, see `Checkpoints.save`.

        in_full: wait for responses begun ahead and keep them; else the resumed run samples them anew.
        """
        clock, title = self._clock(), f"checkpoint of step {self.step}"
        with (
            clock("save_checkpoint"),
            self._parts.metrics_logger.progress(_SAVE_PARTS, title, with_lines=False) as advance,
        ):
            if in_full:
                self._parts.batches.finish_ahead()
            advance(1)

            def write(folder: Path) -> None:
                self._write(folder, advance)

            saved = self._parts.checkpoints.save(self.step, write, ("curriculum", "rollout"))
            advance(1)
            if saved and self._parts.ranks.rank == 0:
                self._kept_refresh.unlink(missing_ok=True)  # a finished one is in the checkpoint
        metrics = stage_metrics(clock, self._parts.ranks)
        if saved is None:
            return metrics | {"checkpoint/save_failed": 1.0}
        self._last_saved = self.step
        self._parts.preemption.took(to_save=clock.seconds["save_checkpoint"])
        return metrics

    def _write(self, folder: Path, advance: Callable[[int], None]) -> None:
        self._parts.actor.save(folder / "actor")
        if self._parts.critic is not None:
            self._parts.critic.save(folder / "critic")
        advance(1)
        # From here on no collectives: a disk may fail one rank alone.
        self._parts.coordinator.save(folder / "curriculum")
        self._parts.batches.save(folder / "rollout")
        if self._parts.ranks.rank == 0:
            (folder / "config.yaml").write_text(dump_config(self._config), encoding="utf-8")  # for `mmr1-ds export`

    def load(self, step: int, folder: Path) -> None:
        """Go on from a checkpoint of `step`; the coordinator has read its part already. Collective."""
        self._parts.actor.load(folder / "actor")
        if self._parts.critic is not None:
            self._parts.critic.load(folder / "critic")
        if not self._config.trainer.val_only:
            self._parts.batches.load(folder / "rollout", self._training_settings())
        self.begin(step)
        self._num_learned = self._last_saved = step
