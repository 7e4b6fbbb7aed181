"""Log-probabilities of given tokens without their logits: a block of the vocabulary at a time, forward and backward.

With the logits l_v = (h . W_v + b_v) / temperature of the tokens v that are not forbidden, and m their maximum:

    s = sum_v exp(l_v - m)        log p(y) = l_y - m - log s
    c = sum_v exp(l_v - m) (l_v - m)       entropy = log s - c / s
    d log p(y) / d l_v = [v = y] - p_v      d entropy / d l_v = -p_v (log p_v + entropy)

m, s and c are carried from block to block: a new maximum m' turns c into r (c + (m - m') s) and s into r s, where
r = exp(m - m'). The backward computes each block's logits once more, from m + log s: four matrix products where the
plain way has three, against a dozen passes over [tokens, vocabulary] that now stay in the cache.

Blocks of the vocabulary, not of the tokens: each row of the weight's gradient then is one product over all tokens,
rounded once and written once. What has to be accumulated is the gradient of the hidden states, which is small.

Liger's kernels do not serve here: its fused linear cross-entropy has no temperature, no forbidden tokens and no
entropy; its fused GRPO loss has a temperature but neither of the other two, and returns its own loss instead of
log-probabilities. So this path runs on GPU too.

Shape letters: T response tokens, H hidden size, V vocabulary, B the block's part of it, F forbidden tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Bytes of a block's logits. CPU: two such buffers stay in the last-level cache, so that only the matrix products read
# main memory. GPU: a product of some hundred GFLOP covers the launches of its block, and 256 MiB is little there.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
NARROWEST_BLOCK = 128  # narrower products waste the machine; only past BLOCK_BYTES / 512 tokens does a block outgrow


def block_width(num_tokens: int, vocabulary: int, element_bytes: int, device: str) -> int:
    """Tokens of the vocabulary in a block. The blocks are of one size, as nearly as they can be."""
    budget = BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"])
    widest = max(NARROWEST_BLOCK, budget // (max(1, num_tokens) * element_bytes))
    num_blocks = -(-vocabulary // widest)
    return -(-vocabulary // num_blocks)


def token_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    forbidden_token_ids: Sequence[int] = (),
    temperature: float = 1.0,
    width: int | None = None,
    entropy_gradient: bool = False,
    fp32_logits: bool = False,
    forbidden_F: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats) of softmax(logits / temperature) without the forbidden tokens.

    Equals `plain_log_probs`. Low-precision inputs are multiplied in their own type, as the model's layer and vLLM do,
    and everything after is float32; so are the sums over blocks of the gradient.

    Args: width: tokens of the vocabulary in a block; `block_width` without one. fp32_logits: low-precision products
        are summed up in float32 and stay so, as vLLM's with head_dtype=float32; the gradient's are not.
        forbidden_F: the forbidden tokens in order, where the weight is; without it each pass copies them there.
    Returns: log-probabilities (T,) with gradient, entropies (T,) with one where asked for; float32, float64 for such
        inputs.
    """
    exact = torch.promote_types(hidden_TH.dtype, torch.float32)
    if width is None:
        width = block_width(len(hidden_TH), len(weight_VH), exact.itemsize, hidden_TH.device.type)
    forbidden = sorted(set(forbidden_token_ids))
    if forbidden_F is None:
        forbidden_F = torch.tensor(forbidden, dtype=torch.int64, device=hidden_TH.device)
    return _TokenLogProbs.apply(
        hidden_TH, weight_VH, bias_V, targets_T, (forbidden, forbidden_F), temperature, width, entropy_gradient,
        fp32_logits,
    )  # fmt: skip


