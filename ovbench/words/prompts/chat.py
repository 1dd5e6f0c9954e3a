"""Questions to a language model over an OpenAI-compatible HTTP endpoint, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any

from ovbench.errors import RunError, UsageError

_PATH = "/chat/completions"
_PASSING = {408, 429}  # of the client's errors those that another attempt may mend
_LONGEST_PAUSE = 60.0  # seconds, whatever a server asks for


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the endpoint that was named and to no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class Chat:
    """A model behind an endpoint.

    Attributes:
        endpoint: Base such as ``http://localhost:8000/v1``, or the whole address of ``chat/completions``.
        model: As the endpoint calls it.
        key: Sent as a bearer token; never written anywhere.
        timeout: Seconds to wait for one answer.
        attempts: How often a question is sent before the endpoint counts as broken.
        pause: Waits some seconds.
    """

    endpoint: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise UsageError(f"--endpoint '{self.endpoint}': give an address, e.g. http://localhost:8000/v1.")

    @property
    def url(self) -> str:
        """Where questions go."""
        base = self.endpoint.rstrip("/")
        return base if base.endswith(_PATH) else base + _PATH

    def ask(self, system: str, question: str) -> str:
        """The model's answer, blanks collapsed; a failing endpoint is asked again, with growing pauses.

        Raises:
            UsageError: The endpoint refuses the request (a wrong key, model or address).
            RunError: It does not answer as it should after all attempts.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = json.dumps({"model": self.model, "messages": messages}).encode("utf-8")
        trouble, wait = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                self.pause(min(wait, _LONGEST_PAUSE))
            wait = 2.0**attempt
            try:
                return _answer(self._send(body))
            except urllib.error.HTTPError as error:
                with error:
                    trouble = f"status {error.code}: {_excerpt(error.read(2000))}"
                    asked_for = error.headers.get("Retry-After", "")
                if error.code not in _PASSING and error.code < 500:
                    raise UsageError(
                        f"The endpoint refuses the request with {trouble} Check --endpoint, --model and --key-env."
                    ) from None
                if asked_for.isdigit():
                    wait = float(asked_for)
            except (OSError, http.client.HTTPException, ValueError) as error:
                trouble = f"{type(error).__name__}: {error}"
        raise RunError(
            f"The endpoint failed {self.attempts} times, last with {trouble.rstrip('.')}. What was answered is kept: "
            "go on with --resume."
        )

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
            content: bytes = response.read()
        return content


def _answer(content: bytes) -> str:
    """The text in a chat completion.

    Raises:
        ValueError: It is none, or empty.
    """
    found: Any = json.loads(content)
    try:
        text = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {_excerpt(content)}") from None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an empty answer")
    return " ".join(text.split())


def _excerpt(content: bytes) -> str:
    text = " ".join(content.decode("utf-8", "replace").split())
    return (text[:200] or "no text").rstrip(".") + "."
