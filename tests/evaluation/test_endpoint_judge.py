"""A judge that can be left alone with any server: real connections to servers that redirect, drip, flood, break off and lie."""

import asyncio
import gzip
import json
import logging
import socket
import socketserver
import threading
import time
import traceback
from email.utils import formatdate
from functools import partial

import pytest
from PIL import Image

from reca_trainer.cli import main
from reca_trainer.evaluation.endpoint_judge import EndpointJudge, JudgeError

KEY = "sk-0123456789-secret"
IMAGE = Image.new("RGB", (4, 4), "red")


class Server(socketserver.ThreadingTCPServer):
    """Replies to the n-th request with what the n-th of `replies` (then the last) writes to the connection: bytes, or a
    function of the request and the connection. Connections are closed after one reply."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.sent = replies, [], 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # the judge hung up

    def repeat(self, connection, part, pause=0.0):
        """Send `part` until the other side hangs up."""
        while not self.ended.wait(pause):
            connection.sendall(part)
            self.sent += len(part)


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        request = self.request.recv(65536)
        if not request.startswith(b"POST "):  # TLS
            return
        while b"\r\n\r\n" not in request:
            request += self.request.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        [length] = [
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        ]
        while len(body) < length:
            body += self.request.recv(65536)
        with self.server.lock:
            self.server.requests.append(head.decode())
            reply = self.server.replies[min(len(self.server.requests), len(self.server.replies)) - 1]
        if callable(reply):
            reply(self.server, head.decode(), self.request)
        else:
            self.request.sendall(reply)


def reply(body=b"", status="200 OK", **headers):
    headers = {"Content_Length": len(body), "Connection": "close", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + (body if isinstance(body, bytes) else body.encode())


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


YES = reply(completion("Yes."))


def ask(url, questions=1, **options):
    options = {"api_key": KEY, "pause": 0, "retries": 1, "timeout": 20, "deadline": 60, **options}
    return EndpointJudge(url, "m", **options)([IMAGE] * questions, ["Is it red?"] * questions)


def refusal(url, **options):
    """The message of the error that a question ends with; the key is nowhere in it, nor in its traceback."""
    with pytest.raises(JudgeError) as caught:
        ask(url, **options)
    text = "".join(traceback.format_exception(caught.value))
    assert KEY not in text and isinstance(caught.value, OSError)
    return str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["another port", "another name", "itself", "//", "http://[", None])
def test_no_redirect_takes_the_key_along(status, place):
    with Server(YES) as other:
        port = other.server_address[1]
        location = {"another port": f"{other.url}/chat/completions", "another name": f"http://localhost:{port}/"}
        location = location.get(place, "/v1/there" if place == "itself" else place)
        with Server(reply(status=f"{status} Moved", Location=location)) as server:
            message = refusal(server.url)
            assert other.requests == []
            assert all(" /v1/chat/completions " in request.split("\r\n")[0] for request in server.requests)
    assert "redirects to" in message or "invalid" in message.lower()


def test_the_key_reaches_the_address_that_was_given():
    with Server(YES) as server:
        assert ask(server.url) == ["Yes."]
        assert f"authorization: bearer {KEY}" in server.requests[0].lower()


def endless_head(server, request, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    server.repeat(connection, b"x", pause=0.01)


def endless_body(server, request, connection):
    connection.sendall(reply(Content_Length=1000))
    server.repeat(connection, b" ", pause=0.01)


def silence(server, request, connection):
    server.ended.wait()


@pytest.mark.parametrize("slow", [silence, endless_head, endless_body])
def test_a_reply_that_drips_is_given_up(slow):
    with Server(slow) as server:
        message = refusal(server.url, timeout=0.2)
        assert "gave no answer in 2 attempts; the last attempt failed with no complete reply in 0.2 seconds" in message
        assert len(server.requests) == 2
        assert "within 0.2 seconds" in refusal(server.url, deadline=0.2)
    with Server(slow, YES) as server:
        assert ask(server.url, timeout=0.5) == ["Yes."]


def test_a_question_ends_at_its_deadline_whatever_is_left_to_try():
    with Server(reply(b"later", "503 Busy")) as server:
        message = refusal(server.url, retries=10**6, deadline=0.3)
    assert "no answer within 0.3 seconds; the last attempt failed with HTTP 503: later" in message


def flood(server, request, connection):
    connection.sendall(reply(Content_Length=400_000_000))
    server.repeat(connection, b"x" * 65536)


def endless_flood(server, request, connection):
    connection.sendall(reply(Content_Length=None, Transfer_Encoding="chunked"))
    server.repeat(connection, b"10000\r\n" + b"x" * 65536 + b"\r\n")


def crumbs(server, request, connection):
    connection.sendall(reply(Content_Length=None, Transfer_Encoding="chunked"))
    server.repeat(connection, b"1\r\nx\r\n" * 65536)


def headers(server, request, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    server.repeat(connection, b"X-More: " + b"x" * 65536 + b"\r\n")


@pytest.mark.parametrize("large", [flood, endless_flood, crumbs, headers])
def test_a_reply_is_read_up_to_a_limit(large, monkeypatch):
    if large is crumbs:  # a million of them take their time
        monkeypatch.setattr(EndpointJudge, "reply_limit", 1 << 14)
    with Server(large) as server:
        message = refusal(server.url, retries=0)
        assert f"more than {EndpointJudge.reply_limit} bytes" in message or large is headers
    assert server.sent < 40_000_000  # what the two ends of the connection buffer included


def test_a_compressed_reply_is_not_inflated():
    bomb = gzip.compress(bytes(1 << 20)) * 400  # 400 MB
    assert len(bomb) < EndpointJudge.reply_limit
    with Server(reply(bomb, Content_Encoding="gzip", Content_Type="application/json")) as server:
        assert "no JSON (application/json)" in refusal(server.url)
        assert "accept-encoding: identity" in server.requests[0].lower()


NESTED = b"[" * 10_000 + b"]" * 10_000
UNUSABLE = {
    "cut off": reply(completion("Yes.")[:20], Content_Length=1000),
    "cut off in a chunk": reply(b"1000\r\n{", Content_Length=None, Transfer_Encoding="chunked"),
    "cut off in the head": b"HTTP/1.1 200 OK\r\nContent-",
    "nothing": b"",
    "no HTTP": bytes(range(256)) * 8,
    "another protocol": b"SSH-2.0-OpenSSH_9.9\r\n",
    "empty": reply(),
    "no content": reply(status="204 No Content"),
    "garbage": reply(bytes(range(256))),
    "a web page": reply("<html>\x1b[2J Sign in</html>", Content_Type="text/html"),
    "half a completion": reply(completion("Yes.")[:-1]),
    "nested": reply(NESTED),
    "nested in a completion": reply(b'{"choices": %s}' % NESTED),
    "nested without an end": reply(b'{"a":' * 10_000),
    "a number too long": reply(b"9" * 10_000),
    "null": reply(b"null"),
    "no choice": reply(b'{"choices": []}'),
    "choices by name": reply(b'{"choices": {"0": 1}}'),
    "a number for an answer": reply(completion(7)),
    "parts for an answer": reply(completion([{"type": "text", "text": "Yes."}])),
    "an error": reply(b'{"error": "overloaded"}'),
    "500": reply(b"no", "500 Internal Server Error"),
    "429": reply(b"slowly", "429 Too Many Requests"),
    "408": reply(b"late", "408 Request Timeout"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_reply_that_cannot_be_used_is_asked_for_again(name):
    with Server(UNUSABLE[name], UNUSABLE[name], YES) as server:
        assert ask(server.url, retries=2) == ["Yes."] and len(server.requests) == 3
    with Server(UNUSABLE[name]) as server:
        message = refusal(server.url, retries=1)
        assert "gave no answer in 2 attempts; the last attempt failed with " in message and len(server.requests) == 2
        assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_asked_for_again(status):
    with Server(reply(b"no such model", f"{status} No")) as server:
        assert f"refused (HTTP {status}: no such model)" in refusal(server.url, retries=3)
        assert len(server.requests) == 1


def test_a_refusal_ends_the_other_questions():
    with Server(reply(status="401 Unauthorized")) as server:
        refusal(server.url, questions=50, concurrency=1)
        assert len(server.requests) == 1


def test_an_answer_is_read_whatever_its_type_is_called():
    with Server(reply(completion("Yes."), Content_Type="text/plain; charset=latin-1")) as server:
        assert ask(server.url) == ["Yes."]
    with Server(reply(completion(None))) as server:
        assert ask(server.url) == [""]
    with Server(reply(completion("No \ud800."))) as server:
        assert ask(server.url) == ["No ?."]  # can be written into results.jsonl


def test_the_pause_that_a_server_asks_for_is_kept():
    busy = "429 Too Many Requests"
    for wait in ("0", formatdate(time.time() - 60, usegmt=True)):  # instead of a pause beyond the deadline
        with Server(reply(status=busy, Retry_After=wait), YES) as server:
            assert ask(server.url, pause=1000) == ["Yes."]
    for wait in ("3600", formatdate(time.time() + 3600, usegmt=True)):  # no use in waiting for a deadline
        with Server(reply(status=busy, Retry_After=wait), YES) as server:
            assert "no answer within 60 seconds; the last attempt failed with HTTP 429" in refusal(server.url)
            assert len(server.requests) == 1
    for wait in ("soon", "-1", "", "1e999", "Mon, 99999999999999999999 Jan 2024 00:00:00 GMT"):  # no pause at all
        with Server(reply(status=busy, Retry_After=wait), YES) as server:
            assert ask(server.url) == ["Yes."]


def echo(status):
    def answer(server, request, connection):
        connection.sendall(reply(request, f"{status} Echo"))

    return answer


def test_an_answer_that_repeats_the_key_comes_without_it():
    with Server(reply(completion(f"Yes, {KEY}."))) as server:
        assert ask(server.url) == ["Yes, …."]
    with Server(YES) as server:
        assert ask(server.url, api_key="e") == ["Yes."]  # a placeholder


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_key_is_in_no_message_and_in_no_log(status, caplog):
    caplog.set_level(logging.DEBUG)
    with Server(echo(status)) as server:
        assert "…" in refusal(server.url)  # in its place
    assert caplog.records and all(KEY not in record.getMessage() for record in caplog.records)
    judge = EndpointJudge("http://127.0.0.1/v1", "m", api_key=KEY)
    assert KEY not in repr(judge) + json.dumps(judge.source)


@pytest.mark.parametrize(
    "failure", [echo(401), reply(NESTED), reply(status="302 Found", Location="http://localhost/")]
)
def test_the_command_line_prints_one_line(failure, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("reca_trainer.evaluation.endpoint_judge.EndpointJudge", partial(EndpointJudge, pause=0))
    (tmp_path / "questions.csv").write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "a,A red plane.,1,0,entity - whole (plane),Is it red?\n"
    )
    (tmp_path / "images/a/samples").mkdir(parents=True)
    IMAGE.save(tmp_path / "images/a/samples/00000.png")
    with Server(failure) as server:
        command = f"evaluate --benchmark dpg --images {tmp_path / 'images'} --prompts {tmp_path / 'questions.csv'}"
        command += f" --judge m --judge_url {server.url} --output_dir {tmp_path / 'out'}"
        assert main(command.split()) == 1
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line and "%|" not in line]  # but for the progress bar
    assert len(lines) == 1 and lines[0].startswith(f"reca-trainer evaluate: {server.url}/chat/completions ")
    assert KEY not in text
    assert all(KEY not in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_server_that_is_not_there_is_reported():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        assert "no answer in 2 attempts" in refusal(f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    with Server(YES) as server:
        assert "no answer in 2 attempts" in refusal(server.url.replace("http:", "https:"))  # speaks no TLS


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/etc/passwd", "must begin with http"),
        ("file:///etc/passwd", "must begin with http"),
        (f"ftp://user:{KEY}@host", "must begin with http"),
        ("http://", "name a host"),
        ("http://[::1", "no URL"),
        ("http://host\n/v1", "no URL"),
        ("http://host:99999/v1", "port"),
        (f"http://user:{KEY}@host/v1", "no user, password or parameters"),
        (f"http://{KEY}@host/v1", "no user, password or parameters"),
        (f"http://host/v1?api_key={KEY}", "no user, password or parameters"),
        (f"http://host/v1#{KEY}", "no user, password or parameters"),
    ],
)
def test_an_address_that_cannot_be_asked_or_holds_a_secret_is_refused(address, message):
    with pytest.raises(ValueError, match=message) as caught:
        EndpointJudge(address, "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY} {KEY}", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_fits_in_no_header_is_refused_unseen(key):
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        EndpointJudge("http://127.0.0.1/v1", "m", api_key=key)
    assert KEY not in str(caught.value)


def test_a_key_from_a_file_may_end_its_line(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with Server(YES) as server:
        assert ask(server.url, api_key=None) == ["Yes."]
        assert f"Bearer {KEY}\r\n" in server.requests[0]


def test_it_answers_inside_a_running_event_loop():
    async def notebook(url):
        return ask(url, questions=3)

    with Server(YES) as server:
        assert asyncio.run(notebook(server.url)) == ["Yes."] * 3