def plain_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    forbidden_token_ids: Sequence[int] = (),
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the same through the logits (T, V) and autograd: the reference for tests and benchmark."""
    logits = nn.functional.linear(hidden_TH, weight_VH, bias_V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    forbidden[list(forbidden_token_ids)] = True
    logprobs = logits.masked_fill(forbidden, float("-inf")).log_softmax(dim=-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = -(logprobs.exp() * logprobs.masked_fill(forbidden, 0.0)).sum(dim=-1)
    return logprobs.gather(-1, targets_T[:, None]).squeeze(-1), entropies


class LogProbHead(nn.Linear):
    """A model's output layer that also answers with log-probabilities; takes the layer's place and its parameters.

    The computation is inside the layer's own forward because ZeRO-3 gathers a partitioned weight by hooks around the
    module that owns it, and again before that module's backward. Called elsewhere, the weight would be empty.
    """

    def __init__(
        self,
        layer: nn.Linear,
        forbidden_token_ids: Sequence[int],
        temperature: float,
        entropy_gradient: bool = False,
        fp32_logits: bool = False,
    ) -> None:
        # A subclass or a LoRA wrapper computes something else than weight and bias say.
        assert type(layer) is nn.Linear, f"the output layer is a {type(layer).__name__}, not a plain linear one"
        nn.Module.__init__(self)  # not Linear's, which makes parameters of its own
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.temperature = temperature
        self._forbidden, self._entropy_gradient = sorted(set(forbidden_token_ids)), entropy_gradient
        # Where the weight is: nobody moves the buffers of a module that ZeRO-3 loaded partitioned.
        forbidden_F = torch.tensor(self._forbidden, dtype=torch.int64, device=layer.weight.device)
        self._forbidden_F: Tensor
        self.register_buffer("_forbidden_F", forbidden_F, persistent=False)
        self._fp32_logits = fp32_logits

    def forward(self, hidden: Tensor, targets_T: Tensor | None = None) -> Any:
        """With targets and hidden states (T, H): what `token_log_probs` returns. Without: the logits, as any head."""
        if targets_T is None:
            return super().forward(hidden)
        return token_log_probs(
            hidden,
            self.weight,
            self.bias,
            targets_T,
            self._forbidden,
            self.temperature,
            entropy_gradient=self._entropy_gradient,
            fp32_logits=self._fp32_logits,
            forbidden_F=self._forbidden_F,
        )


class _TokenLogProbs(torch.autograd.Function):
    """One node for all blocks: DeepSpeed's hook on a partitioned weight fires once, with the whole gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        forbidden: tuple[list[int], Tensor],
        temperature: float,
        width: int,
        entropy_gradient: bool,
        fp32_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(hidden_TH, weight_VH, bias_V, targets_T, forbidden, temperature, width, fp32_logits)
        # A finite start: with -inf, a block of nothing but forbidden tokens would give -inf - -inf.
        maxima_T = hidden_TH.new_full((len(hidden_TH),), torch.finfo(blocks.exact).min, dtype=blocks.exact)
        sums_T, products_T, chosen_T = (torch.zeros_like(maxima_T) for _ in range(3))
        exponentials = blocks.buffer()
        for start, logits_TB in blocks:
            columns = blocks.forbidden_columns(start, logits_TB)
            logits_TB.index_fill_(1, columns, float("-inf"))
            inside_T, columns_T = blocks.targets(start, logits_TB)
            chosen_T = torch.where(inside_T, logits_TB.gather(1, columns_T[:, None]).squeeze(1), chosen_T)
            new_maxima_T = torch.maximum(maxima_T, logits_TB.amax(dim=1))
            below_T = maxima_T - new_maxima_T
            rescale_T = below_T.exp()
            logits_TB.sub_(new_maxima_T[:, None])
            exp_TB = exponentials[: logits_TB.numel()].view(logits_TB.shape)
            torch.exp(logits_TB, out=exp_TB)
            block_sums_T = exp_TB.sum(dim=1)
            logits_TB.index_fill_(1, columns, 0.0)  # 0 x -inf
            products_T = rescale_T * (products_T + below_T * sums_T) + exp_TB.mul_(logits_TB).sum(dim=1)
            sums_T = rescale_T * sums_T + block_sums_T
            maxima_T = new_maxima_T
        log_sums_T = sums_T.log()
        entropies_T = log_sums_T - products_T / sums_T
        kept_T = entropies_T if entropy_gradient else None
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, maxima_T + log_sums_T, kept_T)
        ctx.settings = forbidden, temperature, width, fp32_logits
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies_T)
        return chosen_T - maxima_T - log_sums_T, entropies_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, bias_V, targets_T, normaliser_T, entropies_T = ctx.saved_tensors
        blocks = _Blocks(hidden_TH, weight_VH, bias_V, targets_T, *ctx.settings)
        # (p - [v = y]) is left unscaled: -g / temperature goes onto the two small factors instead of a pass over B.
        # With the entropy's gradient g_H it is p (g + g_H (log p + entropy)) - g [v = y], the scale -1 / temperature.
        of_target_T = torch.ones_like(normaliser_T) if entropies_T is None else gradients_T[0]
        scale_T1 = (gradients_T[0] / -blocks.temperature)[:, None]
        if entropies_T is not None:
            scale_T1 = torch.full_like(scale_T1, -1 / blocks.temperature)
            factors = blocks.buffer()
        scaled_TH = (hidden_TH * scale_T1).to(hidden_TH.dtype)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=blocks.exact) if for_hidden else None
        grad_weight_VH = torch.empty_like(weight_VH) if for_weight else None
        grad_bias_V = torch.empty_like(bias_V) if for_bias else None
        for start, probs_TB in blocks:
            rows = slice(start, start + probs_TB.shape[1])
            probs_TB.sub_(normaliser_T[:, None])
            if entropies_T is None:
                probs_TB.exp_()
            else:
                of_all_TB = factors[: probs_TB.numel()].view(probs_TB.shape)
                torch.add(probs_TB, entropies_T[:, None], out=of_all_TB)
                of_all_TB.mul_(gradients_T[1][:, None]).add_(gradients_T[0][:, None])
                probs_TB.exp_().mul_(of_all_TB)
            inside_T, columns_T = blocks.targets(start, probs_TB)
            probs_TB.scatter_add_(1, columns_T[:, None], -(inside_T * of_target_T)[:, None])
            probs_TB.index_fill_(1, blocks.forbidden_columns(start, probs_TB), 0.0)
            if grad_bias_V is not None:
                grad_bias_V[rows] = (probs_TB * scale_T1).sum(dim=0)
            factor_TB = probs_TB.to(hidden_TH.dtype)
            if grad_weight_VH is not None:
                torch.mm(factor_TB.t(), scaled_TH, out=grad_weight_VH[rows])
            if grad_hidden_TH is not None:
                if blocks.exact == hidden_TH.dtype:
                    grad_hidden_TH.addmm_(factor_TB, weight_VH[rows])
                else:
                    grad_hidden_TH += factor_TB @ weight_VH[rows]
        if grad_hidden_TH is not None:
            grad_hidden_TH = grad_hidden_TH.mul_(scale_T1).to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH, grad_bias_V, None, None, None, None, None, None


