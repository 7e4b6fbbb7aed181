"""One request to a rollout server: how it is asked, what a healthy server's answer looks like, and who is at fault."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import aiohttp
import msgspec
import numpy as np

from mmr1_ds.records import Response, RolloutGroup, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.options import shaping

if TYPE_CHECKING:
    from PIL.Image import Image

GENERATE = "/inference/v1/generate"  # vLLM's: token ids in, token ids and log-probabilities out
_FORBID = -100.0  # vLLM clamps logit biases here; e^-100 is 0 beside any float32 probability
_MOST_ROUNDING = 1e-5  # by which a log-probability may be over 0
_NO_LOGPROB = -9999.0  # what vLLM writes for one that is NaN, minus infinity or missing
_LONGEST_VERSION = 18  # digits
_MOST_BYTES, _MOST_BYTES_A_TOKEN = 2**20, 512  # of an answer; vLLM writes about 140 a token

# Answered by the engine itself, between two of its steps: /health is the front end's, which does not notice a hang.
_SIGN_OF_LIFE = "/weight_info"
_REQUESTS_FAULT = (400, 404, 413, 422)
_MOST_BYTES_OF_AN_ERROR, _MOST_WORDS = 2**14, 300


class Fault(Exception):
    """A server has not done what it was asked. The message holds neither the key nor the tokens of an answer."""

    counted_as: ClassVar[str] = ""
    is_lost = False  # it is not worth asking as it is

    def __init__(self, words: str, is_lost: bool = False) -> None:
        super().__init__(words)
        self.is_lost = self.is_lost or is_lost


class Nonsense(Fault):
    """An answer that no healthy server gives."""

    counted_as = "num_nonsense_responses"


class UnknownWeights(Nonsense):
    """Sampled with weights that the run has not sent: the server was started anew and has its first ones."""

    is_lost = True


class TooLate(Fault):
    """The request's deadline is over."""

    counted_as = "num_request_timeouts"


# What is read of an answer; the rest of it, most of the bytes, is passed over unparsed.
class _Token(msgspec.Struct, gc=False):
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
    weight_versions: list[_Span] | None


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
        self.adapter: str | None = None  # the name of LoRA's adapter that samples; None = the weights do
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
                **shaping(settings),
            },
        }
        if self.adapter is not None:
            body["model"] = self.adapter
        if request.prompt.images:
            body["content_parts"] = [{"type": "image_url", "url": _data_url(image)} for image in request.prompt.images]
        return msgspec.json.encode(body)

    def group(self, request: RolloutRequest, settings: SamplingSettings, answer: bytes) -> RolloutGroup:
        """The responses in an answer, every one of them checked. Raises: Nonsense."""
        try:
            choices = sorted(self._decoder.decode(answer).choices, key=lambda choice: choice.index)
        except (msgspec.DecodeError, RecursionError, UnicodeError) as error:  # of what it is not, and where
            raise Nonsense(f"nonsense: {str(error)[:_MOST_WORDS]}") from None
        if [choice.index for choice in choices] != list(range(request.num_responses)):
            raise Nonsense(f"nonsense: {len(choices)} responses in place of {request.num_responses}")
        limit = request.max_tokens or settings.max_tokens
        responses = tuple(self._response(choice, limit) for choice in choices)
        oldest = min(version for response in responses for version, _ in response.policy_versions)
        return RolloutGroup(request.prompt, responses, oldest)

    def most_bytes(self, request: RolloutRequest, settings: SamplingSettings) -> int:
        """More than any answer has."""
        limit = request.max_tokens or settings.max_tokens
        return _MOST_BYTES + _MOST_BYTES_A_TOKEN * request.num_responses * limit

    def _response(self, choice: _Choice, limit: int) -> Response:
        tokens, content = choice.token_ids, choice.logprobs.content
        if not 0 < len(tokens) <= limit:
            raise Nonsense(f"nonsense: {len(tokens)} tokens where 1 to {limit} were asked for")
        if [entry.token_id for entry in content] != tokens:
            raise Nonsense("nonsense: log-probabilities of other tokens than those of the response")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary_size or not self._forbidden.isdisjoint(tokens):
            raise Nonsense("nonsense: a token that cannot be sampled")
        logprobs = [entry.logprob for entry in content]
        # The sum is for NaN, which compares as it likes.
        if not math.isfinite(sum(logprobs)) or min(logprobs) <= _NO_LOGPROB or max(logprobs) > _MOST_ROUNDING:
            raise Nonsense("nonsense: a log-probability that is not finite or over 0")
        finished = choice.finish_reason == "stop"
        if not finished and (choice.finish_reason != "length" or len(tokens) < limit):  # an abort, for one
            raise Nonsense(f"nonsense: {len(tokens)} of {limit} tokens, ended by {choice.finish_reason[:20]!r}")
        arrays = np.array(tokens, dtype=np.int32), np.array(logprobs, dtype=np.float32)
        return Response(*arrays, finished, _versions(choice))


