"""Whole runs of tiny models of every newer kind: ZeRO-3 and vLLM on two ranks, on one, and stopped and resumed."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from fixtures.launching import run_ranks
from fixtures.tiny_models import save_text_model, save_vision_model
from fixtures.tiny_run import NUM_PROMPTS, assert_same_run, write_run
from fixtures.videos import write_video
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

NUM_STEPS = 4  # the last samples from what the third update and sync left
# In the third step or later, where a file asks for it, the rank of this process is told to stop, as a job manager does.
STOPS = """
import os
import signal
from pathlib import Path

ASKED = Path(__file__).with_name("stop")
_score = score


def score(reward_inputs):
    done = ASKED.parent / "stopped" / "metrics.jsonl"
    if ASKED.exists() and done.exists() and done.read_text().count("\\n") >= 2:
        ASKED.unlink(missing_ok=True)
        os.kill(os.getppid(), signal.SIGTERM)
    return _score(reward_inputs)
"""


@dataclass(frozen=True)
class Kind:
    """A family, and what is in its prompts."""

    family: str
    images: bool = False
    videos: bool = False

    @property
    def program(self) -> str:
        return "train_with_delta_nets.py" if self.family.startswith("qwen3_5") else "train.py"


KINDS = {
    "qwen3_5_text": Kind("qwen3_5_text"),
    "qwen3_5": Kind("qwen3_5", images=True),
    "qwen3_moe": Kind("qwen3_moe"),
    "qwen3_vl_moe": Kind("qwen3_vl_moe", images=True),
    "qwen3_5_moe": Kind("qwen3_5_moe", images=True),
    "qwen2_5_vl": Kind("qwen2_5_vl", videos=True),
    "qwen3_vl": Kind("qwen3_vl", videos=True),
}


def write_rows(folder: Path, kind: Kind) -> None:
    """Every third prompt is text alone; a prompt has up to two images and up to two videos, of different sizes."""
    rows = []
    for i in range(NUM_PROMPTS):
        row = {"prompt": f"what is {i}?", "answer": str(i), "images": [], "videos": []}
        for number in range(i % 3 if kind.images else 0):
            noise = np.random.default_rng(i).integers(0, 256, (32 * (1 + number), 32 * (1 + i % 2), 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}_{number}.png")
            row["images"].append(f"{i}_{number}.png")
        for number in range(i % 3 if kind.videos else 0):
            name = f"{i}_{number}.mp4"
            row["videos"].append(write_video(folder / name, num_frames=5 + i + 3 * number, width=64 + 16 * number))
        markers = "<image>" * len(row["images"]) + "<video>" * len(row["videos"])
        rows.append(row | {"prompt": markers + row["prompt"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_family_run(folder: Path, kind: Kind) -> Path:
    """Returns: the config, for two ranks."""
    path = write_run(folder, NUM_STEPS)
    is_vision = kind.images or kind.videos
    (save_vision_model if is_vision else save_text_model)(folder / "model", family=kind.family)
    reward = folder / "reward.py"
    reward.write_text(reward.read_text() + STOPS)
    config = yaml.safe_load(path.read_text())
    if is_vision:
        write_rows(folder, kind)
        config["data"] |= {"min_pixels": 784, "max_pixels": 12544, "video_max_frames": 6, "video_max_pixels": 6272}
    config["data"] |= {"max_prompt_length": 224, "max_response_length": 12}
    config["worker"]["rollout"] |= {"engine": "vllm", "kv_cache_gb": 1, "enforce_eager": True}
    config["trainer"]["rollout_log"] = "parquet"
    path.write_text(yaml.safe_dump(config))
    return path


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def responses_of(run_dir: Path, step: int) -> list[tuple[int, str]]:
    table = pandas.read_parquet(run_dir / "rollouts" / f"step_{step:06d}.parquet")
    return sorted(zip(table["index"].tolist(), table["response"].tolist(), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_run_samples_from_its_actor_whatever_the_ranks_and_goes_on_where_it_was_stopped(tmp_path, name):
    kind = KINDS[name]
    config = write_family_run(tmp_path, kind)

    def train(run: str, *settings: str, num_ranks: int = 2, exit_code: int = 0) -> Path:
        run_dir = tmp_path / run
        arguments = [f"config={config}", f"trainer.run_dir={run_dir}", *settings]
        run_ranks(kind.program, *arguments, num_ranks=num_ranks, exit_code=exit_code)
        return run_dir

    whole = train("whole")
    steps = steps_of(whole)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step["rollout/logprob_diff_max"] < 1e-4
        assert step["actor/grad_norm"] > 0.01  # else the sync had nothing to move

    # A rank alone samples the same and learns the same. Its sums have another order: in float32 that was up to 5e-7 of
    # a loss and 4e-6 of a gradient's norm, too little for a token to fall the other way.
    alone = train("alone", "trainer.n_gpus_per_node=1", "trainer.save_freq=-1", num_ranks=1)
    for one, other in zip(steps, steps_of(alone), strict=True):
        sampled = responses_of(whole, one["step"])
        assert sampled == responses_of(alone, other["step"]), one["step"]
        assert any(index % 3 for index, _ in sampled)  # with images or videos, if the kind has them
        for figure in ("actor/pg_loss", "actor/kl_loss", "actor/entropy_loss", "actor/grad_norm"):
            assert other[figure] == pytest.approx(one[figure], rel=1e-5, abs=3e-6), (one["step"], figure)

    (tmp_path / "stop").touch()
    stopped = train("stopped", exit_code=75)
    assert len(steps_of(stopped)) in (2, 3)
    train("stopped")
    assert_same_run(whole, stopped)