class _Blocks:
    """Walks through the vocabulary: first token of each block and its logits, in one buffer used again and again."""

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        forbidden: tuple[list[int], Tensor],
        temperature: float,
        width: int,
        fp32_logits: bool,
    ) -> None:
        self._fp32_logits = fp32_logits
        self._hidden_TH, self._weight_VH, self._bias_V = hidden_TH, weight_VH, bias_V
        self._targets_T, self._width = targets_T, width
        self._forbidden, self._forbidden_F = forbidden
        self.temperature = temperature
        self.exact = torch.promote_types(hidden_TH.dtype, torch.float32)

    def buffer(self) -> Tensor:
        """Room for a block. Made once a pass: on CPU, fresh pages cost as much time as the work on them."""
        return self._hidden_TH.new_empty(len(self._hidden_TH) * self._width, dtype=self.exact)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        num_tokens, vocabulary = len(self._hidden_TH), len(self._weight_VH)
        buffer = self.buffer()
        for start in range(0, vocabulary, self._width):
            rows = slice(start, min(start + self._width, vocabulary))
            logits_TB = buffer[: num_tokens * (rows.stop - start)].view(num_tokens, rows.stop - start)
            weight_HB = self._weight_VH[rows].t()
            if self._fp32_logits and self._hidden_TH.dtype != self.exact:
                logits_TB.copy_(self._exact_products(rows))
                yield start, logits_TB.div_(self.temperature)
                continue
            low = self._hidden_TH.dtype != self.exact
            product_TB = torch.empty_like(logits_TB, dtype=self._hidden_TH.dtype) if low else logits_TB
            if self._bias_V is None:
                torch.mm(self._hidden_TH, weight_HB, out=product_TB)
            else:
                torch.addmm(self._bias_V[rows], self._hidden_TH, weight_HB, out=product_TB)
            if low:
                logits_TB.copy_(product_TB)
                del product_TB
            if self.temperature != 1.0:
                logits_TB.div_(self.temperature)
            yield start, logits_TB

    def _exact_products(self, rows: slice) -> Tensor:
        weight_HB = self._weight_VH[rows].t()
        if self._hidden_TH.is_cuda:  # a kernel that rounds nothing, without copies in float32
            products_TB = torch.mm(self._hidden_TH, weight_HB, out_dtype=self.exact)
        else:
            products_TB = self._hidden_TH.to(self.exact) @ weight_HB.to(self.exact)
        return products_TB if self._bias_V is None else products_TB + self._bias_V[rows]

    def targets(self, start: int, block_TB: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each token's target is in the block, and its column there (any column where it is not)."""
        columns_T = self._targets_T - start
        inside_T = (columns_T >= 0) & (columns_T < block_TB.shape[1])
        return inside_T, columns_T.clamp(0, block_TB.shape[1] - 1)

    def forbidden_columns(self, start: int, block_TB: Tensor) -> Tensor:
        """Columns of the block that are never sampled."""
        first, end = (bisect_left(self._forbidden, token) for token in (start, start + block_TB.shape[1]))
        return self._forbidden_F[first:end] - start