class ServerClient:
    """Asks servers over HTTP. Everything it raises as a Fault is the server's; all else is the request's, or ours."""

    def __init__(
        self, exchange: Exchange, key: str, server_timeout_seconds: float, request_timeout_seconds: float
    ) -> None:
        """server_timeout_seconds: for a connection and a sign of life; request_timeout_seconds: for all responses."""
        self._exchange, self._key = exchange, key
        self._server_timeout_seconds = server_timeout_seconds
        self._request_timeout_seconds = request_timeout_seconds

    async def __aenter__(self) -> ServerClient:
        # Without the environment's proxies, aiohttp's default; without decompression, which vLLM has no use for.
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(None, sock_connect=self._server_timeout_seconds),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            read_bufsize=2**18,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def group(
        self, url: str, request: RolloutRequest, settings: SamplingSettings, request_id: str, priority: int
    ) -> RolloutGroup:
        """Have one server sample. Raises: Fault; RuntimeError, which names the prompt, for what no server can do."""
        name = request.prompt.prompt_id
        try:
            # In a thread: images are compressed meanwhile, which lets others run.
            body = await asyncio.to_thread(self._exchange.body, request, settings, request_id, priority)
        except Exception as error:  # an image that cannot be read is an OSError: not to be taken for a connection's
            raise RuntimeError(f"prompt {name!r} cannot be written into a request: {error}") from error
        status, content = await self._post(url, body, self._exchange.most_bytes(request, settings))
        if status == 200:
            return self._exchange.group(request, settings, content)
        words = " ".join(content.decode(errors="replace").replace(self._key, "...")[:_MOST_WORDS].split())
        words = f"it answers {status}, {words!r},"
        # A server that is starting or ending, or whose engine is dead, refuses whatever it is asked, some with 400.
        await self._check_life(url, words)
        adapter = self._exchange.adapter
        if status == 404 and adapter is not None and adapter in words:  # started anew, it has no adapter yet
            raise Fault(words, is_lost=True)
        if status in _REQUESTS_FAULT:
            raise RuntimeError(f"{words} to prompt {name!r}")
        raise Fault(words)

    async def sign_of_life(self, url: str) -> str:
        """What is wrong with a server; empty when nothing is."""
        try:
            async with asyncio.timeout(self._server_timeout_seconds):
                async with self._session.get(url + _SIGN_OF_LIFE, allow_redirects=False) as answer:
                    answer.close()  # whatever it goes on to say
                    return "" if answer.status == 200 else f"it answers {answer.status} when asked for a sign of life"
        except TimeoutError:
            return f"no sign of life for {self._server_timeout_seconds:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return f"it takes no connection ({type(error).__name__})"

    async def _post(self, url: str, body: bytes, most_bytes: int) -> tuple[int, bytes]:
        """Status and content of the answer. Raises: Fault."""
        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self._request_timeout_seconds):
                # A redirection would carry the key to wherever it points.
                async with self._session.post(
                    url + GENERATE, data=body, headers=headers, allow_redirects=False
                ) as answer:
                    if answer.status != 200:
                        content = await _read(answer.content, _MOST_BYTES_OF_AN_ERROR)
                        answer.close()  # it may not have read all of the request, and never will
                        return answer.status, content
                    content = await _read(answer.content, most_bytes)
                    if len(content) > most_bytes:
                        raise Nonsense(f"nonsense: more than {most_bytes} bytes")
                    return 200, content
        except aiohttp.ConnectionTimeoutError:
            raise Fault("it takes no connection", is_lost=True) from None
        except TimeoutError:
            fault: Fault = TooLate(f"no answer within {self._request_timeout_seconds:g} s")
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):  # the configuration's fault
            raise
        except (aiohttp.ClientError, OSError) as error:
            # Not its own words, nor the error as the cause: some hold the request's headers.
            fault = Fault(f"the connection is lost ({type(error).__name__})")
        await self._check_life(url, str(fault))
        raise fault

    async def _check_life(self, url: str, words: str) -> None:
        """Raises: Fault when the server gives no sign of life: then that is what is wrong."""
        if fault := await self.sign_of_life(url):
            raise Fault(f"{words.rstrip(',')}; {fault}", is_lost=True)


async def _read(content: aiohttp.StreamReader, most_bytes: int) -> bytes:
    """All of it; of what is longer, the first `most_bytes` and some more."""
    parts, size = [], 0
    async for part in content.iter_any():
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            break
    return b"".join(parts)


def _versions(choice: _Choice) -> tuple[tuple[int, int], ...]:
    """(version, tokens sampled by it), in order."""
    end, found = 0, []
    for span in choice.weight_versions or ():
        if not (span.version.isascii() and span.version.isdecimal() and len(span.version) <= _LONGEST_VERSION):
            raise UnknownWeights(f"nonsense: weights that the run has not sent, {span.version[:20]!r}")
        if span.start != end or span.end <= span.start:
            raise Nonsense("nonsense: weight versions with gaps")
        found.append((int(span.version), span.end - span.start))
        end = span.end
    if end != len(choice.token_ids):
        raise Nonsense(f"nonsense: weight versions of {end} tokens for a response of {len(choice.token_ids)}")
    return tuple(found)


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # without loss; the network is not what rollouts wait for
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
