"""Checks whose body takes the device: `python checks.py NAME cuda` on a GPU, `cpu` for the twin.

Exits 0 when the check holds, 77 when it cannot be made here (the last line says why).
"""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SKIPPED = 77
LEAST_GIVEN_BACK = 0.7  # by a sleep, of all that vLLM took: its CUDA context and workspaces stay


def kernel(device: torch.device) -> str:
    """Group statistics on the device (Triton on a GPU, C++ on the CPU) against the reference."""
    import mmr1_kernels

    random = np.random.default_rng(7)
    largest = 0.0
    for group_size, longest, num_groups in ((1, 5, 3), (7, 401, 5), (8, 2048, 3)):
        lengths = random.integers(0, longest + 1, group_size * num_groups)
        arrays = {
            "token_ids": random.integers(0, 50, int(lengths.sum())).astype(np.int32),
            "offsets": np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
            "rewards": random.random(len(lengths), dtype=np.float32),
            "accuracies": random.random(len(lengths), dtype=np.float32),
        }
        there = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        backend = "triton" if device.type == "cuda" else "cpu"
        found = vars(mmr1_kernels.group_statistics(**there, group_size=group_size, backend=backend))
        wanted = vars(mmr1_kernels.group_statistics(**arrays, group_size=group_size, backend="reference"))
        for name, values in wanted.items():
            ours, theirs = (np.asarray(torch.as_tensor(x).cpu(), dtype=np.float64) for x in (found[name], values))
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5, err_msg=name)
            if ours.size:
                largest = max(largest, float(np.nanmax(np.abs(ours - theirs), initial=0.0)))
    return f"largest difference {largest:.2g}"


def packing(device: torch.device) -> str:
    """Sequences in one row, some of which share a prompt, against the same ones padded, forward and backward.

    By each attention there is: SDPA, and varlen on a GPU, in bf16.
    """
    from fixtures.tiny_models import make_prompt, save_text_model
    from transformers import AutoModelForCausalLM

    from mmr1_ds.config import DataConfig, ModelConfig
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.engine.model.attention import attention_implementation
    from mmr1_ds.engine.model.batching import collate
    from mmr1_ds.engine.model.packing import response_states

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = [attention_implementation("sdpa", True, "qwen2", dtype, device)]
    names += [attention_implementation("varlen", True, "qwen2", dtype, device)] if device.type == "cuda" else []
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    with tempfile.TemporaryDirectory() as folder:
        model_folder = str(save_text_model(Path(folder)))
        encoder = PromptEncoder(ModelConfig(model_path=model_folder), DataConfig())
        prompts = [make_prompt(encoder, i, False) for i in range(4)]
        pairs = [(prompts[i % 4], np.arange(20, 20 + 5 * i % 13, dtype=np.int32)) for i in range(1, 10)]
        results = []
        for kind in (*names, "sdpa"):
            model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, attn_implementation=kind)
            model = model.to(device).eval()
            states = response_states(model, collate(pairs, encoder, device))
            states.float().pow(2).mean().backward()
            gradients = [p.grad.float() for p in model.base_model.parameters() if p.grad is not None]
            results.append((states.detach().float(), gradients))
    *others, (padded, theirs) = results
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for packed, ours in others:
        torch.testing.assert_close(packed, padded, atol=tolerance, rtol=tolerance)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=tolerance)
    differences = [float((packed - padded).abs().max()) for packed, _ in others]
    return "; ".join(f"{name}: largest difference {x:.2g}" for name, x in zip(names, differences, strict=True))


def log_probs(device: torch.device) -> str:
    """Log-probabilities in blocks of the vocabulary against the plain way, with gradients."""
    from mmr1_ds.engine.model.log_probs import plain_log_probs, token_log_probs

    random = torch.Generator().manual_seed(1)
    results = []
    values = [torch.randn(shape, generator=random) for shape in ((401, 32), (1777, 32))]
    targets = torch.randint(1000, (401,), generator=random).to(device)
    for function, options in ((token_log_probs, {"width": 300}), (plain_log_probs, {})):
        hidden, weight = (x.to(device).requires_grad_() for x in values)
        logprobs, entropies = function(hidden, weight, None, targets, (1776, 1003), 0.7, **options)
        gradients = torch.autograd.grad((logprobs * torch.linspace(-1, 2, 401, device=device)).sum(), [hidden, weight])
        results.append([logprobs.detach(), entropies.detach(), *gradients])
    largest = 0.0
    for ours, plain in zip(*results, strict=True):
        scale = max(1.0, float(plain.abs().max()))
        torch.testing.assert_close(ours, plain, atol=1e-4 * scale, rtol=0)
        largest = max(largest, float((ours - plain).abs().max()) / scale)
    return f"largest difference {largest:.2g}"


def sleep(device: torch.device) -> str:
    """vLLM beside the actor: sample, sleep, wake, sample, sleep, update, sync, three times over. On a GPU most of the
    memory comes back each time; after each sync the log-probabilities are the actor's.
    """
    from fixtures.launching import PROGRAMS, environment
    from fixtures.tiny_models import save_vision_model

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(probe.getsockname()[1]), "DS_ACCELERATOR": device.type}
        probe.close()
        out = Path(folder, "out.json")
        program = [str(PROGRAMS / "logprob_agreement.py"), str(save_vision_model(Path(folder, "model"))), str(out)]
        subprocess.run([sys.executable, *program, "3", "vllm", "1"], env=environment(**variables), check=True)
        return sleep_verdict(json.loads(out.read_text()), device.type == "cuda")


def sleep_verdict(found: dict[str, Any], on_gpu: bool) -> str:
    """found: what tests/programs/logprob_agreement.py wrote. Raises: AssertionError."""
    # In bf16 the largest of single tokens grows with their number.
    figure, tolerance = ("mean", 0.1) if on_gpu else ("max", 1e-4)
    largest = max(step[f"rollout/logprob_diff_{figure}"] for step in found["steps"])
    said = f"log-probability difference ({figure}) {largest:.2g} at most, limit {tolerance:g}"
    assert largest <= tolerance, said
    if on_gpu:
        taken, back = found["taken_bytes"], min(step["given_back_bytes"] for step in found["steps"])
        said += f"; vLLM took {taken / 2**30:.2f} GiB, a sleep gave {back / 2**30:.2f} GiB back"
        assert back >= LEAST_GIVEN_BACK * taken > 0, said
    return said


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "kernel": kernel,
    "packing": packing,
    "log_probs": log_probs,
    "sleep": sleep,
}


def main() -> int:
    name, device = sys.argv[1:]
    if device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("no GPU\n")
        return SKIPPED
    sys.stdout.write(CHECKS[name](torch.device(device)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
