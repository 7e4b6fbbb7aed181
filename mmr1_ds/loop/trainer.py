"""The training loop: GRPO with variance-aware sampling. What each line calls is a room of its own beside this file."""

from __future__ import annotations

from mmr1_ds.loop.parts import Parts

Metrics = dict[str, float]


class Trainer:
    """Drives the parts, step by step. Every method is a collective."""

    def __init__(self, parts: Parts, num_steps: int) -> None:
        """num_steps: of the whole run, those before it was resumed included."""
        self.parts, self.num_steps = parts, num_steps

    @property
    def step(self) -> int:
        """Steps done; within a step, its number."""
        return self.parts.state.step

    def fit(self) -> None:
        """Train from the current step to the last.

        Raises: ServersGone and Preempted, after what was learned was saved; RuntimeError when the last save failed.
        """
        parts, state = self.parts, self.parts.state
        with state.saved_when_interrupted():
            parts.turns.sync_weights()
            state.log(parts.validation.before_training(self.step))
            while self.step < self.num_steps:
                state.end_if_asked()
                state.take_refresh(parts.refresh.run_if_due(self.step))
                state.begin(self.step + 1)
                state.log(self.train_step())
                validated = parts.validation.run_if_due(self.step)
                state.log(validated)
                state.save_if_due(validated)
                parts.report.after_step(self.step)
        parts.report.finish()

    def train_step(self) -> Metrics:
        """Take one step of the algorithm. Returns: its metrics, over all ranks."""
        parts, step = self.parts, self.step
        clock = parts.records.begin_step()
        with parts.turns.rollout(then_learns=True):  # the GPU is vLLM's
            batch = parts.batches.make(step, parts.settings, clock)  # draw, sample, reward, observe
        with clock("draw"):
            parts.batches.begin_ahead(step, parts.settings)  # servers sample on while the actor learns
        judged = parts.learners.judge(step, batch, clock)  # old and reference log-probabilities, values
        experience = parts.learners.experience(batch, judged, clock)  # rewards less the KL, advantages
        learned = parts.learners.update(step, experience, clock)  # the critic if there is one, the actor
        parts.records.keep(step, batch)
        parts.turns.sync_weights(clock)
        return parts.records.end_step(batch, experience, learned, clock)
