"""Errors in the form in which OpenAI's API gives them."""

from __future__ import annotations

import re
from typing import Any

from accessory.errors import AccessoryError, BusyError, InputError, RankError, is_users, one_line
from accessory.server.messages import MessagesRequest
from accessory.server.protocol import FIELDS
from accessory.server.responses import ResponsesRequest

# How messages begin that speak of a field: `messages[0]: …`, `structured_outputs.regex: …`.
_FIELD = re.compile(r"(([a-z_]+)(?:\.[a-z_]+|\[\d+\])*): ")
_FIELDS = FIELDS | MessagesRequest.model_fields.keys() | ResponsesRequest.model_fields.keys()
RETRY_AFTER = 1  # seconds after which a caller who found the queue full may try again


class ApiError(Exception):
    """An answer with an error. param: the field of the request that is wrong. headers: of the answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(_utf8(message))
        self.status, self.code, self.headers = status, code, headers
        self.param = None if param is None else _utf8(param)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _utf8(text: str) -> str:
    """JSON can hold half a surrogate pair, and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def api_error(error: BaseException) -> ApiError:
    """Any error as an answer. What is no user's mistake says no more than its kind: the log has the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(str(error), status=503, code="queue_full", headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, InputError):
        field = _FIELD.match(str(error))
        return ApiError(str(error), param=field[1] if field and field[2] in _FIELDS else None)
    if isinstance(error, RankError):
        return ApiError(str(error), status=503, code="ranks_lost", headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, AccessoryError) or is_users(error):
        return ApiError(one_line(error), status=500)
    return ApiError(f"the server failed ({type(error).__name__}); its log says more", status=500)
