"""vLLM's V2 model runner's sampler on the CPU, in Triton's interpreter, with what the program asks for.

Usage: v2_sampler.py FOLDER OUT.json

FOLDER holds tiny models by their families' names; qwen2 is the one that samples, of the others vLLM makes its settings.

Requests go the program's way: from the engine in the ranks, or as a server reads them, through vLLM's own front end to
one request a response, and into the V2 runner's states. Each step its sampler gets logits that follow from the request
and the step, through the program's mask of forbidden tokens, and its answer is put into the states as the runner does.

Stand-ins: memory that CPU and GPU share, which needs a driver, and the top-k and top-p kernel, which the interpreter
cannot run (a loop's counter is no tensor there); vLLM's own PyTorch function takes that one's place.
"""

# ruff: noqa: E402 - Triton has to be there before vLLM's modules look for it

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"}

import vllm.platforms
from vllm.platforms import current_platform

assert current_platform.is_cpu()
with mock.patch.object(vllm.platforms, "vllm_version_matches_substr", lambda text: False):
    from vllm.triton_utils import HAS_TRITON  # vLLM's CPU build has none otherwise
assert HAS_TRITON

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers, post_update
from vllm.v1.worker.gpu.sample import sampler, states
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.states import RequestState

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.config import RunConfig
from mmr1_ds.data.images import PixelLimits
from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.adapters import adapter_options
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.colocated import engine
from mmr1_ds.rollout.options import ImageBounds, engine_options
from mmr1_ds.rollout.servers.client import Exchange

buffer_utils.is_uva_available = lambda: False


def top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)


sampler.apply_top_k_top_p = states.apply_top_k_top_p = top_k_top_p

FORBIDDEN, EOS, VOCABULARY, NUM_STEPS, TEMPERATURE = (2, 11, 40), 6, 61, 4, 0.7
CPU = torch.device("cpu")
# By name, with the way that the log-probabilities are meant to be: validation's and training's.
SETTINGS = {
    "plain": SamplingSettings(1.0, 1.0, -1, 9),
    "cooler": SamplingSettings(TEMPERATURE, 1.0, -1, 9),
    "top_k": SamplingSettings(1.3, 1.0, 7, 9),
    "top_p": SamplingSettings(1.0, 0.8, -1, 9),
    "min_p": SamplingSettings(0.9, 1.0, -1, 9, min_p=0.1),
    "repetition": SamplingSettings(1.0, 1.0, -1, 9, repetition_penalty=1.4),
    "all": SamplingSettings(0.8, 0.9, 20, 9, min_p=0.02, repetition_penalty=1.2, stop=("a b", "c")),
    "greedy": SamplingSettings(0.0, 1.0, -1, 9),
}
PROMPTS = [(5, 9, 5, 30), (17,), (8, 41, 8, 8, 20, 3, 1)]


def logits_of(seed: int, step: int) -> torch.Tensor:
    """(V,) of the model, whatever the batch; flat enough that all tokens have a chance."""
    return torch.from_numpy(np.random.default_rng([seed, step]).normal(0, 2, VOCABULARY).astype(np.float32))


def colocated(config: RunConfig, settings: SamplingSettings) -> tuple[list[SamplingParams], nn.Module]:
    """What the engine in the ranks asks vLLM for, and a model with the mask that it puts into vLLM's."""
    asked: list[SamplingParams] = []
    masked = nn.Module()
    masked.compute_logits = lambda logits: logits
    left: list[str] = []
    worker = SimpleNamespace(get_model=lambda: masked, device=CPU)

    def enqueue(inputs: Any, parameters: Any, **_: Any) -> list[str]:
        asked.extend(parameters)
        left.extend(f"{place}-x" for place in range(len(parameters)))
        return list(left)

    core = SimpleNamespace(batch_queue=None, scheduler=SimpleNamespace(has_requests=lambda: False))
    llm = SimpleNamespace(
        enqueue=enqueue,
        reset_prefix_cache=lambda: None,
        collective_rpc=lambda function, args=(): [function(worker, *args) if function is engine._forbid else False],
        llm_engine=SimpleNamespace(
            has_unfinished_requests=lambda: bool(left),
            step=lambda: [SimpleNamespace(request_id=left.pop()[:-2], finished=True, outputs=[])],
            engine_core=SimpleNamespace(engine_core=core),
        ),
    )
    encoder = SimpleNamespace(is_multimodal=False, forbidden_token_ids=FORBIDDEN, eos_token_ids=(EOS,))
    ranks = SimpleNamespace(on_gpu=True, any=lambda flag, stage: flag)
    with mock.patch.object(engine, "_start_engine", lambda *arguments: llm):
        rollout = engine.VllmRollout(
            config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder, 1, Preemption(60.0, None)
        )
    generate(rollout, requests(settings), settings)
    return asked, masked


