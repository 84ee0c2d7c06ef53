"""One plan on many hosts: who says what to whom. Types only; nothing here waits or sends.

    locust --master   one per test: owns the plan, the verdict and the run folder
    locust --worker   one per host (or more): owns its shards and their journals until delivered
    loadgen.shard     plain asyncio processes: the load; children of a worker

Two types of Locust's custom messages carry it, both ways under one name ("loadgen"): bytes that
`seal` made of one message of this module. Only data is in them: msgpack into the frozen types
below, each with a bound on its size; what is larger, forged, replayed or unknown is passed over.

    worker → master                                             at most
      Hello     who I am: version, code, shards, a nonce        64 KiB   each second until welcome
      Report    the last beat's echo, state, frames, deltas     1 MiB    one to each beat
      Piece     bytes of a journal from an offset, with CRC     257 KiB  while the load runs, too
    master → worker
      Welcome, Refused                                          64 KiB   to a Hello
      Plan      scenario, seed, target, stripe                  8 MiB    each second until reported
      Beat      a ping, the lease, and what is to be done now   64 KiB   twice a second, or at once
      Ack       a journal's bytes that are on the master's disk 1 KiB    to each Piece

Nothing is lost if a message is: a Beat says what is to be *now* (an Order), not what changed, and a
Report what is; a Piece that is not acknowledged is sent again from where the master's file ends.

A worker is   new → greeted → ready → leg ⇄ ready → closed → greeted …
    lost      no Beat for LEASE_S: it cancels its load, keeps its journals, and waits RETURN_S for
              the master; if that comes back, it delivers what it has, and the run stays INVALID
    refused   by the master: another version or code, or no stripe is left
    failed    a shard died, a disk is full, the plan reads otherwise here: says so in each Report

Who owns what, and what ends it within 5 s:
    shard     of its worker: pdeathsig, EOF of stdin, no lease for SHARD_LEASE_S (worker stopped)
    load      of the master: no Beat for LEASE_S (killed, stopped, cut off)
    run       of all workers in it: one silent for SILENT_S, or failed, ends the leg as "failed",
              which makes it INVALID; the window's note names the worker, fleet.json the arrivals
              that have no record. What came until then is kept. Exit code 3
A cut that is shorter than these leases costs nothing: pieces and reports go on where they were.
A worker that joins while a test runs has no part in it, and is in the next.

Clocks: each Beat is a ping (four stamps); of all, the one with the least round trip tells the
offset, with half of that round trip as its error. A leg's start is sent in the worker's own clock;
its journals hold its own stamps, and the manifest the offset that puts them on the master's.

Secrets: both sides hold a token ($LOADGEN_FLEET_TOKEN, or a file), of which each message carries a
MAC; without it no message is heeded, in either direction. API keys do not travel: a worker has its
own, and the plan says by a fingerprint which one it must be. Nothing is encrypted.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from loadgen.leg import Leg
from loadgen.prompts import Ratio
from loadgen.shard import Frame

PROTOCOL = 1
BEAT_S = 0.5
LEASE_S = 2.5  # a worker's from its master …
SHARD_LEASE_S = 3.0  # … a shard's from its worker …
SILENT_S = 2.5  # … and what a master bears of a worker
LOOKS, LOOK_S = 4, 0.25  # of so many looks in a row: not right after a stall of the looker's own
RETURN_S = 6.0  # who was cut off may come back to deliver
PIECE_BYTES = 2**18
PIECES_AHEAD = 4  # unacknowledged pieces of one journal
MOST_SHARDS = 256  # of one worker
LIMITS = {"Hello": 2**16, "Report": 2**20, "Piece": PIECE_BYTES + 1024,
          "Welcome": 2**16, "Refused": 2**16, "Plan": 2**23, "Beat": 2**16, "Ack": 1024}
WIRE_BYTES = 2**24  # of any message at all, Locust's own too

Word = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, Meta(max_length=4000)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Shards = Annotated[int, Meta(ge=1, le=MOST_SHARDS)]
Size = Annotated[int, Meta(ge=0, lt=2**50)]
Do = Literal["rest", "leg", "stop", "cancel", "close"]
State = Literal["greeted", "ready", "leg", "closed", "lost"]
Buckets = dict[int, int]  # see `tallies`


class Hello(Struct, frozen=True, tag="Hello"):
    """`code`: a hash of the generator's sources; two of one version may differ in it. `scenario`:
    of the file that this worker's own command line names, if it does."""

    protocol: int
    name: Word
    nonce: Nonce
    version: Word
    code: Word
    scenario: Word | None
    shards: Shards
    host: dict[Word, Word | int | float | None]


class Welcome(Struct, frozen=True, tag="Welcome"):
    """Both nonces together make the session that all further messages are sealed in."""

    hello: Nonce
    nonce: Nonce


class Refused(Struct, frozen=True, tag="Refused"):
    hello: Nonce
    why: Text


class Plan(Struct, frozen=True, tag="Plan"):
    """This worker's part: shards first … first + n of `of`. Target headers are without secrets;
    `key`: fingerprint of the API key that the worker must have. `digest`: what the plan's first
    sessions and prompts hash to; where they do not, numpy or the code makes another plan."""

    run: Word
    scenario: dict[str, Any]
    seed: int
    base_url: Word
    model: Word
    key: Word
    ratios: dict[str, Ratio]
    first: int
    n: Shards
    of: int
    digest: Word


class Order(Struct, frozen=True, omit_defaults=True):
    """What is to be now. rest: nothing more than there is; leg: run it from `t0_ns` of the
    worker's clock; stop: no new requests; cancel: now; close: the test is over, end the shards."""

    do: Do = "rest"
    leg: Leg | None = None
    t0_ns: int = 0


class Beat(Struct, frozen=True, tag="Beat"):
    """`kept`: by shard, the bytes of its journal that the master has. `delivered`: all of them,
    with the same hash; the worker may delete them."""

    n: int
    sent_ns: int
    run: Word
    order: Order
    kept: dict[int, Size]
    delivered: bool = False


class Ack(Struct, frozen=True, tag="Ack"):
    run: Word
    shard: int
    kept: Size


class ClassDelta(Struct, array_like=True):
    """What came of one class's requests since the last Report: histograms of times in buckets."""

    n: int = 0
    good: int = 0
    output_tok: int = 0
    ttft: Buckets = {}
    tpot: Buckets = {}
    itl: Buckets = {}


class Delta(Struct, frozen=True):
    """Of one second, about. `errors`: by outcome, how many and the last one's words."""

    classes: dict[str, ClassDelta] = {}
    errors: dict[str, tuple[int, Text | None]] = {}


class Report(Struct, frozen=True, tag="Report"):
    """`beat` and its stamps answer a ping. `written`: bytes in each shard's journal; `hashes`: of
    whole journals, once closed. `failed`: why this worker cannot go on."""

    beat: int
    heard_ns: int
    said_ns: int
    run: Word
    state: State
    leg: Word
    frames: Annotated[dict[int, Frame], Meta(max_length=MOST_SHARDS)]
    written: dict[int, Size]
    hashes: dict[int, Word]
    failed: Text | None
    delta: Delta | None
    cpu_frac: float | None  # of the worker's own process, since the last one


class Piece(Struct, frozen=True, tag="Piece"):
    run: Word
    shard: int
    offset: Size
    crc: int
    data: Annotated[bytes, Meta(max_length=PIECE_BYTES)]


FromWorker = Hello | Report | Piece
FromMaster = Welcome | Refused | Plan | Beat | Ack
Message = FromWorker | FromMaster
