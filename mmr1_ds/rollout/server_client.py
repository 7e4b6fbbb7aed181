"""One request to a rollout server: how it is asked, and what a healthy server's answer looks like."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mmr1_ds.records import Response, RolloutGroup, RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from PIL.Image import Image

GENERATE = "/inference/v1/generate"  # vLLM's: token ids in, token ids and log-probabilities out
_FORBID = -100.0  # vLLM clamps logit biases here; e^-100 is 0 beside any float32 probability
_MOST_ROUNDING = 1e-5  # by which a log-probability may be over 0


class Nonsense(ValueError):
    """An answer that no healthy server gives; the message never holds the answer itself."""


# What is read of an answer; the rest of it, most of the bytes, is passed over unparsed.
class _Token(msgspec.Struct):
    token_id: int
    logprob: float


class _Tokens(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _Tokens
    finish_reason: str
    weight_versions: list[_Span]


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class Exchange:
    """Writes the requests of a run and reads their answers."""

    def __init__(self, eos_token_ids: Sequence[int], forbidden_token_ids: Sequence[int], vocabulary_size: int) -> None:
        """forbidden_token_ids: never sampled; vocabulary_size: rows of the embedding."""
        self._eos = list(eos_token_ids)
        self._forbidden = frozenset(forbidden_token_ids)
        self._bias = {str(token): _FORBID for token in sorted(self._forbidden)}
        self._vocabulary_size = vocabulary_size
        self._decoder = msgspec.json.Decoder(_Answer)

    def body(self, request: RolloutRequest, settings: SamplingSettings, request_id: str, priority: int) -> bytes:
        """The request as JSON. priority: the lower the sooner."""
        body: dict[str, Any] = {
            "request_id": request_id,
            "token_ids": request.prompt.token_ids,
            "priority": priority,
            "sampling_params": {
                "n": request.num_responses,
                "seed": request.seed,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "max_tokens": request.max_tokens or settings.max_tokens,
                "logprobs": 0,  # the sampled token's only
                "logit_bias": self._bias,
                "stop_token_ids": self._eos,
                "detokenize": False,
            },
        }
        if request.prompt.images:
            body["content_parts"] = [{"type": "image_url", "url": _data_url(image)} for image in request.prompt.images]
        return msgspec.json.encode(body)

    def group(self, request: RolloutRequest, settings: SamplingSettings, answer: bytes) -> RolloutGroup:
        """The responses in an answer, every one of them checked. Raises: Nonsense."""
        try:
            choices = sorted(self._decoder.decode(answer).choices, key=lambda choice: choice.index)
        except msgspec.DecodeError as error:  # of what it is not, and where
            raise Nonsense(str(error)) from None
        if [choice.index for choice in choices] != list(range(request.num_responses)):
            raise Nonsense(f"{len(choices)} responses in place of {request.num_responses}")
        limit = request.max_tokens or settings.max_tokens
        responses = tuple(self._response(choice, limit) for choice in choices)
        oldest = min(version for response in responses for version, _ in response.policy_versions)
        return RolloutGroup(request.prompt, responses, oldest)

    def _response(self, choice: _Choice, limit: int) -> Response:
        tokens, content = tuple(choice.token_ids), choice.logprobs.content
        if not 0 < len(tokens) <= limit:
            raise Nonsense(f"{len(tokens)} tokens where 1 to {limit} were asked for")
        if [entry.token_id for entry in content] != choice.token_ids:
            raise Nonsense("log-probabilities of other tokens than those of the response")
        if not all(0 <= token < self._vocabulary_size for token in tokens) or not self._forbidden.isdisjoint(tokens):
            raise Nonsense("a token that cannot be sampled")
        logprobs = tuple(entry.logprob for entry in content)
        if not all(math.isfinite(value) and value <= _MOST_ROUNDING for value in logprobs):
            raise Nonsense("a log-probability that is not finite or over 0")
        finished = choice.finish_reason == "stop"
        if not finished and (choice.finish_reason != "length" or len(tokens) < limit):  # an abort, for one
            raise Nonsense(f"{len(tokens)} of {limit} tokens, ended by {choice.finish_reason[:20]!r}")
        return Response(tokens, logprobs, finished, _versions(choice))


def _versions(choice: _Choice) -> tuple[tuple[int, int], ...]:
    """(version, tokens sampled by it), in order."""
    end, found = 0, []
    for span in choice.weight_versions:
        if not span.version.isdecimal():
            raise Nonsense(f"weights that the run has not sent, {span.version[:20]!r}")
        if span.start != end or span.end <= span.start:
            raise Nonsense("weight versions with gaps")
        found.append((int(span.version), span.end - span.start))
        end = span.end
    if end != len(choice.token_ids):
        raise Nonsense(f"weight versions of {end} tokens for a response of {len(choice.token_ids)}")
    return tuple(found)


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # without loss; the network is not what rollouts wait for
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
