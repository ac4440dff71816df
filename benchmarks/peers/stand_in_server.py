"""A server that answers every request with the same bytes: what a client could reach if the server cost nothing.

    python stand_in_server.py TOKENS VERSION        prints its port; ends when its standard input does

/model_info names VERSION as the weights'; everything else is answered as one response of TOKENS tokens with log-probabilities.
"""

from __future__ import annotations

import asyncio
import json
import sys


def answer_of(tokens: int, version: str) -> bytes:
    ids = [17 + i % 400 for i in range(tokens)]
    entries = [[-1.2345678 - i / 1000, token, None] for i, token in enumerate(ids)]
    meta = {"id": "0", "finish_reason": {"type": "length", "length": tokens}, "prompt_tokens": 32, "completion_tokens": tokens}
    meta |= {"weight_version": version, "weight_versions": [{"version": version, "start": 0, "end": tokens}]}
    return json.dumps({"text": "", "output_ids": ids, "meta_info": meta | {"output_token_logprobs": entries}}).encode()


def http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Answer(asyncio.Protocol):
    generated, info = b"", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            self.transport.write(self.info if b"/model_info" in head[:64] else self.generated)


async def main() -> None:
    Answer.generated = http(answer_of(int(sys.argv[1]), sys.argv[2]))
    Answer.info = http(json.dumps({"weight_version": sys.argv[2]}).encode())
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
