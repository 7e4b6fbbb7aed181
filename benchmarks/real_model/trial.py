"""One training of the experiment: the program's own loop, until a budget is spent, with a rival's draws if asked for.

    python benchmarks/real_model/trial.py own|RIVAL BUDGET VALIDATE_EVERY config=FILE [key=value ...]

own: the draws are those that the config asks for. RIVAL: those of this name in curriculum_lab_rivals, which take the
place of whatever the config asks for. BUDGET counts every sampled response but those of validations, which happen
every VALIDATE_EVERY steps. Other settings as for `mmr1-ds train`. One rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "curriculum"))

from curriculum_rival_draws import RivalDraws

from mmr1_ds import train
from mmr1_ds.loop import composition
from mmr1_ds.loop.trainer import Metrics, Trainer


class Budgeted(Trainer):
    """Ends with the first validation at or after the end of its budget."""

    budget = validate_every = 0

    def train_step(self) -> Metrics:
        """See Trainer."""
        metrics = super().train_step()
        if metrics["perf/num_rollouts"] >= self.budget and self.step % self.validate_every == 0:
            self.num_steps = self.step
        return metrics


if __name__ == "__main__":
    if sys.argv[1] != "own":
        RivalDraws.rival = sys.argv[1]
        composition.Coordinator = RivalDraws  # type: ignore[misc]
    Budgeted.budget, Budgeted.validate_every = int(sys.argv[2]), int(sys.argv[3])
    composition.Trainer = Budgeted  # type: ignore[misc]
    raise SystemExit(train.main([*sys.argv[4:], f"trainer.val_freq={sys.argv[3]}"]))
