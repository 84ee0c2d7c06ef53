"""Two clients to measure against, on the same server in the same run.

epoll: the least that a Python client with kernel stamps can do: connections opened and bodies built
    before the clock starts; per read a stamp, the bytes kept, a look at their end; events are
    found afterwards. (r7 of the research.)
naive: aiohttp as its users write it: session.post, `async for line`, json.loads for each event,
    time.perf_counter. (r1.)

Both write what they saw as `truth.load_seen` reads it, and mark in their output when the clock
started and what CPU they had used by then.
"""

import argparse
import asyncio
import json
import random
import select
import socket
import struct
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SO_TIMESTAMPNS = 35
_ANCILLARY = socket.CMSG_SPACE(16)
_SYNC_NS = 100_000_000
_TOKEN = b'"delta":{"content"'  # vLLM's role-only event has "role" first

now_ns = time.monotonic_ns


@dataclass(frozen=True)
class Work:
    """`streams` slots with `each` requests of `tokens`, or, with a rate, streams × each requests
    at Poisson instants."""

    port: int
    streams: int
    each: int
    tokens: int
    rate_rps: float | None
    out: Path

    def payload(self, key: int) -> dict[str, object]:
        return {"model": "tiny", "user": str(key), "max_tokens": self.tokens, "stream": True,
                "stream_options": {"include_usage": True}, "ignore_eos": True,
                "messages": [{"role": "user", "content": f"[{key:08x}] Tell me of it. " * 8}]}


def mark(name: str) -> None:
    print(json.dumps({"mark": name, "cpu_s": time.process_time(), "t_ns": now_ns()}), flush=True)


# ------------------------------------------------------------------------------------------ epoll


class EpollSlot:
    """A connection and its requests. `reads[i]` are the stamps, `parts[i]` the bytes of reads of
    request i."""

    def __init__(self, work: Work, slot: int) -> None:
        self.keys = range(slot * work.each, (slot + 1) * work.each)
        self.requests = []
        for key in self.keys:
            body = json.dumps(work.payload(key)).encode()
            self.requests.append(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
                b"application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        self.sent: list[int] = []
        self.reads: list[list[int]] = []
        self.parts: list[list[bytes]] = []
        self.sock = socket.create_connection(("127.0.0.1", work.port))
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)

    def fire(self) -> bool:
        """Sends the next request; False: there is none."""
        if len(self.sent) == len(self.requests):
            return False
        self.reads.append([])
        self.parts.append([])
        request = self.requests[len(self.sent)]
        self.sent.append(now_ns())
        self.sock.send(request)
        return True

    def seen(self) -> Iterator[tuple[int, int, list[int]]]:
        """(key, sent, stamps of token events), found in the bytes that were kept. An event has the
        stamp of the read in which its mark ended."""
        for key, sent_ns, stamps, parts in zip(
                self.keys, self.sent, self.reads, self.parts, strict=True):
            found: list[int] = []
            all_of_it = b"".join(parts)
            at, end, i = all_of_it.find(_TOKEN), 0, -1
            while at >= 0:
                while at + len(_TOKEN) > end:
                    i += 1
                    end += len(parts[i])
                found.append(stamps[i])
                at = all_of_it.find(_TOKEN, at + 200)
            yield key, sent_ns, found


def epoll(work: Work) -> None:
    slots = {(s := EpollSlot(work, i)).sock.fileno(): s for i in range(work.streams)}
    poll = select.epoll()
    for fd in slots:
        poll.register(fd, select.EPOLLIN)
    mark("begin")
    left = sum(slot.fire() for slot in slots.values())
    timespec = struct.Struct("qq").unpack
    sync_ns = offset_ns = 0
    while left:
        for fd, _ in poll.poll(-1, 1024):
            slot = slots[fd]
            data, ancillary, _, _ = slot.sock.recvmsg(65536, _ANCILLARY)
            now = now_ns()
            if now > sync_ns:
                sync_ns, offset_ns = now + _SYNC_NS, time.time_ns() - now_ns()
            s, ns = timespec(ancillary[0][2])
            slot.reads[-1].append(s * 1_000_000_000 + ns - offset_ns)
            slot.parts[-1].append(data)
            if data.endswith(b"0\r\n\r\n"):
                left -= not slot.fire()
    mark("end")
    save(work, ((key, 0, sent_ns, stamps) for slot in slots.values()
                for key, sent_ns, stamps in slot.seen()))


# ------------------------------------------------------------------------------------------ naive


async def naive(work: Work) -> None:
    import aiohttp  # here: the other client must not pay for it

    seen: list[tuple[int, int, int, list[int]]] = []
    url = f"http://127.0.0.1:{work.port}/v1/chat/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def request(key: int, due_ns: int) -> None:
            stamps: list[int] = []
            sent_ns = round(time.perf_counter() * 1e9)
            async with session.post(url, json=work.payload(key)) as answer:
                async for line in answer.content:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    at = time.perf_counter()
                    choices = json.loads(line[6:])["choices"]
                    if choices and "role" not in choices[0]["delta"]:
                        stamps.append(round(at * 1e9))
            seen.append((key, due_ns, sent_ns, stamps))

        async def slot(number: int) -> None:
            for key in range(number * work.each, (number + 1) * work.each):
                await request(key, 0)

        mark("begin")
        if work.rate_rps is None:
            await asyncio.gather(*(slot(number) for number in range(work.streams)))
        else:
            rng, due_ns, flights = random.Random(1), now_ns(), []
            for key in range(work.streams * work.each):
                due_ns += round(rng.expovariate(work.rate_rps) * 1e9)
                await asyncio.sleep((due_ns - now_ns()) / 1e9)
                flights.append(asyncio.create_task(request(key, due_ns)))
            await asyncio.gather(*flights)
    mark("end")
    save(work, iter(seen))


def save(work: Work, seen: Iterator[tuple[int, int, int, list[int]]]) -> None:
    rows = array("q")
    for key, due_ns, sent_ns, stamps in seen:
        rows.extend((key, due_ns, sent_ns, len(stamps)))
        rows.extend(stamps)
    with work.out.open("wb") as f:
        rows.tofile(f)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("kind", choices=("epoll", "naive"))
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--streams", type=int, default=64)
    options.add_argument("--each", type=int, default=2, help="requests per stream")
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--rate", type=float, help="naive: open loop, requests per second")
    options.add_argument("--out", type=Path, default=Path("/dev/null"))
    args = options.parse_args()
    work = Work(args.port, args.streams, args.each, args.tokens, args.rate, args.out)
    if args.kind == "naive":
        asyncio.run(naive(work))
    else:
        epoll(work)


if __name__ == "__main__":
    main()