def served(settings: SamplingSettings) -> list[SamplingParams]:
    """What a server reads."""
    exchange = Exchange([EOS], FORBIDDEN, VOCABULARY)
    bodies = [exchange.body(request, settings, "id", 0) for request in requests(settings)]
    return [GenerateRequest.model_validate_json(body).sampling_params for body in bodies]


def requests(settings: SamplingSettings) -> list[RolloutRequest]:
    count = 3 if settings.temperature > 0 else 1
    return [RolloutRequest(Prompt(i, f"p{i}", tokens, (), ""), count, 1000 * i) for i, tokens in enumerate(PROMPTS)]


class Runner:
    """The parts of the V2 runner that look at a request, put together as it does."""

    def __init__(self, logprobs_mode: str, max_num_reqs: int) -> None:
        self.states = RequestState(
            max_num_reqs=max_num_reqs, max_model_len=64, max_num_batched_tokens=512, num_speculative_steps=0,
            vocab_size=VOCABULARY, device=CPU,
        )  # fmt: skip
        self.sampler = sampler.Sampler(
            SimpleNamespace(reasoning_config=None), max_num_reqs, VOCABULARY, CPU, self.states,
            logprobs_mode=logprobs_mode,
        )  # fmt: skip
        self.prompts = PromptLogprobsWorker(max_num_reqs, CPU, logprobs_mode=logprobs_mode)
        self.buffers = InputBuffers(max_num_reqs, 512, CPU)

    def add(self, name: str, prompt: tuple[int, ...], parameters: SamplingParams) -> None:
        assert parameters.max_tokens is not None
        self.states.add_request(name, len(prompt), list(prompt), len(prompt) - 1, parameters.max_tokens)
        index = self.states.req_id_to_index[name]
        self.sampler.add_request(index, parameters)
        self.prompts.add_request(name, index, parameters)

    def remove(self, name: str) -> None:
        self.states.remove_request(name)

    def forget(self) -> None:
        """Fill the sampler's tensors with what vLLM's second level of sleep may leave in them."""
        found = [self.sampler.penalties_state.prompt_bin_mask, self.sampler.penalties_state.output_bin_counts]
        for part in (*self.sampler.logits_processors, self.sampler.logprob_token_ids_state):
            found += [value.gpu for value in vars(part).values() if isinstance(value, buffer_utils.StagedWriteTensor)]
        assert len(found) > 5
        for tensor in found:
            tensor.fill_(-77)

    def step(self, names: list[str], logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """Sample one token of each. Returns: them, and their log-probabilities."""
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        index = np.array([self.states.req_id_to_index[name] for name in names], dtype=np.intp)
        places = torch.from_numpy(index.astype(np.int64))
        lengths = self.states.total_len.gpu[places]
        batch = InputBatch.make_dummy(len(names), len(names), self.buffers)
        batch = dataclasses.replace(
            batch, req_ids=names, idx_mapping=places, idx_mapping_np=index, expanded_idx_mapping=places,
            positions=(lengths - 1).long(), seq_lens=lengths, seq_lens_cpu_upper_bound=lengths.clone(),
            input_ids=self.states.all_token_ids.gpu[places, (lengths - 1).long()],
        )  # fmt: skip
        output = self.sampler(logits, batch)
        assert not self.prompts.uses_prompt_logprobs[index].any()
        assert output.num_sampled.tolist() == [1] * len(names)
        post_update(
            places, self.states.num_computed_tokens.gpu, self.states.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts, output.sampled_token_ids, output.num_sampled,
            output.num_rejected, batch.query_start_loc, self.states.all_token_ids.gpu, self.states.total_len.gpu,
        )  # fmt: skip
        found = output.logprobs_tensors
        assert found is not None and found.logprobs.shape == (len(names), 1)  # the sampled token's alone
        assert found.logprob_token_ids[:, 0].tolist() == output.sampled_token_ids[:, 0].tolist()
        return output.sampled_token_ids[:, 0].tolist(), found.logprobs[:, 0].tolist()


def sample(runner: Runner, asked: list[tuple[str, tuple[int, ...], SamplingParams]], model: nn.Module) -> dict:
    """Some steps of all requests together; by name the tokens and their log-probabilities."""
    for request in asked:
        runner.add(*request)
    found: dict[str, Any] = {name: {"tokens": [], "logprobs": []} for name, *_ in asked}
    names = [name for name, *_ in asked]
    for step in range(NUM_STEPS):
        rows = torch.stack([logits_of(parameters.seed, step) for *_, parameters in asked])
        for name, token, logprob in zip(names, *runner.step(names, model.compute_logits(rows)), strict=True):
            found[name]["tokens"].append(token)
            found[name]["logprobs"].append(logprob)
    for name in names:
        runner.remove(name)
    return found


def run_config(model: Path) -> RunConfig:
    config = RunConfig()
    config.worker.actor.model.model_path = str(model)
    config.data.max_prompt_length, config.data.max_response_length = 32, 9
    return config


def settings_of(model: Path, name: str, more: dict[str, Any]) -> VllmConfig:
    """What vLLM makes of the program's arguments for an engine on a GPU, but for what the platform decides."""
    config = run_config(model)
    images = None
    if name in ("qwen2_5_vl", "qwen3_5"):
        images = ImageBounds(2, PixelLimits(28, 28 * 28, 112 * 112, 28 * 28))
    if name == "in two parts":
        config.worker.rollout.tensor_parallel_size = 2
    if name == "prompts whole":
        config.worker.rollout.enable_chunked_prefill = False
    options = engine_options(config.worker.rollout, config.worker.actor.model, config.data, on_gpu=True, images=images)
    return EngineArgs(distributed_executor_backend="external_launcher", **options, **more).create_engine_config()


def which_runner(folder: Path) -> dict[str, Any]:
    """By name: whether vLLM takes the V2 runner, what keeps it from either, and whether logits stay in one piece."""
    found: dict[str, Any] = {}
    adapted = adapter_options(["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"], 4)
    experts = {"enable_return_routed_experts": True}
    for name, family, more in (
        *((family.name, family.name, {}) for family in sorted(folder.iterdir())),
        ("prompts whole", "qwen2", {}), ("in two parts", "llama", {}), ("adapters", "qwen2", adapted),
        ("experts", "qwen3_moe", experts), ("experts of a hybrid", "qwen3_5_moe_text", experts),
    ):  # fmt: skip
        for runner in (None, "0"):
            variables = {} if runner is None else {"VLLM_USE_V2_MODEL_RUNNER": runner}
            with mock.patch.dict(os.environ, variables):
                try:
                    whole = settings_of(folder / family, name, more)
                except ValueError as error:
                    found[f"{name}, {runner}"] = str(error)
                    continue
                found[f"{name}, {runner}"] = {
                    "v2": whole.use_v2_model_runner,
                    "not by v1": whole._get_v1_model_runner_unsupported_features(),
                    "not by v2": whole._get_v2_model_runner_unsupported_features(),
                    "logits in parts": whole.parallel_config.enable_batch_sharded_sampling,
                    "logprobs": whole.model_config.logprobs_mode,
                }
    return found


def main(folder: str, out: str) -> None:
    model = Path(folder) / "qwen2"
    config = run_config(model)
    options = engine_options(config.worker.rollout, config.worker.actor.model, config.data, on_gpu=True, images=None)
    front = InputProcessor(EngineArgs(**options).create_engine_config())

    def responses(kind: str, asked: list[SamplingParams]) -> list[tuple[str, tuple[int, ...], SamplingParams]]:
        """One request a response, as they reach a runner."""
        rows = []
        for i, (prompt, parameters) in enumerate(zip(PROMPTS, asked, strict=True)):
            inputs = {"type": "token", "prompt_token_ids": list(prompt)}
            request = front.process_inputs(f"{kind}/{i}", inputs, parameters, supported_tasks=("generate",))
            front.assign_request_id(request)
            parent = ParentRequest(request)
            rows += [(f"{kind}/{i}/{k}", prompt, parent.get_child_info(k)[1]) for k in range(parameters.n)]
        return rows

    found: dict[str, Any] = {"processed": {}, "raw": {}}
    everything = []
    for name, settings in SETTINGS.items():
        asked, masked = colocated(config, settings)
        everything += responses(f"colocated/{name}", asked) + responses(f"server/{name}", served(settings))
    seeds = {name: parameters.seed for name, _, parameters in everything}
    runner = Runner("processed_logprobs", 200)
    found["processed"] = sample(runner, everything, masked)
    # Others beside them, in another order, in slots that others had, and with what a sleep has left there.
    runner.forget()
    order = np.random.default_rng(3).permutation(len(everything))
    found["again"] = sample(runner, [everything[k] for k in order[: len(order) // 2]], masked)

    config.worker.rollout.logprobs, config.worker.rollout.temperature = "raw", TEMPERATURE
    for name in ("cooler", "all"):
        settings = dataclasses.replace(SETTINGS[name], temperature=TEMPERATURE)
        asked, scaled = colocated(config, settings)
        found["raw"] |= sample(Runner("raw_logprobs", 20), responses(f"colocated/{name}", asked), scaled)

    # One distribution, many seeds.
    many = [(f"{seed}", (5, 9), SamplingParams(seed=seed, logprobs=0, max_tokens=9)) for seed in range(401)]
    runner = Runner("processed_logprobs", 401)
    for request in many:
        runner.add(*request)
    logits = logits_of(0, 0).repeat(401, 1)
    found["frequencies"] = runner.step([name for name, *_ in many], masked.compute_logits(logits))[0]
    Path(out).write_text(json.dumps(found | {"seeds": seeds, "runners": which_runner(Path(folder))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
