"""cluster.launcher.endpoint and demo, against a small server in this process."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.launcher.demo import Demo, arrived, shortcomings
from cluster.launcher.endpoint import Answer, Endpoint, EndpointError, curl_line
from cluster.transfers import TransferRecord


class Server:
    def __init__(self):
        self.seen = []
        self.status = 200
        self.stream = b""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): ...

            def do_GET(self):
                self.reply(b"ok")

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append((self.headers["authorization"], body))
                if outer.status != 200:
                    self.reply(b'{"error": {"message": "no such model"}}')
                elif body.get("stream"):
                    self.reply(outer.stream)
                else:
                    self.reply(b'{"choices": [{"message": {"content": "hi"}}], "usage": {}}')

            def reply(self, data):
                self.send_response(outer.status)
                self.send_header("x-request-id", "r1")
                self.send_header("x-pdcluster-prefill", "prefill/0")
                self.send_header("x-pdcluster-decode", "decode/0")
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_an_answer_tells_its_text_and_its_way(server):
    answer = Endpoint(server.url, "k").chat("m", [{"role": "user", "content": "x"}], max_tokens=3)
    assert (answer.text, answer.prefill, answer.decode) == ("hi", "prefill/0", "decode/0")
    authorization, body = server.seen[0]
    assert authorization == "Bearer k"
    assert body["max_tokens"] == 3


def test_without_a_key_none_is_sent(server):
    Endpoint(server.url, None).chat("m", [])
    assert server.seen[0][0] is None


def test_a_stream_is_yielded_in_pieces_up_to_done(server):
    server.stream = (
        b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": "b"}}]}\n\n'
        b'data: {"choices": []}\n\ndata: [DONE]\n\n'
    )
    assert "".join(Endpoint(server.url, None).chat_stream("m", [])) == "ab"


def test_an_error_in_mid_stream_is_raised(server):
    server.stream = b'data: {"error": {"message": "decode broke"}}\n\n'
    with pytest.raises(EndpointError, match="decode broke"):
        list(Endpoint(server.url, None).chat_stream("m", []))


def test_a_refusal_is_told_in_the_servers_words(server):
    server.status = 404
    with pytest.raises(EndpointError, match="404 no such model"):
        Endpoint(server.url, None).chat("m", [])
    assert Endpoint(server.url, None).why_not_ready() == "404: ok"


def test_a_refused_key_is_told_with_what_to_set(server):
    server.status = 401
    with pytest.raises(EndpointError, match="401 no such model Set PDCLUSTER_API_KEY"):
        Endpoint(server.url, "wrong", "Set PDCLUSTER_API_KEY.").chat("m", [])


def test_nobody_listening_is_told_with_the_next_command():
    with pytest.raises(EndpointError, match="pdcluster status"):
        Endpoint("http://127.0.0.1:9", None).chat("m", [])
    assert Endpoint("http://127.0.0.1:9", None).why_not_ready()


def test_the_curl_line_never_holds_a_key():
    assert "$(cat /k)" in curl_line("http://h:1", "m", "/k", None)
    assert "${KEYS%%,*}" in curl_line("http://h:1", "m", None, "KEYS")
    assert "Authorization" not in curl_line("http://h:1", "m", None, None)


def record(side, outcome, pulled=0):
    return TransferRecord("r", side, outcome, at_s=0.0, tokens_pulled=pulled)


def test_only_what_arrived_at_decode_counts_as_moved():
    records = [
        record("prefill", "granted"),
        record("decode", "pulled", 37),
        record("decode", "failed"),
        record("prefill", "taken"),
    ]
    assert [r.tokens_pulled for r in arrived(records)] == [37]


def demo(text="It is Paris.", prefill="prefill/0", decode="decode/0", pulled=37):
    answer = Answer(text, "r1", prefill, decode, "disaggregated", {})
    return Demo("q", answer, 0.1, pulled, 0, pulled * 1024, None)


def test_a_good_demo_has_no_shortcoming():
    assert shortcomings(demo()) == ()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (demo(text="It is Rome."), "does not name Paris"),
        (demo(text=""), "does not name Paris"),
        (demo(prefill="none"), "no prefill worker"),
        (demo(decode="prefill/0"), "no decode worker of its own"),
        (demo(pulled=0), "no KV blocks moved"),
    ],
)
def test_each_shortcoming_is_told(bad, said):
    assert said in "; ".join(shortcomings(bad))
