"""Checks between the keys of the rollout servers, and between them and the rest of the run."""

from __future__ import annotations

from urllib.parse import urlsplit

from mmr1_ds.config.schema import RolloutConfig, RunConfig
from mmr1_ds.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_servers(config: RunConfig) -> None:
    """Check the keys of worker.rollout. Raises: UserError for those that contradict each other or the launch."""
    rollout = config.worker.rollout
    _check_partial(config)
    _check_shared_queue(config)
    if rollout.engine != "server":
        _check_unused(rollout)
        return
    if config.worker.actor.offload_states:
        raise UserError(
            "worker.actor.offload_states=true makes room for an engine on the ranks' own GPUs, "
            "which worker.rollout.engine=server does not use; set it to false"
        )
    key, most = ("n", rollout.n) if rollout.n_max is None else ("n_max", rollout.n_max)
    if most > rollout.max_num_seqs:
        raise UserError(
            f"worker.rollout.{key}={most} is over max_num_seqs={rollout.max_num_seqs}, and a server samples the "
            "responses to one prompt at once; raise max_num_seqs"
        )
    if rollout.max_in_flight is not None and rollout.max_in_flight < most:
        raise UserError(
            f"worker.rollout.max_in_flight={rollout.max_in_flight} is under the responses to one prompt, "
            f"worker.rollout.{key}={most}; raise it or leave it out"
        )
    if rollout.server_urls:
        _check_urls(rollout)
    else:
        _check_started(config)


def _check_partial(config: RunConfig) -> None:
    rollout, longest = config.worker.rollout, config.data.max_response_length
    if rollout.partial is None:
        return
    key = f"worker.rollout.partial={rollout.partial}"
    if rollout.partial >= longest:
        raise UserError(f"{key} cuts nothing, data.max_response_length is {longest}; set it lower or leave it out")
    if rollout.engine == "hf":
        raise UserError(f"{key} needs vLLM, worker.rollout.engine=hf cannot resume a response; leave it out")
    if rollout.max_staleness_steps > 0:
        raise UserError(
            f"{key} and max_staleness_steps={rollout.max_staleness_steps} both let responses come from older policies; "
            "use one of them"
        )
    if config.algorithm.online_filtering:
        raise UserError(f"{key}: algorithm.online_filtering draws whole batches; use one of them")


def _check_shared_queue(config: RunConfig) -> None:
    rollout, key = config.worker.rollout, "worker.rollout.shared_queue=true"
    if not rollout.shared_queue or config.trainer.val_only:
        return
    if rollout.engine == "server":
        raise UserError(f"{key}: servers (worker.rollout.engine=server) share the requests of all anyway; leave it out")
    if rollout.engine == "hf":
        raise UserError(
            f"{key} needs vLLM, worker.rollout.engine=hf samples every token on all ranks at once; set it to false"
        )
    if rollout.partial is not None:
        raise UserError(
            f"{key}: with worker.rollout.partial={rollout.partial} the rank that began a response continues it; use "
            "one of them"
        )
    if config.algorithm.filter_stop:
        raise UserError(
            f"{key}: algorithm.filter_stop=true stops a rank at its share of the batch, which it has none of; use one "
            "of them"
        )


def _check_unused(rollout: RolloutConfig) -> None:
    if rollout.max_staleness_steps > 0:
        raise UserError(
            f"worker.rollout.max_staleness_steps={rollout.max_staleness_steps}: engine={rollout.engine} samples on the "
            "ranks themselves, which cannot train at the same time; set it to 0 or engine=server"
        )
    if rollout.server_urls:
        raise UserError(f"worker.rollout.server_urls needs engine=server, got engine={rollout.engine}; leave it out")


def _check_urls(rollout: RolloutConfig) -> None:
    for url in rollout.server_urls:
        parts = urlsplit(url)
        is_plain = parts.path in ("", "/") and not parts.query and "@" not in parts.netloc
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            # The whole address is never shown: it may hold a key.
            raise UserError(
                f"worker.rollout.server_urls: {parts.scheme or 'no scheme'}://{parts.hostname or ''} is not an address "
                "like http://node7:8000, without path or credentials"
            )
        if rollout.weight_transfer in ("ipc", "shared_memory") and parts.hostname not in LOOPBACK:
            raise UserError(
                f"worker.rollout.weight_transfer={rollout.weight_transfer} needs the servers on rank 0's machine, "
                f"{parts.hostname} is another; set it to nccl"
            )
    if len(set(rollout.server_urls)) < len(rollout.server_urls):
        raise UserError("worker.rollout.server_urls names a server twice; name each once")


def _check_started(config: RunConfig) -> None:
    rollout, trainer = config.worker.rollout, config.trainer
    if trainer.nnodes > 1 and rollout.server_host in LOOPBACK:
        raise UserError(
            f"worker.rollout.server_host={rollout.server_host} cannot be reached from the other "
            f"{trainer.nnodes - 1} node(s); set it to the address of rank 0's node on the cluster's network"
        )
    asked = rollout.num_servers * rollout.tensor_parallel_size
    devices = rollout.server_devices
    if not devices:
        return
    if len(devices) != asked or len(set(devices)) < len(devices):
        raise UserError(
            f"worker.rollout.server_devices={devices}: {rollout.num_servers} servers of "
            f"{rollout.tensor_parallel_size} GPU(s) need {asked} different ones; list as many or leave it out"
        )
    taken = sorted(set(devices) & set(range(trainer.n_gpus_per_node)))
    if taken and rollout.weight_transfer != "ipc":
        raise UserError(
            f"worker.rollout.server_devices={devices}: {taken} are the GPUs of ranks; name others, or set "
            "weight_transfer=ipc and a gpu_memory_utilization that leaves room for both"
        )
