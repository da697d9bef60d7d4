"""A judge behind servers with OpenAI's chat completions API: vLLM, SGLang, or another.

**Bounded time.** A request has the timeout `timeout_s`, a question the deadline `deadline_s` from
asking. While the server is unreachable, busy or starting, retries continue without counting against
`retries`. A server silent for `silence_s` is considered down: a single question is then tried once
as a probe while the others wait. If it fails, all questions asked before it fail too. So a dead
server costs about one `silence_s`, not one per question, and the next question notices a recovery.

**No error is an answer.** A question without a usable reply gets an `Answer` with an error. Any
complete reply of the judge is an answer; one that was cut off before its end is empty.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

from nemocascade.judges.cache import AnswerCache
from nemocascade.judges.prompts import compare_question, reward_model_turns
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.runtime.http import (
    BUSY,
    HttpClient,
    HttpError,
    announced_servers,
    backoff,
    base_url,
    key_problem,
    read_key,
)
from nemocascade.runtime.logging import LOGGER
from nemocascade.types import Answer, Message, Question

PATH = "/v1/chat/completions"
_PROBE_S = 60.0
_REST_S = 30.0
"""Time after a failure for which a server is asked only if all others have failed too."""
_POLL_S = 1.0
_LOG_EVERY_S = 30.0
_SHOWN = 300


class ServerJudge:
    """Sends many questions to a server in parallel. Threads share one, and its request limit.

    counts: `asked` questions, `cached` ones (answered before or already in flight), `requests`,
    `retries`, `answered`, `failed` questions, and replies `cut` at `max_tokens`. Failed attempts
    are counted by kind: `timeout`, `unreachable`, `connection`, `protocol`, `status_500` and so on,
    `nonsense`, and `down` for those that were not sent.
    """

    collective = False

    def __init__(self, settings: JudgeConfig) -> None:
        """Raises ValueError naming every invalid setting."""
        problems = server_problems(settings)
        if problems:
            raise ValueError("; ".join(problems))
        self.settings = settings
        self._servers = _Servers(settings)
        self.counts: Counter[str] = Counter()
        self._cache = AnswerCache(settings.cache)
        self._lock = Lock()
        self._closing = Event()
        self._in_flight: dict[str, Future[Answer]] = {}
        self._prefetched: dict[str, Future[Answer]] = {}
        self._last_answer_s = time.monotonic()
        self._silent = False
        self._probing = Lock()
        self._probe_failed_s = 0.0
        self._logged_s = 0.0
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")

    @property
    def activity(self) -> int:
        """Progress counter of sent requests and finished questions."""
        with self._lock:
            return sum(self.counts[name] for name in ("requests", "answered", "failed"))

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in order; cached answers are reused."""
        asked = [self._submit(question) for question in questions]
        return [future.result() for future in asked]

    def begin(self, questions: Sequence[Question]) -> None:
        """Start on questions that `ask` will receive soon, without waiting."""
        for question in questions:
            self._submit(question, prefetched=True)

    def probe(self) -> str | None:
        """Return why the server rejects requests; None if it accepts them or does not answer.

        Sends one request, with a timeout of at most a minute. A busy, starting or slow server
        counts as not answering, because that may pass.
        """
        asked = compare_question((Message("user", "What is 2 + 2?"),), "4", "5")
        try:
            self._once(self._body(asked), time.monotonic() + _PROBE_S)
        except HttpError as failure:
            if failure.final:
                return str(failure)
            LOGGER.warning("judge: it does not answer yet (%s)", failure)
        return None

    def close(self) -> None:
        """Cancel all requests; questions in flight get errors."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._servers.close()
        self._pool.shutdown(wait=True, cancel_futures=False)
        if self.counts:
            LOGGER.info("judge: %s", self.summary())

    def summary(self) -> str:
        """Format the counts as text."""
        with self._lock:
            return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))

    def _submit(self, question: Question, *, prefetched: bool = False) -> Future[Answer]:
        """prefetched: the next `ask` of this question gets this answer, even if it is an error."""
        body = self._body(question)
        key = hashlib.sha256(body).hexdigest()
        done: Future[Answer] = Future()
        with self._lock:
            self.counts["asked"] += 1
            known = self._cache.get(key)
            if known is not None:
                self.counts["cached"] += 1
                done.set_result(Answer(known))
                return done
            if not prefetched and key in self._prefetched:
                self.counts["cached"] += 1
                return self._prefetched.pop(key)
            if key in self._in_flight:
                self.counts["cached"] += 1
                return self._in_flight[key]
            try:
                future = self._pool.submit(self._answer, key, body, time.monotonic())
            except RuntimeError:
                done.set_result(Answer(None, "the judge is closed"))
                return done
            self._in_flight[key] = future
            if prefetched:
                self._prefetched[key] = future
            return future

    def _body(self, question: Question) -> bytes:
        """Build the request. Its seed is a hash of the question: equal questions sample alike."""
        s = self.settings
        turns: list[Any]
        if s.form == "response_roles":
            turns = reward_model_turns(question)
        else:
            turns = [{"role": m.role, "content": m.content} for m in question.messages]
        fields = {
            "model": s.model,
            "messages": turns,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "max_tokens": s.max_tokens,
        }
        seed = hashlib.sha256(json.dumps(fields).encode()).digest()[:4]
        return json.dumps({**fields, "seed": int.from_bytes(seed) >> 1}).encode()

    def _answer(self, key: str, body: bytes, asked_s: float) -> Answer:
        """Answer one question, asked at `asked_s`, with its retries, in a thread of the pool."""
        try:
            answer = self._tries(body, asked_s)
        except Exception as error:  # a bug in this program must not become an answer
            LOGGER.exception("judge: a question failed")
            answer = Answer(None, f"{type(error).__name__}: {error}")
        if answer.text is not None:
            try:
                self._cache.put(key, answer.text)
            except OSError as error:
                self._warn("the cache %s cannot be written: %s", self.settings.cache, error)
        with self._lock:
            self._in_flight.pop(key, None)
            if not self._in_flight and not self._has_been_silent():
                # No question is in flight, so the server is idle, not silent.
                self._silent = False
            self.counts["failed" if answer.text is None else "answered"] += 1
        if answer.text is None:
            self._warn("a question got no answer (%s); so far: %s", answer.error, self.summary())
        return answer

    def _tries(self, body: bytes, asked_s: float) -> Answer:
        s = self.settings
        end = asked_s + s.deadline_s
        late = f"no answer within deadline_s({s.deadline_s:g}); last"
        reason = "it waited for its turn"
        left = s.retries
        for attempt in itertools.count():
            if self._closing.is_set():
                return Answer(None, f"the judge was closed; last: {reason}")
            if time.monotonic() >= end:
                return Answer(None, f"{late}: {reason}")
            if attempt:
                self._count("retries")
            try:
                return Answer(self._guarded(body, end, asked_s))
            except HttpError as error:
                failure, reason = error, str(error)
                self._count(failure.kind)
                wait_s = backoff(attempt, s.backoff_s, failure.wait_s)
                left -= failure.kind not in BUSY
            if failure.final:
                break
            if time.monotonic() + wait_s >= end:
                reason = f"{late}: {reason}"
                break
            if left < 0:
                break
            self._closing.wait(wait_s)
        return Answer(None, reason)

    def _guarded(self, body: bytes, end: float, asked_s: float) -> str:
        """Make one attempt; while the server is down, one question at a time probes it."""
        if not self._is_down():
            return self._once(body, end)
        with self._probing:
            if self._is_down():
                if self._probe_failed_s >= asked_s:
                    named = ", ".join(self._servers.urls)
                    reason = f"{named} has answered nothing for {self.settings.silence_s:g} s"
                    raise HttpError("down", reason, final=True)
                try:
                    return self._once(body, end)
                except HttpError as failure:
                    self._probe_failed_s = time.monotonic()
                    failure.final = True
                    raise
        return self._once(body, end)

    def _once(self, body: bytes, end: float) -> str:
        """Return the model's text from one attempt that ends by `end`."""
        timeout_s = max(0.001, min(self.settings.timeout_s, end - time.monotonic()))
        self._count("requests")
        with self._lock:
            # Silence is measured from a request without an answer, not from idle time.
            if not self._silent:
                self._last_answer_s, self._silent = time.monotonic(), True
        try:
            reply = self._servers.post(body, timeout_s)
        except HttpError as error:
            if 0 < error.status < 500 and error.status != 429:
                self._heard()
            raise
        self._heard()
        text, cut = _text_of(reply)
        if cut:
            self._count("cut")
        return text

    def _heard(self) -> None:
        with self._lock:
            self._last_answer_s, self._silent = time.monotonic(), False

    def _is_down(self) -> bool:
        """Return True if the server has only failed for `silence_s`."""
        with self._lock:
            return self._has_been_silent()

    def _has_been_silent(self) -> bool:
        """Return `_is_down`; the caller holds the lock."""
        return self._silent and time.monotonic() - self._last_answer_s > self.settings.silence_s

    def _count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def _warn(self, text: str, *values: object) -> None:
        """Log at most one line per interval: thousands of questions may fail at once."""
        now = time.monotonic()
        with self._lock:
            if self._logged_s and now - self._logged_s < _LOG_EVERY_S:
                return
            self._logged_s = now
        LOGGER.warning(f"judge: {text}", *values)


