"""Runs in a rollout server: no request passes without the key of the run.

vLLM's own key guards the routes under /v1 and a few more; those that pause the engine and replace its weights are
open. This middleware is the outermost and looks at no path, so that a route added later is guarded too.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "MMR1_DS_SERVER_KEY"  # inside a server, whatever the user's variable is called

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_REFUSED = b'{"error":"unauthorized"}'
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_REFUSED)).encode()),
    (b"www-authenticate", b"Bearer"),
    (b"connection", b"close"),  # the body of a refused request is not read
]


class ServerGuard:
    """ASGI middleware: 401 for every request, websockets included, without `Authorization: Bearer KEY`."""

    def __init__(self, app: Application) -> None:
        """Raises: RuntimeError without a key in the environment: a server is never open."""
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set: a rollout server does not run without a key")
        self._app = app
        self._expected = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification. Only `lifespan`, which no client can send, passes without the key."""
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _REFUSED})
        elif "websocket.http.response" in scope.get("extensions", {}):
            await receive()  # websocket.connect
            await send({"type": "websocket.http.response.start", "status": 401, "headers": _HEADERS})
            await send({"type": "websocket.http.response.body", "body": _REFUSED})
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the client sees 403

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._expected)
