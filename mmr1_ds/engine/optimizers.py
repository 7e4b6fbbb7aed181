"""Optimisers other than DeepSpeed's AdamW: its moments in bf16 or 8 bits, and Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mmr1_ds.config.schema import OptimConfig

MUON_MOMENTUM = 0.95
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK = 2**24  # elements computed at once in float32: a partition can have a thousand million


def choose_optimizer(
    resolved: dict[str, Any], parameters: list[Parameter], optim: OptimConfig
) -> tuple[dict[str, Any], torch.optim.Optimizer | None]:
    """Return the DeepSpeed configuration and the optimiser of `optim.strategy`; None for one that DeepSpeed makes.

    Args: resolved: for AdamW.
    """
    params = resolved["optimizer"]["params"]
    eps = params.get("eps", 1e-8)
    settings: Any = {"lr": optim.lr, "betas": optim.betas, "eps": eps, "weight_decay": optim.weight_decay}
    if optim.strategy == "muon":
        muon = {"muon_lr": optim.muon_lr or optim.lr, "momentum": MUON_MOMENTUM}
        # Orthogonalising needs whole gradients, and what DeepSpeed would clip are the updates made of them.
        zero = {**resolved["zero_optimization"], "reduce_scatter": False}
        own = {"optimizer": {"type": "Muon", "params": params | muon}, "zero_optimization": zero}
        return resolved | own | {"gradient_clipping": 0.0}, None
    if optim.strategy == "adamw_8bit":
        library = import_module("bitsandbytes.optim")  # of an extra that neither pins nor locks it
        return resolved | {"zero_allow_untested_optimizer": True}, library.AdamW8bit(parameters, **settings)
    if optim.strategy == "adamw_bf16":
        return resolved | {"zero_allow_untested_optimizer": True}, AdamWBf16(parameters, **settings)
    return resolved, None


def set_rates(groups: Iterable[dict[str, Any]], rate: float, optim: OptimConfig) -> None:
    """Set the learning rate of all groups of parameters; that of Muon's is in proportion to `muon_lr`."""
    of_muon = rate if optim.muon_lr is None else rate * optim.muon_lr / optim.lr
    for group in groups:
        group["lr"] = of_muon if group.get("use_muon", False) else rate


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that computes in float32 and keeps its moments in bf16, rounded stochastically.

    bf16 has 8 bits: rounded to the nearest, the second moment would stand still, since with beta2 = .999 a step moves
    it by less than half of the last bit. Rounded up or down at random, each with the probability that makes the mean
    right, it follows. The random numbers follow from the step alone, so that a resumed run draws the same.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step from the gradients of the parameters, which are float32. No closure is called."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        for name in _MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            # torch and DeepSpeed load them as float32, which the parameters are; bf16 holds what was saved exactly.
            state[name] = state[name].to(torch.bfloat16)
        # Not in place: what DeepSpeed loads from other ranks is one tensor for all parameters.
        state["step"] = state.get("step", torch.zeros(())) + 1
        step = int(state["step"])
        generator = torch.Generator(parameter.device).manual_seed(step)
        beta1, beta2 = group["betas"]
        step_size, scale = group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for values, gradient, first, second in zip(*(tensor.view(-1).split(_CHUNK) for tensor in tensors), strict=True):
            gradient = gradient.float()
            mean = first.float().lerp_(gradient, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            values.mul_(1 - group["lr"] * group["weight_decay"])
            values.addcdiv_(mean, square.sqrt().div_(scale).add_(group["eps"]), value=-step_size)
            first.copy_(round_to_bf16(mean, generator))
            second.copy_(round_to_bf16(square, generator))


def round_to_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 numbers up or down at random, so that their mean stays. Changes `values`."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return bits.add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