class _Server:
    """One server. load: requests in flight. failed_s: time of its last failure."""

    def __init__(self, url: str, key: str, connections: int) -> None:
        self.url = base_url(url.rstrip("/").removesuffix(PATH)) + PATH
        self.http = HttpClient(key=key, connections=connections)
        self.load, self.failed_s = 0, -math.inf


class _Servers:
    """The servers of a judge: those that are named, and those that announce themselves."""

    def __init__(self, settings: JudgeConfig) -> None:
        self.settings = settings
        self._lock = Lock()
        self._known: dict[str, _Server] = {}
        self._polled_s = -math.inf
        key = read_key(settings.api_key_env)
        for url in dict.fromkeys((settings.url, *settings.urls)):
            if url:
                self._known[url] = _Server(url, key, settings.concurrency)

    @property
    def urls(self) -> list[str]:
        """Addresses of all known servers, or the folder in which none has announced itself."""
        return [s.url for s in self._known.values()] or [self.settings.announce]

    def post(self, body: bytes, timeout_s: float) -> bytes:
        """Ask the least loaded server; one that has just failed comes last. Raises HttpError."""
        with self._lock:
            self._add_announced()
            now = time.monotonic()
            server = min(self._known.values(), key=lambda s: (now - s.failed_s < _REST_S, s.load))
            server.load += 1
        try:
            return server.http.post(server.url, body, timeout_s)
        except HttpError as error:
            if not error.final:
                server.failed_s = time.monotonic()
            raise
        finally:
            with self._lock:
                server.load -= 1

    def close(self) -> None:
        """Cut off all requests."""
        for server in self._known.values():
            server.http.close()

    def _add_announced(self) -> None:
        """Add servers that have announced themselves since.

        Raises HttpError, as for a server that starts, before there are as many as wanted.
        """
        settings, now = self.settings, time.monotonic()
        if settings.announce and now - self._polled_s > _POLL_S:
            self._polled_s = now
            for url, key in announced_servers(Path(settings.announce)).items():
                if url not in self._known:
                    self._known[url] = _Server(url, key, settings.concurrency)
        wanted = max(1, settings.servers)
        if len(self._known) < wanted:
            reason = f"{len(self._known)} of {wanted} judges are announced in {settings.announce}"
            raise HttpError("unreachable", reason)


def server_problems(settings: JudgeConfig) -> list[str]:
    """Return every rule that a server's settings break, including its key in the environment."""
    problems = settings.problems()
    key = read_key(settings.api_key_env)
    if settings.api_key_env and not key:
        problems.append(
            f"judge.api_key_env({settings.api_key_env}) is not set in the environment: export "
            "it, or leave the name empty for a server without keys"
        )
    elif problem := key_problem(key):
        problems.append(f"judge.api_key_env({settings.api_key_env}) {problem}")
    return problems


def _text_of(reply: bytes) -> tuple[str, bool]:
    """Return the message of a chat completion, and True if it was cut off before its end.

    A message that was cut off is returned empty, because it may contain any intermediate thought.
    An empty message is an answer: the model said nothing.
    """
    try:
        choice = json.loads(reply)["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = reply[:_SHOWN].decode(errors="replace")
        raise HttpError(
            "nonsense", f"no chat completion ({type(error).__name__}): {shown!r}"
        ) from None
    cut = finish == "length"
    if content is None:
        return "", cut
    if not isinstance(content, str):
        raise HttpError("nonsense", f"the message's content is {type(content).__name__}, not text")
    return "" if cut else content, cut
