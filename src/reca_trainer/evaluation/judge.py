"""Judges answer questions about images: a vision-language model of transformers, or one behind an OpenAI-compatible
endpoint. Anything with a `source` dict that is called as `judge(images, questions)` will do in their place."""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from transformers import pipeline


class JudgeError(OSError):
    """A judge that cannot be reached, refuses, or answers with something else than text."""


class LocalJudge:
    """An image-text-to-text model of transformers.

    Args:
        name: id or folder of the model.
        revision: commit, branch or tag on the Hub.
        dtype: of the weights; by default the checkpoint's.
        batch_size: questions answered at once.
        max_new_tokens: length limit of an answer.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 1,
        max_new_tokens: int = 16,
    ):
        self._ask = pipeline("image-text-to-text", model=name, revision=revision, device=device, dtype=dtype)
        if self._ask.tokenizer.pad_token_id is None:
            self._ask.tokenizer.pad_token_id = self._ask.tokenizer.eos_token_id
        self._ask.tokenizer.padding_side = "left"  # answers continue the right end
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        commit = getattr(self._ask.model.config, "_commit_hash", None)
        self.source = {"name": str(name), "revision": commit or revision}

    def __call__(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """The model's greedy answers, one per question, about the image at the same place."""
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(images, questions, strict=True)
        ]
        answers = self._ask(
            text=conversations,
            batch_size=self.batch_size,
            return_full_text=False,
            generate_kwargs={"do_sample": False, "max_new_tokens": self.max_new_tokens},
        )
        return [(answer[0] if isinstance(answer, list) else answer)["generated_text"].strip() for answer in answers]


class EndpointJudge:
    """A model behind an OpenAI-compatible chat completions endpoint (vLLM, `transformers serve`, a provider, …).

    Args:
        base_url: what `/chat/completions` is appended to, such as `http://localhost:8000/v1`.
        model: the model's name on that server.
        api_key: by default what the environment variable `OPENAI_API_KEY` holds, if anything.
        concurrency: questions asked at once.
        timeout: seconds to wait for an answer.
        retries: further attempts when the server is busy (429, 5xx) or does not answer.
        pause: seconds before the first retry; doubled each time.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        pause: float = 1.0,
        max_tokens: int = 16,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The judge's address is {base_url!r}; it must begin with http:// or https://.")
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self.api_key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self.concurrency, self.timeout, self.retries, self.pause = concurrency, timeout, retries, pause
        self.max_tokens = max_tokens
        self.source = {"name": model, "endpoint": base_url}

    def __call__(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """The server's answers at temperature 0, one per question, about the image at the same place.

        Raises:
            JudgeError: no answer after all retries, a refusal, or a reply that is no chat completion.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._answer, images, questions))

    def _answer(self, image: Image.Image, question: str) -> str:
        data = io.BytesIO()
        image.save(data, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        reply = self._post(body)
        try:
            return (reply["choices"][0]["message"]["content"] or "").strip()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise JudgeError(f"{self.url} replied with no chat completion: {str(reply)[:300]}") from error

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise JudgeError(f"{self.url} refused ({reason}). Check the model's name and the key.") from error
            except ValueError as error:
                raise JudgeError(f"{self.url} did not reply with JSON: {error}") from error
            except OSError as error:  # no connection, or a timeout
                reason = str(error)
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise JudgeError(f"{self.url} gave no answer in {self.retries + 1} attempts; the last failed with {reason}.")
