"""Rollouts by vLLM servers beside the ranks: they may sample the next batches while the actor trains."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr1_ds.cluster.preemption import Preemption, SamplingAbandoned
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import DataConfig, ModelConfig, RolloutConfig
from mmr1_ds.config.redaction import remember
from mmr1_ds.errors import UserError
from mmr1_ds.io import in_words
from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.adapters import refusal
from mmr1_ds.rollout.base import Enough, Policy, ServersGone, ignore, never
from mmr1_ds.rollout.options import ImageBounds, image_bounds
from mmr1_ds.rollout.servers.address import ServerAddress
from mmr1_ds.rollout.servers.group import ServerGroup, Ticket
from mmr1_ds.rollout.servers.process import ExternalServer, Server, ServerProcess, check_key, transfer_backend
from mmr1_ds.rollout.servers.supervisor import Supervisor
from mmr1_ds.rollout.servers.weights.adapters import AdapterTransfer
from mmr1_ds.rollout.servers.weights.transfer import ServerControl, WeightTransfer

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25  # how often the ranks agree on what is there and which servers to use
_LONGEST_POLL_SECONDS = 5.0
_SECONDS_TO_LEAVE = 2.0  # without a server, for a run that was told to end
_MOST_BIASES = 1024  # of a request, in vLLM's V2 model runner, which GPUs have: one more ends the server
_TRAINING, _PROBE = 0, 1  # priorities, the lower first


@dataclass(frozen=True)
class _Submitted:
    """The tickets of one `submit`, with the positions of their requests."""

    training: tuple[list[int], Ticket]
    probes: tuple[list[int], Ticket]


@dataclass(frozen=True)
class _Report:
    """What each rank tells the others whenever they agree."""

    is_done: bool
    suspects: Mapping[int, tuple[int, str]]  # by server: the generation that failed, and why
    is_urgent: bool  # it was told to end and has no time to sample
    ready: Sequence[ServerAddress] = ()  # rank 0's, as all that follows
    trouble: str = ""  # why the run cannot go on


class ServerRollout:
    """A group of servers. Rank 0 starts and watches them; every rank sends its own requests."""

    def __init__(
        self,
        config: RolloutConfig,
        model: ModelConfig,
        data: DataConfig,
        ranks: Ranks,
        encoder: PromptEncoder,
        *,
        first_device: int,
        most_images: int,
        log_folder: Path,
        preemption: Preemption,
        adapted: Sequence[str] = (),
    ) -> None:
        """Start the servers, or find those of `server_urls`. They load while the actor is built. Collective.

        Args:
            first_device: of the servers' GPUs where `server_devices` names none: the number of ranks on this node.
            most_images: of the prompt that has the most.
            log_folder: where started servers write, and adapters are handed over.
            adapted: layers whose adapters every sync brings, by transformers' names; none = it brings whole weights.
        Raises: UserError for more forbidden tokens than a server takes.
        """
        num_forbidden = len(encoder.forbidden_token_ids)
        if ranks.on_gpu and num_forbidden > _MOST_BIASES and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0":
            raise UserError(
                f"this model has {num_forbidden:,} tokens that are not to be sampled, and a request to a server names "
                f"at most {_MOST_BIASES:,}; take worker.rollout.engine=vllm, or export VLLM_USE_V2_MODEL_RUNNER=0 to "
                "the run and its servers"
            )
        self._config, self._ranks, self._preemption = config, ranks, preemption
        self._policy: Policy | None = None
        self._transfer: WeightTransfer | AdapterTransfer | None = None
        self._adapter_rank, self._log_folder = (model.lora.rank if adapted else 0), log_folder
        self._adapters_fit = False  # a server has taken some
        self._supervisor: Supervisor | None = None
        self._synced: dict[int, int] = {}  # generation of each server that has the current weights
        self._has_started = False
        self._seconds_without, self._told_at = 0.0, time.monotonic()
        self._num_given_up = self._num_restarts_told = 0
        self._seconds_until_idle = 0.0  # of requests in flight, before the weights change
        shared: tuple[list[str], str, str] | None = None
        if ranks.rank == 0:
            key = _key(config)
            servers = run_servers(
                config,
                model,
                data,
                key=key,
                on_gpu=ranks.on_gpu,
                images=image_bounds(encoder, most_images),
                first_device=first_device,
                log_folder=log_folder,
                adapted=adapted,
            )
            if not self._config.server_urls:
                logger.info("starting %d rollout servers, whose logs are in %s", len(servers), log_folder)
            self._supervisor = Supervisor(servers, self._config.server_start_seconds)
            shared = [server.url for server in servers], key, secrets.token_hex(4)
        shared = ranks.all_gather_objects(shared, "share the servers' addresses")[0]
        assert shared is not None
        urls, key, run = shared
        self._run: str = run
        self._secret = key
        self._generations = dict.fromkeys(range(len(urls)), 0)  # as last heard of rank 0
        self._group = ServerGroup(
            urls,
            key,
            eos_token_ids=encoder.eos_token_ids,
            forbidden_token_ids=encoder.forbidden_token_ids,
            vocabulary_size=encoder.vocabulary_size,
            max_in_flight=self._config.max_in_flight or 2 * self._config.max_num_seqs,
            server_timeout_seconds=self._config.server_timeout_seconds,
            request_timeout_seconds=self._config.request_timeout_seconds,
            first_server=ranks.rank % len(urls),
        )
        self._group.set_usable(())
        if self._supervisor is not None:
            self._supervisor.start()

    def submit(self, requests: Sequence[RolloutRequest], settings: SamplingSettings) -> _Submitted:
        """See RolloutEngine."""

        def ask(positions: list[int], priority: int) -> tuple[list[int], Ticket]:
            return positions, self._group.submit([requests[i] for i in positions], settings, priority)

        return _Submitted(
            ask([i for i, request in enumerate(requests) if not request.can_wait], _TRAINING),
            ask([i for i, request in enumerate(requests) if request.can_wait], _PROBE),
        )

    def collect(
        self, submitted: _Submitted, enough: Enough = never, advance: Callable[[int], None] = ignore
    ) -> list[RolloutGroup | None]:
        """See RolloutEngine. Raises: ServersGone, SamplingAbandoned."""
        positions, waited_for = submitted.training
        is_done, num_there = False, 0
        while not is_done:
            own_done = self._group.wait(waited_for, _POLL_SECONDS)
            if not own_done:
                there = {positions[i]: group for i, group in list(waited_for.groups.items()) if group is not None}
                own_done = enough(there)
            reports = self._tell(own_done, may_send=True)
            before, num_there = num_there, waited_for.num_responses
            advance(num_there - before)
            if any(report.is_urgent for report in reports):
                raise SamplingAbandoned
            is_done = all(report.is_done for report in reports)
        # The training waits for nothing more: what probes have not said by now is not worth its time.
        self._group.cut_off(waited_for)  # where there are enough
        self._num_given_up += self._group.cut_off(submitted.probes[1])
        found: dict[int, RolloutGroup | None] = {}
        for positions, ticket in (submitted.training, submitted.probes):
            found.update(zip(positions, self._group.take(ticket), strict=True))
        return [found[position] for position in range(len(found))]

    def sync_weights(self, policy: Policy) -> int:
        """See RolloutEngine; the bytes are a server's. Raises: ServersGone, and UserError when no server starts."""
        if self._transfer is None:
            self._policy = policy
            self._transfer = self._new_transfer(policy)
            self._wait_for_start()
        self._group.hold()
        if self._config.weight_swap == "boundary":
            start = time.perf_counter()
            while not self._agree(self._group.wait_idle(_POLL_SECONDS), may_send=False):
                pass
            self._seconds_until_idle += time.perf_counter() - start
        ready = self._tell(True, may_send=False)[0].ready
        control = None
        if self._ranks.rank == 0:
            control = ServerControl(ready, self._secret, self._config.server_timeout_seconds)
        if control is not None:
            self._complain(control.pause(keep=self._config.weight_swap == "in_flight"), ready)
        self._synced = {}
        if ready:
            self._send(ready)
        if control is not None:
            # All that was computed with the old weights: prefixes, image embeddings, and what the processor believes
            # cached. Requests in flight are computed again up to where they are.
            self._complain(control.forget_and_resume(), ready)
        self._agree(True)
        self._group.release()
        if isinstance(self._transfer, AdapterTransfer):
            return self._transfer.num_bytes
        return sum(info.num_bytes for bucket in policy.weight_buckets() for info in bucket)

    def sleep(self, keep_weights: bool) -> None:
        """See RolloutEngine. The servers' memory is their own."""

    def metrics(self) -> dict[str, float]:
        """See RolloutEngine."""
        own = self._group.metrics() | {"rollout/num_probes_given_up": float(self._num_given_up)}
        self._num_given_up = 0
        restarts = 0 if self._supervisor is None else self._supervisor.num_restarts
        seconds = self._ranks.max({"rollout/seconds_before_swap": self._seconds_until_idle}, "wait of the weights")
        self._seconds_until_idle = 0.0
        own["rollout/num_server_restarts"] = float(restarts - self._num_restarts_told)
        self._num_restarts_told = restarts
        return self._ranks.sum(own, "count of the rollout servers") | seconds

    def close(self) -> None:
        """See RolloutEngine."""
        self._group.close()
        if self._transfer is not None:
            self._transfer.close()
        if self._supervisor is not None:
            self._supervisor.close()

    def _new_transfer(self, policy: Policy) -> WeightTransfer | AdapterTransfer:
        rank, key = self._ranks.rank, self._secret
        if self._adapter_rank:
            return AdapterTransfer(
                policy, rank=rank, key=key, folder=self._log_folder / "adapters", run=self._run,
                lora_rank=self._adapter_rank,
            )  # fmt: skip
        backend = transfer_backend(self._config, on_gpu=self._ranks.on_gpu)
        return WeightTransfer(policy, backend=backend, rank=rank, key=key)

    def _wait_for_start(self) -> None:
        logger.info("waiting for %d rollout servers", len(self._generations))
        while len(self._tell(True, may_send=False)[0].ready) < len(self._generations):
            time.sleep(_POLL_SECONDS)
        self._has_started = True

    def _agree(self, is_done: bool, may_send: bool = True) -> bool:
        """Whether all ranks are done; meanwhile servers that came back get the weights. Collective."""
        return all(report.is_done for report in self._tell(is_done, may_send))

    def _tell(self, is_done: bool, may_send: bool) -> list[_Report]:
        """Exchange reports, and act on them the same way everywhere. Collective. Raises: ServersGone, UserError."""
        suspects = {number: (self._generations[number], why) for number, why in self._group.suspects().items()}
        own = _Report(is_done, suspects, self._preemption.is_urgent)
        if self._supervisor is not None:
            own = dataclasses.replace(own, ready=self._supervisor.ready(), trouble=self._trouble())
        reports: list[_Report] = self._ranks.all_gather_objects(own, "watch the rollout servers")
        ready = list(reports[0].ready)
        if reports[0].trouble:
            raise (ServersGone if self._has_started else UserError)(reports[0].trouble)
        self._generations.update({address.number: address.generation for address in ready})
        for report in reports:
            if self._supervisor is not None:
                self._supervisor.complain(report.suspects)
            for number, (generation, _) in report.suspects.items():
                ready = [address for address in ready if (address.number, address.generation) != (number, generation)]
        without = [address for address in ready if self._synced.get(address.number) != address.generation]
        # First of all: one that was started anew while nobody looked must not be asked before it has the weights.
        self._group.set_usable(self._with_weights(ready))
        if may_send and without:
            self._send(without)
        usable = self._with_weights(ready)
        self._group.set_usable(usable)
        # Time that was waited here, not what passed while the actor trained.
        now = time.monotonic()
        self._seconds_without = (
            0.0 if usable else self._seconds_without + min(now - self._told_at, _LONGEST_POLL_SECONDS)
        )
        self._told_at = now
        return reports

    def _with_weights(self, ready: Sequence[ServerAddress]) -> set[int]:
        return {address.number for address in ready if self._synced.get(address.number) == address.generation}

    def _trouble(self) -> str:
        """Rank 0: why the run has to stop; empty while it has not."""
        assert self._supervisor is not None
        if not self._has_started:
            return self._supervisor.failed_start()
        seconds = self._seconds_without
        # A job manager that ends the run may have ended the servers as well: no time to wait for them.
        patience = _SECONDS_TO_LEAVE if self._preemption.is_asked else self._config.servers_gone_seconds
        if seconds <= patience:
            return ""
        return (
            f"no rollout server has answered for {seconds:.0f} s (worker.rollout.servers_gone_seconds): "
            f"{self._supervisor.last_words()}; see to them and start the run again, it goes on where it stopped"
        )

    def _send(self, servers: Sequence[ServerAddress]) -> None:
        """Give servers the actor's weights. Collective: those of ZeRO-3 are gathered."""
        assert self._transfer is not None and self._policy is not None, "weights are sent from the first sync on"
        version = self._policy.num_updates_done
        failed, unwritten = dict[int, str](), ""
        try:
            failed = self._transfer.send(servers, version)
        except OSError as error:  # of the adapters' files, on rank 0
            if not isinstance(self._transfer, AdapterTransfer):
                raise
            unwritten = in_words(error)
        if isinstance(self._transfer, AdapterTransfer):
            self._group.sample_with(self._transfer.name(version))
        own = failed, unwritten
        failed, unwritten = self._ranks.all_gather_objects(own, "share which servers have the weights")[0]
        if unwritten:  # what was learned is saved before the run ends
            raise ServersGone(
                f"worker.rollout.lora_sync=adapters: the adapters for the servers cannot be written ({unwritten}); "
                "free space in trainer.run_dir, or set it to merged"
            )
        if isinstance(self._transfer, AdapterTransfer) and not self._adapters_fit:
            refused = [why for why in failed.values() if "HTTP" in why]
            if len(refused) == len(servers):  # all of them, and from the first on: starting them anew would not help
                raise UserError(refusal(refused[0]))
            self._adapters_fit = len(failed) < len(servers)
        self._complain(failed, servers)
        for address in servers:
            if address.number not in failed:
                self._synced[address.number] = address.generation

    def _complain(self, failed: Mapping[int, str], servers: Sequence[ServerAddress]) -> None:
        if self._supervisor is not None:
            generations = {address.number: address.generation for address in servers}
            self._supervisor.complain({number: (generations[number], why) for number, why in failed.items()})


