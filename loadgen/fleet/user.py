"""Locust users that ask an LLM server.

    class Support(LLMUser):
        scenario = "support.toml"      # what they ask: classes, lengths, SLOs

        @task(3)
        def question(self): self.ask(cls="question")

        @task
        def own_words(self): self.ask("Why is the sky blue?", max_tokens=50)

Without tasks of its own a user asks what the scenario's mix says.
"""

import time
from typing import Any, ClassVar

import gevent
from locust import HttpUser
from locust.env import Environment
from locust.exception import StopUser

from loadgen import openai
from loadgen.fleet import rows
from loadgen.fleet.run import Cancelled, FleetRun, Going, run_of
from loadgen.fleet.stream import Stream, pool_manager
from loadgen.record import Outcome, RequestRecord

now_ns = time.monotonic_ns


class LLMUser(HttpUser):
    """Streams answers of an OpenAI-compatible server; each request is a record in the run folder,
    and rows in Locust's own table. One user is one request in flight."""

    abstract = True
    scenario: ClassVar[str] = "mixed"
    open_loop: ClassVar[bool] = False  # on a fleet only, with --rate: arrivals, no users

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.tasks:
            cls.tasks = [LLMUser.ask]

    def __init__(self, environment: Environment) -> None:
        self.pool_manager = pool_manager()
        super().__init__(environment)

    def on_start(self) -> None:
        self._run = run_of(self.environment)
        if self._run is None:  # a fleet's workers send without users
            return
        run = self._run
        target = run.prepared.target
        self._free_ns: int | None = None
        self._going: Going | None = None  # a session that has turns left
        self._stream = Stream(
            self.client, target.base_url + openai.PATHS[run.prepared.scenario.endpoint],
            target.headers)

    def ask(self, text: str | None = None, *, cls: str | None = None,
            max_tokens: int | None = None) -> RequestRecord:
        """Sends the next request of this user's session, or the first of the mix's next session, of
        class `cls` where it is given; or one with a `text` of your own. Returns its record when its
        stream has ended. Raises StopUser when the test is over, and on a class that the scenario
        does not have: that ends it."""
        run: FleetRun | None = self._run
        while run is None:  # of a fleet's worker: its shards send, until Locust stops this user
            gevent.sleep(1)
        run.check_class(cls)
        taken = run.take_off(cls, text, max_tokens, self._slot_free_ns(), self._going)
        if taken is None:
            raise StopUser
        on, recorder, talk = taken
        failure: Outcome | None = Outcome.CANCELLED  # unless the stream ends: Locust kills users
        error: str | None = None
        try:
            failure, error = self._stream.send(
                recorder, run.prepared.scenario.timeouts_of(recorder.shot.cls))
        except Cancelled:
            pass
        finally:
            record = recorder.end(now_ns(), failure, error)
            if record.error is not None:
                record.error = run.prepared.target.scrub(record.error)
            self._free_ns = record.end_ns
            run.land(on, record)
        if text is None:
            goes_on = talk.keeps and talk.heard(record, recorder.answer().text)
            self._going = (on, talk) if goes_on else None
            self._free_ns += 0 if goes_on else talk.rest_ns
        if record.outcome is not Outcome.CANCELLED:  # our doing, no request of Locust's
            rows.show(self.environment, record, self._stream.n_bytes)
        return record

    def _slot_free_ns(self) -> int | None:
        """Closed loop without think time: the slot is free from the instant the last answer
        ended. A user that thinks is due when it has thought."""
        thinks = type(self).wait_time is not HttpUser.wait_time
        return None if thinks else self._free_ns
