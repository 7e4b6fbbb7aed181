"""The experts of a mixture in vLLM's model, which its CPU build keeps in a layout of its own. Runs in vLLM's worker."""

from __future__ import annotations

from typing import Any


def pack_experts_anew(model: Any) -> None:
    """Let the CPU build pack the experts in the next reload as in the first load; to be called before every reload.

    vLLM keeps the kernel of experts over reloads, because graphs of a GPU may hold its addresses, and with a kernel in
    place its CPU build takes the new weights unpacked: a reload then fails, or its log-probabilities are of no model.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if hasattr(method, "moe_kernel"):
                method.moe_kernel = None
