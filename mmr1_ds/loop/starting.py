"""What a run does before any model loads: GPU, data, the lock, the checkpoint to go on from, the log."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.agreement import by_rank_0
from mmr1_ds.cluster.launch import LaunchEnvironment, gpu_is_here
from mmr1_ds.cluster.ranks import Ranks, initialise_gpu
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import checkpoint_directory, prompt_features, returns_experts, run_directory
from mmr1_ds.config.loading import dump_config
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.known_rates import known_rates
from mmr1_ds.data.dataset import PromptDataset, load_dataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.weights.weight_files import has_weights_alone
from mmr1_ds.errors import UserError
from mmr1_ds.io import in_words
from mmr1_ds.loop.checkpoint import Checkpoints
from mmr1_ds.loop.run_lock import RunLock
from mmr1_ds.monitoring.environment import write_environment
from mmr1_ds.monitoring.logger import MetricsLogger
from mmr1_ds.preflight.models import weights_are_here
from mmr1_ds.preflight.videos import NOT_BY_SERVERS

logger = logging.getLogger(__name__)


def check_gpu(launch: LaunchEnvironment) -> None:
    """Initialise CUDA. Raises: UserError for a GPU that does not work, or one that torch does not see."""
    on_gpu = initialise_gpu(launch)
    if on_gpu != gpu_is_here():
        raise UserError(
            f"torch.cuda.is_available() is {on_gpu}, unlike what /dev and CUDA_VISIBLE_DEVICES show; "
            "install a CUDA build of torch, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )


def load_data(config: RunConfig, encoder: PromptEncoder) -> tuple[PromptDataset, PromptDataset | None]:
    """Return training and validation data; in a validation alone both are its own. Raises: UserError."""
    train_data, val_data = _load_data(config, encoder)
    if config.worker.rollout.engine == "server":
        for data in [train_data] if val_data is None else [train_data, val_data]:
            data.check_no_videos(NOT_BY_SERVERS)
    return train_data, val_data


def _load_data(config: RunConfig, encoder: PromptEncoder) -> tuple[PromptDataset, PromptDataset | None]:
    limit = config.worker.rollout.limit_images
    data = config.data
    if config.trainer.val_only:  # no prompt is drawn, so the training data may be any
        val_data = load_dataset(data.val_files, data, encoder, "data.val_files", limit)
        return val_data, val_data
    with_sketches = prompt_features(config) == "text"
    train_data = load_dataset(data.train_files, data, encoder, limit_images=limit, with_sketches=with_sketches)
    if not data.val_files:
        return train_data, None
    return train_data, load_dataset(data.val_files, data, encoder, "data.val_files", limit)


def check_ranks(config: RunConfig, train_data: PromptDataset, ranks: Ranks) -> None:
    """What only the started ranks can tell. Collective. Raises: UserError on every rank."""
    transfer = config.worker.rollout.weight_transfer
    if config.worker.rollout.engine == "server" and transfer in ("nccl", "ipc") and not ranks.on_gpu:
        raise UserError(f"worker.rollout.weight_transfer={transfer} needs GPUs, there is none; set it to auto")
    if returns_experts(config) and not ranks.on_gpu:
        raise UserError(
            "worker.actor.router_replay.mode=R3 needs GPUs, vLLM's CPU build does not say which experts it chose; "
            "set it to R2"
        )
    if config.data.curriculum_kernel == "triton" and not ranks.on_gpu:
        raise UserError("data.curriculum_kernel=triton needs a GPU, there is none; set it to auto")
    if len(set(ranks.all_gather_objects(train_data.fingerprint, "compare the data sets"))) > 1:
        raise UserError(f"data.train_files={config.data.train_files} differs between ranks; give all the same files")


def lock_folders(config: RunConfig, ranks: Ranks, stack: ExitStack) -> None:
    """Keep other runs out of the run's folders until `stack` is closed. Collective. Raises: UserError on every rank."""
    if config.trainer.val_only:  # beside a run that trains
        folders = {run_directory(config) / "eval": "trainer.run_dir"}
    else:  # another run may be told to keep its checkpoints in this one's directory
        folders = {run_directory(config): "trainer.run_dir"}
        if checkpoint_directory(config).resolve() != run_directory(config).resolve():
            folders[checkpoint_directory(config)] = "trainer.save_checkpoint_path"

    def lock() -> None:
        try:
            for folder, key in folders.items():
                stack.enter_context(RunLock(folder, key))
            if config.trainer.run_dir_mode is not None:
                _set_mode({run_directory(config), *folders}, config.trainer.run_dir_mode)
        except OSError as error:
            if key == "trainer.run_dir":
                raise UserError(f"{key}: {in_words(error)}; name another") from error
            # Checkpoints that cannot be written are for the saves to report: the run goes on without them.

    by_rank_0(ranks, "lock the run directory", lock)


