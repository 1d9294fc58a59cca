"""Errors as clients see them: OpenAI's JSON shape, the right status, a sentence that helps.

Everything the gateway refuses or fails is an `ApiError` by the time it reaches the client.
An engine's own 4xx is not one of these: `Rejected` carries its body, passed on as it came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import orjson

from cluster.errors import ClusterError, EngineFailed, KvMismatch, NoCapacity, PeerGone

Headers = list[tuple[bytes, bytes]]

# How answers commonly end (499: the client left). Metric labels.
STATUSES = (200, 400, 422, 429, 499, 500, 502, 503, 504)


class ApiError(ClusterError):
    """An answer that is an error. `retry_after_s` becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(status, message, type, param, code, retry_after_s, allow)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> Headers:
        headers: Headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def sse(self) -> bytes:
        """The same error as one server-sent event, for a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"


class Rejected(ClusterError):
    """An engine found the client's request at fault. Not a mark against the engine."""

    def __init__(self, status: int, body: bytes, content_type: bytes) -> None:
        super().__init__(status, body, content_type)
        self.status = status
        self.body = body
        self.content_type = content_type

    def __str__(self) -> str:
        return f"the engine answered {self.status}: {self.body[:300].decode(errors='replace')}"


class EngineLost(EngineFailed):
    """The engine went away while it worked on a request: the connection broke, or it said that it
    is dying."""


class EngineLeft(EngineFailed):
    """The gateway itself broke off, because the controller says that the worker ends, hangs or is
    gone."""


class EngineNotReached(EngineFailed):
    """The engine took no connection: it knows nothing of the request."""


def is_mark(error: EngineFailed) -> bool:
    """Whether it says something about the worker. A 4xx never does, not even of the kind that
    another worker may not give."""
    return error.status is None or not 400 <= error.status < 500


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def no_key() -> ApiError:
    return ApiError(
        401,
        "No API key was given; send it as `Authorization: Bearer KEY`.",
        code="missing_api_key",
    )


def wrong_key() -> ApiError:
    return ApiError(401, "The API key is not one of this endpoint's.", code="invalid_api_key")


def unknown_model(asked: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"The model `{asked[:200]}` does not exist here; this endpoint serves `{served}`.",
        param="model",
        code="model_not_found",
    )


def unknown_path(path: str) -> ApiError:
    return ApiError(404, f"There is nothing at {path[:200]}.", code="unknown_url")


def wrong_method(path: str, method: str, allow: Iterable[str]) -> ApiError:
    allowed = ", ".join(allow)
    return ApiError(
        405,
        f"{path} does not take {method}; use {allowed}.",
        code="method_not_allowed",
        allow=allowed,
    )


def body_too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than the {limit_bytes:,} bytes that this endpoint takes.",
        code="request_too_large",
    )


def context_length_exceeded(
    limit_tokens: int, prompt_tokens: int, answer_tokens: int, param: str
) -> ApiError:
    if answer_tokens and prompt_tokens < limit_tokens:
        found = (
            f"{prompt_tokens + answer_tokens} tokens ({prompt_tokens} in the prompt, "
            f"{answer_tokens} asked for as the answer)"
        )
    else:
        found = f"{prompt_tokens} tokens in the prompt"
    return ApiError(
        400,
        f"This model's maximum context length is {limit_tokens} tokens. However, you requested "
        f"{found}. Please shorten the prompt or the answer.",
        param=param,
        code="context_length_exceeded",
    )


def overloaded(why: str, retry_after_s: float) -> ApiError:
    return ApiError(
        429, why, type="requests", code="rate_limit_exceeded", retry_after_s=retry_after_s
    )


def no_capacity(why: str, retry_after_s: float) -> ApiError:
    return ApiError(
        503, why, type="server_error", code="no_worker_available", retry_after_s=retry_after_s
    )


def deadline_passed(deadline_s: float) -> ApiError:
    return ApiError(
        504,
        f"The request was not finished within its deadline of {deadline_s:g} s.",
        type="server_error",
        code="deadline_exceeded",
    )


def engine_failed(why: str) -> ApiError:
    return ApiError(502, why, type="server_error", code="engine_failed")


def request_kills_engines(workers: Iterable[str]) -> ApiError:
    # Not a 5xx: clients send those again by themselves, and would take down two more.
    return ApiError(
        422,
        f"Engines went down while they worked on this request, before they had answered anything: "
        f"{', '.join(workers)}. It was given to no other. If the request is not the cause, send it "
        "again.",
        code="request_kills_engines",
    )


def internal() -> ApiError:
    return ApiError(
        500, "The gateway failed; its log says why.", type="server_error", code="internal_error"
    )


def from_cluster(error: ClusterError) -> ApiError:
    """What a client is told about one of the project's own errors."""
    match error:
        case ApiError():
            return error
        case NoCapacity():
            return no_capacity(str(error), error.retry_after_s)
        case KvMismatch():
            return no_capacity(str(error), 30.0)
        case EngineFailed() | PeerGone():
            return engine_failed(str(error))
        case _:
            return internal()
