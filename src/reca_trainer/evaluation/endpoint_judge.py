"""A judge behind an OpenAI-compatible endpoint, over HTTP. It answers as `judge.LocalJudge` does."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal
from PIL import Image


class JudgeError(OSError):
    """A judge that cannot be reached, refuses, or answers with something else than text."""


class EndpointJudge:
    """A model behind an OpenAI-compatible chat completions endpoint (vLLM, `transformers serve`, a provider, …).

    A run may be left alone with any server. Every wait ends, replies are read up to a limit, and whatever a server may do
    better next time is tried again. Redirects are refused, so the key reaches the given address only. No message and no
    report holds the key, even where the server's reply repeats it.

    Args:
        base_url: what `/chat/completions` is appended to, such as `http://localhost:8000/v1`.
        model: the model's name on that server.
        api_key: by default what the environment variable `OPENAI_API_KEY` holds, if anything.
        concurrency: questions asked at once.
        timeout: seconds one attempt may take, from connecting to the last byte of the reply.
        deadline: seconds a question may take, with all its attempts and the pauses between them.
        retries: further attempts when the server is busy (408, 425, 429, 5xx), does not answer in time, breaks off, or
            replies with anything but a chat completion.
        pause: seconds before the first retry; doubled each time. The server's `Retry-After` takes its place.
        max_tokens: length limit of an answer.

    Raises:
        ValueError: `base_url` is no HTTP address or holds more than a path, or the key holds characters that no key has.
    """

    reply_limit = 1 << 20  # bytes; an answer has a few hundred

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        deadline: float = 600.0,
        retries: int = 5,
        pause: float = 1.0,
        max_tokens: int = 16,
    ):
        _check_address(base_url)
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self._key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise ValueError("The judge's key (OPENAI_API_KEY) holds a blank, a line break or a letter beyond ASCII.")
        self.concurrency, self.timeout, self.deadline = concurrency, timeout, deadline
        self.retries, self.pause, self.max_tokens = retries, pause, max_tokens
        self.source = {"name": model, "endpoint": base_url}

    def __call__(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """The server's answers at temperature 0, one per question, about the image at the same place.

        Raises:
            JudgeError: no answer after all retries or at the deadline, a refusal, or a redirect.
        """
        urls = {id(image): _data_url(image) for image in images}
        requests = [(urls[id(image)], question) for image, question in zip(images, questions, strict=True)]
        try:
            with start_blocking_portal() as portal:  # works inside a notebook's event loop, and Ctrl-C ends it
                return portal.call(self._answer, requests)
        except ExceptionGroup as failures:  # the first failure cancels the other questions
            raise failures.exceptions[0] from None

    def _body(self, image_url: str, question: str) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        return json.dumps(body).encode()

    async def _answer(self, requests: list[tuple[str, str]]) -> list[str]:
        answers = [""] * len(requests)
        free = anyio.Semaphore(self.concurrency)
        # No compression: what is counted against the limit is then what arrives in memory.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"

        async def answer(number: int) -> None:
            async with free:
                answers[number] = await self._ask(client, self._body(*requests[number]))

        client = httpx2.AsyncClient(headers=headers, timeout=None, follow_redirects=False)
        async with client, anyio.create_task_group() as group:
            for number in range(len(requests)):
                group.start_soon(answer, number)
        return answers

    async def _ask(self, client: httpx2.AsyncClient, body: bytes) -> str:
        """The answer to one question."""
        failure, tried = _Failure("no reply"), f"within {self.deadline:g} seconds"
        with anyio.move_on_after(self.deadline) as limit:
            for attempt in range(self.retries + 1):
                if attempt:
                    pause = self.pause * 2 ** (attempt - 1) if failure.retry_after is None else failure.retry_after
                    if anyio.current_time() + pause > limit.deadline:
                        break
                    await anyio.sleep(pause)
                try:
                    with anyio.fail_after(self.timeout):
                        return await self._attempt(client, body)
                except _Failure as error:
                    failure = error
                except TimeoutError:
                    failure = _Failure(f"no complete reply in {self.timeout:g} seconds")
                except httpx2.TransportError as error:
                    failure = _Failure(self._printable(str(error)) or type(error).__name__)
            else:
                tried = f"in {self.retries + 1} attempts"
        raise JudgeError(f"{self.url} gave no answer {tried}; the last attempt failed with {failure}.")

    async def _attempt(self, client: httpx2.AsyncClient, body: bytes) -> str:
        async with client.stream("POST", self.url, content=body) as response:
            code, reply = response.status_code, bytearray()
            if 300 <= code < 400:
                target = self._printable(response.headers.get("Location", "nowhere"))
                raise JudgeError(
                    f"{self.url} redirects to {target} (HTTP {code}). The key is not taken along: give the address that "
                    "answers."
                )
            async for part in response.aiter_raw():
                reply += part
                if len(reply) > self.reply_limit:
                    raise _Failure(f"HTTP {code} and a reply of more than {self.reply_limit} bytes")
        text = reply.decode("utf-8", errors="replace")
        if code in (408, 425, 429) or code >= 500:
            raise _Failure(f"HTTP {code}: {self._printable(text)}", _seconds(response.headers.get("Retry-After")))
        if code >= 400:
            refusal = f"HTTP {code}: {self._printable(text)}"
            raise JudgeError(f"{self.url} refused ({refusal}). Check the model's name and the key.")
        kind = self._printable(response.headers.get("Content-Type", "a reply without a type"))
        try:
            completion = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Failure(f"a reply that is no JSON ({kind}): {self._printable(text)}") from error
        try:
            content = completion["choices"][0]["message"]["content"]
            answer = "" if content is None else content.strip()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Failure(f"a reply that is no chat completion: {self._printable(text)}") from error
        # Half a surrogate pair fits in no file.
        return self._without_key(answer.encode("utf-8", errors="replace").decode("utf-8"))

    def _without_key(self, text: str) -> str:
        # What is as short as a word of an answer is no secret but a placeholder.
        return text.replace(self._key, "…") if len(self._key) >= 8 else text

    def _printable(self, text: str) -> str:
        """The beginning of what a server wrote, without the key and without control characters."""
        text = self._without_key(text)
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:300]


class _Failure(Exception):
    """An attempt that another may better; `retry_after` is the pause in seconds that the server asks for, if any."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


def _check_address(base_url: str) -> None:
    """Refuse an address that cannot be asked, or that would carry a secret into reports. The message does not repeat it."""
    try:
        address = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"The judge's address is no URL: {error}.") from None
    if address.scheme not in ("http", "https") or not address.host or not 0 < (address.port or 80) < 1 << 16:
        raise ValueError(
            "The judge's address must begin with http:// or https:// and name a host, and a port if need be."
        )
    if address.userinfo or address.query or address.fragment:
        raise ValueError(
            "The judge's address must hold no user, password or parameters, for it is written into reports; a key "
            "belongs in OPENAI_API_KEY."
        )


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _seconds(retry_after: str | None) -> float | None:
    """The header `Retry-After` (RFC 9110, 10.2.3), seconds or a date, in seconds from now; `None` where it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