def _set_mode(folders: set[Path], mode: str) -> None:
    """Let in whom `trainer.run_dir_mode` admits. Raises: UserError where that is not ours to say."""
    for folder in folders:
        try:
            folder.chmod(int(mode, 8))
        except OSError as error:
            raise UserError(f"trainer.run_dir_mode={mode}: {in_words(error)}; name a folder of your own") from error


def starting_point(config: RunConfig, checkpoints: Checkpoints) -> tuple[int, Path] | None:
    """Step and folder to go on from.

    Training: the run's own newest checkpoint, else the one that the user named. Validation: the other way round.
    """
    named = config.trainer.load_checkpoint_path
    found = None
    if config.trainer.resume and not (named and config.trainer.val_only):
        found = checkpoints.newest()
        if found is not None:
            checkpoints.name_again(found[0])
    if named and found is None:
        found = checkpoints.require(Path(named)), Path(named)
    elif named and found is not None and found[1].resolve() != Path(named).resolve():
        logger.warning(
            "the run goes on from its own %s, not from trainer.load_checkpoint_path=%s; for that, set "
            "trainer.resume=false or another trainer.experiment_name", found[1], named,
        )  # fmt: skip
    if found is not None:
        checkpoints.check_ranks(found[1])
    return found


def check_resumable(folder: Path, with_critic: bool, in_bf16: bool | None) -> None:
    """Raises: UserError for a checkpoint that no training goes on from. in_bf16: the run; None = it trains nothing."""
    if has_weights_alone(folder / "actor"):
        raise UserError(
            f"{folder} has weights alone (trainer.save_model_only), no run resumes from it; begin anew with "
            "trainer.resume=false or another trainer.experiment_name, or train the model that mmr1-ds export writes"
        )
    if with_critic and not (folder / "critic").is_dir():
        raise UserError(
            f"{folder} has no critic, it is of a run without algorithm.adv_estimator=gae; start elsewhere with "
            "another trainer.experiment_name, or take the estimator of that run"
        )
    was_in_bf16 = any((folder / "actor").rglob("bf16_*optim_states.pt"))  # DeepSpeed's names
    if in_bf16 is not None and was_in_bf16 != in_bf16:
        before, now = ("bf16", "fp32") if was_in_bf16 else ("fp32", "bf16")
        raise UserError(
            f"{folder} was trained in {before}, as on a {'GPU' if was_in_bf16 else 'CPU'}, and this run is in {now}; "
            + ("" if gpu_is_here() else f"set worker.actor.dtype={before}, or ")
            + "train the model that mmr1-ds export writes"
        )


def known_beforehand(
    config: RunConfig, start: tuple[int, Path] | None, coordinator: Coordinator, data: PromptDataset, ranks: Ranks
) -> Callable[[], None]:
    """Read the pass rates of `data.curriculum_prior` where a training begins. Collective. Raises: UserError on all.

    Returns: what gives them to the curriculum, once that has its features.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rank 0's
    path = config.data.curriculum_prior
    if path is not None and start is None and not config.trainer.val_only:
        by_rank_0(ranks, "read the pass rates", lambda: found.append(known_rates(Path(path), data.prompt_ids)))

    def begin() -> None:
        for rates in found:
            coordinator.begin_from(*rates)

    return begin


def open_run(config: RunConfig, start: tuple[int, Path] | None, num_steps: int, ranks: Ranks) -> MetricsLogger:
    """Make the run directory with the resolved config, and open its log. Collective."""
    run_dir, step = run_directory(config), start[0] if start else 0
    if config.trainer.val_only:  # beside the run's own log, which stays as it is
        run_dir, step = run_dir / "eval" / f"step_{step}", 0
    if ranks.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_environment(run_dir, ranks.size, ranks.on_gpu, num_steps)
    ranks.barrier("make the run directory")
    settings = dataclasses.asdict(config)
    return MetricsLogger.open(config.trainer, run_dir, num_steps, step, settings, is_main=ranks.rank == 0)


def is_done(config: RunConfig, start: tuple[int, Path] | None, num_steps: int) -> bool:
    """Whether nothing is left to train; says so and what to raise."""
    if start is None or start[0] < num_steps or config.trainer.val_only:
        return False
    logger.info(
        "the run is done: %s is of step %d of %d; for more steps raise trainer.total_episodes or max_steps",
        start[1], start[0], num_steps,
    )  # fmt: skip
    return True


def tell_start(config: RunConfig, start: tuple[int, Path] | None, ranks: Ranks, num_steps: int) -> None:
    """Log what is loaded and from where the run goes on."""
    model = config.worker.actor.model
    origin = "" if weights_are_here(model) else ", after its weights are downloaded from the hub"
    logger.info("loading %s on %d ranks%s", model.model_path, ranks.size, origin)
    if start is not None:
        logger.info("going on from %s: %d of %d steps are done", start[1], start[0], num_steps)
        if config.data.curriculum_prior is not None and not config.trainer.val_only:
            logger.info("data.curriculum_prior is not read again: the checkpoint has the beliefs")
    elif config.trainer.val_only:
        logger.info("no checkpoint in %s: validating the model as it is", checkpoint_directory(config))