def _key(config: Any) -> str:
    """The user's, or one made for the run. Raises: UserError where running servers need theirs."""
    key = os.environ.get(config.server_key_variable, "")
    if config.server_urls and not key:
        raise UserError(
            f"worker.rollout.server_urls names running servers but {config.server_key_variable} "
            "(worker.rollout.server_key_variable) is not set; export the key that they were started with"
        )
    if key:
        check_key(key, config.server_key_variable)
    key = key or secrets.token_urlsafe(32)
    remember({"key": key})
    return key


def run_servers(
    config: RolloutConfig,
    model: ModelConfig,
    data: DataConfig,
    *,
    key: str,
    on_gpu: bool,
    images: ImageBounds | None,
    first_device: int,
    log_folder: Path,
    adapted: Sequence[str] = (),
) -> Sequence[Server]:
    """The servers of a run: those of `server_urls`, else processes on GPUs of their own, not started yet."""
    if config.server_urls:
        return [ExternalServer(url, key) for url in config.server_urls]
    size = config.tensor_parallel_size
    devices = config.server_devices or list(range(first_device, first_device + size * config.num_servers))
    log_folder.mkdir(parents=True, exist_ok=True)
    return [
        ServerProcess(
            config,
            model,
            data,
            number=number,
            key=key,
            on_gpu=on_gpu,
            devices=devices[number * size : (number + 1) * size],
            images=images,
            log=log_folder / f"server_{number}.log",
            adapted=adapted,
        )
        for number in range(config.num_servers)
    ]
