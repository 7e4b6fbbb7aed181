"""A rollout server of no weight, in a thread of the test: it answers each request as the script says."""

import asyncio
import json
import threading
import zlib
from contextlib import contextmanager

from aiohttp import web

KEY = "the-key-of-this-test"
VOCABULARY, EOS, FORBIDDEN = 1000, 999, (7, 8)


def tokens_of(body, response):
    """What a healthy server samples: derived from seed and prompt, so that a mix-up shows."""
    settings = body["sampling_params"]
    seed = zlib.crc32(repr((list(body["token_ids"]), settings["seed"] + response)).encode())
    length = 1 + seed % settings["max_tokens"]
    tokens = [10 + (seed + 31 * i) % 900 for i in range(length)]
    return tokens if length == settings["max_tokens"] else [*tokens[:-1], EOS]


def good_answer(body, version="3"):
    choices = []
    for index in range(body["sampling_params"]["n"]):
        tokens = tokens_of(body, index)
        content = [{"token_id": t, "logprob": -0.5 - i, "rank": 1, "top_logprobs": []} for i, t in enumerate(tokens)]
        choices.append(
            {
                "index": index,
                "token_ids": tokens,
                "logprobs": {"content": content},
                "finish_reason": "stop" if tokens[-1] == EOS else "length",
                "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
            }
        )
    return {"choices": choices}


class ScriptedServer:
    """`script(body)` says what becomes of a request.

    None: a good answer; a mapping: this answer; bytes: this body; (status, text); or one of the words hang | late |
    close | half | garbage | redirect | endless. A late one is answered when `free` is set. `lives` is what
    /weight_info says: True, a status, or "hang".
    """

    def __init__(self):
        self.script, self.lives, self.version = (lambda body: None), True, "3"
        self.bodies, self.headers, self.paths, self.num_disconnected = [], [], [], 0
        self.changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self.free = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, 10), "it did not happen"

    def set_free(self):
        self._loop.call_soon_threadsafe(self.free.set)

    def close(self):
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self, started):
        async def main():
            self._over = asyncio.Event()
            app = web.Application(client_max_size=2**26)
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            started.set()
            await self._over.wait()
            await runner.cleanup()

        self._loop.run_until_complete(main())
        self._loop.close()

    async def _answer(self, request):
        self.paths.append(request.path)
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.Response(status=401)
        if request.path != "/inference/v1/generate":
            if self.lives == "hang":
                await asyncio.Event().wait()
            return web.json_response({}, status=200 if self.lives is True else self.lives)
        body = json.loads(await request.read())
        with self.changed:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.changed.notify_all()
        try:
            return await self._do(self.script(body), body, request)
        except asyncio.CancelledError:
            with self.changed:
                self.num_disconnected += 1
                self.changed.notify_all()
            raise

    async def _do(self, told, body, request):
        good = good_answer(body, self.version)
        if told is None:
            return web.json_response(good)
        if isinstance(told, dict):
            return web.json_response(told)
        if isinstance(told, bytes):
            return web.Response(body=told)
        if isinstance(told, tuple):
            return web.Response(status=told[0], text=told[1])
        if told == "hang":
            await asyncio.Event().wait()
        if told == "late":
            await self.free.wait()
            return web.json_response(good)
        if told == "redirect":
            return web.Response(status=307, headers={"Location": "/elsewhere"})
        text = json.dumps(good).encode()
        if told == "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b" " * 2**16)
        if told == "half":
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n".encode()
            request.transport.write(head + text[: len(text) // 2])
        elif told == "garbage":
            request.transport.write(b"\x00\x01 this is no HTTP\r\n\r\n")
        request.transport.close()
        return web.Response()


@contextmanager
def scripted_servers(count):
    servers = [ScriptedServer() for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
