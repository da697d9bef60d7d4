"""The server judge against a misbehaving server on loopback."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemocascade.envs.preference import Preference
from nemocascade.envs.registry import make_judge
from nemocascade.judges import cache as cache_module
from nemocascade.judges.cache import AnswerCache
from nemocascade.judges.prompts import compare_question, comparison_text, grade_question
from nemocascade.judges.server import ServerJudge
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.runtime.http import MAX_BYTES
from nemocascade.types import Answer, Message, Question
from nemocascade_vllm.serve import announce, announcement

GOOD = comparison_text(4, 2, 2)
PROMPT = (Message("user", "Which animal barks?"),)


class Handler(BaseHTTPRequestHandler):
    """Behaves as `server.behave` says for each request, which it remembers."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append((self.path, body, self.headers.get("Authorization")))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self.under_way = True
        try:
            self.server.behave(self, number)
        except OSError:
            self.close_connection = True
        finally:
            self.end()

    def end(self) -> None:
        """The request counts as over: before its answer leaves, for the next one may come then."""
        with self.server.lock:
            self.server.now -= self.under_way
            self.under_way = False

    def say(self, text: str | None) -> None:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.reply(200, json.dumps({"choices": [choice]}).encode())

    def reply(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end()
        self.end_headers()
        self.wfile.write(data)

    def drop(self) -> None:
        """Reset the connection without a word."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def trickle(self) -> None:
        """A byte now and then, for ever: no time limit between bytes is ever met."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.over.wait(0.05):
            self.wfile.write(b" ")

    def short(self) -> None:
        """Less than was announced."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def loopback_server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.seen, found.lock, found.over = [], threading.Lock(), threading.Event()
    found.now = found.most = 0
    found.behave = lambda handler, number: handler.say(GOOD)
    found.url = f"http://127.0.0.1:{found.server_port}"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()


@pytest.fixture
def server() -> Iterator[Any]:
    with loopback_server() as found:
        yield found


@pytest.fixture
def judges() -> Iterator[Callable[..., ServerJudge]]:
    """Makes judges that wait little, and closes them."""
    made: list[ServerJudge] = []

    def make(url: str, **settings: Any) -> ServerJudge:
        given: dict[str, Any] = {
            "backoff_s": 0.01,
            "timeout_s": 10.0,
            "retries": 3,
            "deadline_s": 5.0,
        }
        given |= {"silence_s": 5.0, **settings}
        judge = make_judge(JudgeConfig(kind="server", url=url, model="genrm", **given))
        assert isinstance(judge, ServerJudge)
        made.append(judge)
        return judge

    yield make
    for judge in made:
        judge.close()


def question(number: int = 0) -> Question:
    return compare_question(PROMPT, f"A dog, {number}.", "A cat.")


@pytest.mark.parametrize("end", ["", "/v1/", "/v1/chat/completions"])
def test_what_is_sent_and_read(
    server: Any, judges: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    judge = judges(server.url + end, api_key_env="JUDGE_KEY")
    (answer,) = judge.ask([question()])
    assert (answer.text, answer.error) == (GOOD, None)
    path, body, key = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "genrm"
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 16_384)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert "A dog, 0." in body["messages"][1]["content"]
    assert isinstance(body["seed"], int)


def test_a_reward_model_gets_its_own_roles(server: Any, judges: Any) -> None:
    judge = judges(server.url, form="response_roles")
    judge.ask([question()])
    roles = [m["role"] for m in server.seen[0][1]["messages"]]
    assert roles == ["user", "response_1", "response_2"]


def test_answers_stand_in_the_order_of_the_questions(server: Any, judges: Any) -> None:
    def behave(handler: Handler, number: int) -> None:
        time.sleep(0.02 * (number % 3))
        handler.say(server.seen[number][1]["messages"][1]["content"])

    server.behave = behave
    judge = judges(server.url, concurrency=6)
    answers = judge.ask([question(i) for i in range(40)])
    assert all(f"A dog, {i}." in (a.text or "") for i, a in enumerate(answers))
    assert 1 < server.most <= 6


def test_nothing_is_asked_twice(server: Any, judges: Any) -> None:
    judge = judges(server.url)
    judge.ask([question(1), question(1), question(2)])
    judge.ask([question(2), question(1)])
    assert len(server.seen) == 2
    assert (judge.counts["asked"], judge.counts["cached"], judge.counts["requests"]) == (5, 3, 2)
    judge.ask([grade_question(PROMPT, "A dog.")])
    assert len(server.seen) == 3


def test_a_cache_file_outlives_the_judge(server: Any, judges: Any, tmp_path: Path) -> None:
    cache = str(tmp_path / "deep" / "answers.jsonl")
    judges(server.url, cache=cache).ask([question(i) for i in range(5)])
    with Path(cache).open("a") as file:
        file.write('{"key": "cut in two by a ki')
    again = judges(server.url, cache=cache)
    assert [a.text for a in again.ask([question(i) for i in range(6)])] == [GOOD] * 6
    assert len(server.seen) == 6, "only the new one is asked"
    # The unfinished line spoilt no other.
    third = judges(server.url, cache=cache)
    third.ask([question(5)])
    assert len(server.seen) == 6
    # Another temperature is another question.
    judges(server.url, cache=cache, temperature=0.0).ask([question(5)])
    assert len(server.seen) == 7


def test_a_locked_cache_file_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LONGEST_WAIT_S", 0.1)
    path = tmp_path / "answers.jsonl"
    cache = AnswerCache(str(path))
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            cache.put("a", "text")
        assert cache.get("a") == "text", "memory has it"
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "_take", pytest.fail)
            for key in "xyz":
                cache.put(key, "text")  # a pause, in which nobody waits
    monkeypatch.setattr(cache, "_paused_until", 0.0)
    cache.put("b", "text")
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["b"]


def test_a_cache_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    assert AnswerCache(str(tmp_path)).get("a") is None, "a folder is not a file"


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache = AnswerCache(max_characters=10)
    for key in "abc":
        cache.put(key, "1234")
        cache.get("a")
    assert [cache.get(k) for k in "abc"] == ["1234", None, "1234"]
    cache.put("a", "12")
    cache.put("d", "1234")
    assert [cache.get(k) for k in "acd"] == ["12", "1234", "1234"]


@pytest.mark.parametrize(
    ("kind", "behave"),
    [
        ("status_500", lambda h: h.reply(500, b"oops")),
        ("connection", lambda h: h.drop()),
        ("nonsense", lambda h: h.reply(200, b"<html>hello</html>")),
        ("nonsense", lambda h: h.reply(200, b'{"choices": []}')),
        ("nonsense", lambda h: h.reply(200, b'{"choices": [{"message": {"content": 4}}]}')),
        ("protocol", lambda h: h.wfile.write(b"\x00\x01 not HTTP\r\n\r\n")),
        ("timeout", lambda h: h.server.over.wait(20)),
        ("timeout", lambda h: h.trickle()),
        ("connection", lambda h: h.short()),
        ("protocol", lambda h: h.reply(200, b" " * (MAX_BYTES + 1))),
    ],
)
def test_a_fault_is_repeated_and_then_an_error(
    server: Any, judges: Any, kind: str, behave: Callable[[Handler], None]
) -> None:
    """Bounded time, the fault counted, and an answer once the server is well again."""
    well = threading.Event()
    server.behave = lambda h, n: h.say(GOOD) if well.is_set() else behave(h)
    # Other faults must show themselves, on however busy a machine.
    judge = judges(server.url, retries=1, timeout_s=0.8 if kind == "timeout" else 10.0)
    started = time.monotonic()
    (answer,) = judge.ask([question()])
    assert time.monotonic() - started < 15
    assert answer.text is None
    assert kind in answer.error
    assert judge.counts[kind] == judge.counts["requests"] == 2
    assert judge.counts["retries"] == judge.counts["failed"] == 1
    well.set()
    assert judge.ask([question()])[0].text == GOOD, "an error is not cached"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_waited_for(server: Any, judges: Any, status: int) -> None:
    """However often it says so, until the deadline."""
    server.behave = lambda h, n: h.say(GOOD) if n == 9 else h.reply(status, b"later")
    judge = judges(server.url, retries=0)
    assert judge.ask([question()])[0].text == GOOD
    assert judge.counts[f"status_{status}"] == judge.counts["retries"] == 9
    server.behave = lambda h, n: h.reply(status, b"later")
    late = judges(server.url, retries=0, deadline_s=0.4)
    assert "deadline_s(0.4)" in late.ask([question(1)])[0].error


def test_a_server_that_starts_is_waited_for(judges: Any, server: Any) -> None:
    """Nobody listens for longer than all retries would last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = judges(f"http://127.0.0.1:{port}", retries=0, deadline_s=60.0, silence_s=60.0)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.extend(judge.ask([question()])))
    asking.start()
    time.sleep(0.5)
    late: Any = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    late.daemon_threads = True
    late.seen, late.lock, late.now, late.most = [], threading.Lock(), 0, 0
    late.behave = lambda handler, number: handler.say(GOOD)
    threading.Thread(target=late.serve_forever, daemon=True).start()
    asking.join(timeout=30)
    late.shutdown()
    late.server_close()
    assert [a.text for a in found] == [GOOD]
    assert judge.counts["unreachable"] > 1


def test_the_server_says_how_long_to_wait(server: Any, judges: Any) -> None:
    at: list[float] = []

    def behave(handler: Handler, number: int) -> None:
        at.append(time.monotonic())
        handler.say(GOOD) if number else handler.reply(429, b"", Retry_After="1")

    server.behave = behave
    assert judges(server.url).ask([question()])[0].text == GOOD
    assert at[1] - at[0] >= 1.0


def test_one_good_reply_among_faults_is_enough(server: Any, judges: Any) -> None:
    faults = [
        lambda h: h.reply(503, b""),
        lambda h: h.drop(),
        lambda h: h.reply(200, b"{}"),
        lambda h: h.say(GOOD),
    ]
    server.behave = lambda h, n: faults[n](h)
    judge = judges(server.url)
    assert judge.ask([question()])[0].text == GOOD
    assert judge.counts["retries"] == 3


def test_what_cannot_get_better_is_not_repeated(server: Any, judges: Any) -> None:
    server.behave = lambda h, n: h.reply(400, b"the prompt is too long")
    judge = judges(server.url)
    assert "too long" in judge.ask([question()])[0].error
    assert len(server.seen) == 1


def test_an_empty_message_is_an_answer(server: Any, judges: Any) -> None:
    """A model that was cut off in its reasoning replies so: nothing parses, and nothing failed."""
    server.behave = lambda h, n: h.say(None)
    assert judges(server.url).ask([question()])[0].text == ""


def test_what_was_cut_off_decides_nothing(server: Any, judges: Any) -> None:
    """A reply that ends at max_tokens may quote any numbers on its way."""

    def behave(handler: Handler, number: int) -> None:
        content = f"First I thought {GOOD}, but then"
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "length"}
        handler.reply(200, json.dumps({"choices": [choice]}).encode())

    server.behave = behave
    judge = judges(server.url)
    (answer,) = judge.ask([question()])
    assert (answer.text, answer.error) == ("", None)
    assert judge.counts["cut"] == 1


def test_a_question_that_waits_too_long_for_its_turn(server: Any, judges: Any) -> None:
    """The deadline is of all that were asked together: a slow server cannot stretch a step."""

    def behave(handler: Handler, number: int) -> None:
        time.sleep(0.3)
        handler.say(GOOD)

    server.behave = behave
    judge = judges(server.url, concurrency=1, timeout_s=5.0, deadline_s=1.0)
    answers = judge.ask([question(i) for i in range(20)])
    assert answers[0].text == GOOD
    assert "waited for its turn" in answers[-1].error
    assert len(server.seen) < 10


def test_what_is_begun_is_asked_once(server: Any, judges: Any) -> None:
    judge = judges(server.url)
    judge.begin([question(i) for i in range(4)])
    assert [a.text for a in judge.ask([question(i) for i in range(5)])] == [GOOD] * 5
    assert len(server.seen) == 5
    assert judge.activity == judge.counts["requests"] + judge.counts["answered"] == 10


def test_what_was_begun_in_vain_is_not_asked_again(server: Any, judges: Any) -> None:
    server.behave = lambda h, n: h.reply(400, b"too long")
    judge = judges(server.url)
    judge.begin([question(0)])
    while judge.counts["failed"] == 0:
        time.sleep(0.01)
    assert "too long" in judge.ask([question(0)])[0].error
    assert len(server.seen) == 1
    judge.ask([question(0)])
    assert len(server.seen) == 2, "asked anew, it is another question"


def test_time_without_questions_is_no_silence(server: Any, judges: Any) -> None:
    """Nor is a rejection: the server is there."""
    faults = {0: 400, 2: 500}
    server.behave = lambda h, n: h.reply(faults[n], b"") if n in faults else h.say(GOOD)
    judge = judges(server.url, silence_s=0.2, retries=1)
    for number in range(2):
        judge.ask([question(number)])
        time.sleep(0.3)
    assert judge.ask([question(2)])[0].text == GOOD
    assert judge.counts["down"] == 0
    server.behave = lambda h, n: h.reply(500, b"")
    assert judge.ask([question(3)])[0].text is None
    time.sleep(0.3)
    server.behave = lambda h, n: h.reply(503, b"") if n == 6 else h.say(GOOD)
    assert [a.text for a in judge.ask([question(i) for i in range(4, 8)])] == [GOOD] * 4


def test_comparisons_begin_before_the_group_is_whole(server: Any, judges: Any) -> None:
    environment = Preference(judges(server.url))
    (prompt,) = environment.prompts(seed=1, count=1)
    group = [[Message("assistant", f"text {i}")] for i in range(4)]
    for new in (2, 0, 3):
        environment.begin_group(prompt, {i: group[i] for i in {2, 0, new}}, new)
    assert environment.judge.counts["asked"] == 4  # type: ignore[attr-defined]
    environment.score_groups([(prompt, group)])
    assert len(server.seen) == 6, "every pair once"


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_probe_finds_what_is_rejected(server: Any, judges: Any, status: int) -> None:
    server.behave = lambda h, n: h.reply(status, b"no such model")
    assert "no such model" in judges(server.url).probe()


def test_a_probe_lets_pass_what_may_get_better(server: Any, judges: Any) -> None:
    judge = judges(server.url)
    for behave in (lambda h, n: h.say(GOOD), lambda h, n: h.drop(), lambda h, n: time.sleep(0.8)):
        server.behave = behave
        assert judge.probe() is None


def test_the_deadline_bounds_all_tries(server: Any, judges: Any) -> None:
    server.behave = lambda h, n: h.reply(500, b"")
    judge = judges(server.url, retries=1000, backoff_s=0.05, deadline_s=0.6)
    (answer,) = judge.ask([question()])
    assert "deadline_s(0.6)" in answer.error
    assert len(server.seen) < 500


def test_a_dead_server_costs_one_deadline_and_not_one_a_question(judges: Any, server: Any) -> None:
    up = threading.Event()
    server.behave = lambda h, n: h.say(GOOD) if up.is_set() else h.drop()
    judge = judges(server.url, retries=1000, timeout_s=30.0, silence_s=0.5, concurrency=4)
    answers = judge.ask([question(i) for i in range(400)])
    assert all(a.text is None and a.error for a in answers)
    # One by one they would take 400 / 4 * 0.5 s = 50 s.
    assert judge.counts["down"] > 350, "few wait for the server"
    up.set()
    answers = judge.ask([question(i) for i in range(400)])
    assert all(a.text == GOOD for a in answers), "it is noticed at once when it is back"


def test_nobody_listens(judges: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = judges(f"http://127.0.0.1:{port}", silence_s=0.3)
    (answer,) = judge.ask([question()])
    assert "ConnectionRefusedError" in answer.error


def test_questions_go_to_the_least_loaded_of_several_servers(judges: Any, server: Any) -> None:
    with loopback_server() as other:
        judge = judges(server.url, urls=(other.url, server.url), concurrency=4)
        found = judge.ask([question(i) for i in range(40)])
        assert [a.error for a in found] == [None] * 40
        assert len(server.seen) + len(other.seen) == 40
        assert min(len(server.seen), len(other.seen)) >= 10
        # One that fails is asked last.
        other.behave = lambda handler, number: handler.send_error(500)
        before = len(other.seen)
        found = judge.ask([question(i) for i in range(100, 140)])
        assert [a.error for a in found] == [None] * 40
        assert len(other.seen) - before <= 4
        assert judge.counts["status_500"] <= 4


def test_judges_announce_themselves(judges: Any, server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "judges"
    judge = judges("", announce=str(folder), servers=2, deadline_s=60.0)
    asked: Any = []
    thread = threading.Thread(target=lambda: asked.append(judge.ask([question()])))
    thread.start()
    with loopback_server() as other:
        for one, key in ((server, "first"), (other, "second")):
            time.sleep(0.2)
            assert not asked
            announce(announcement(folder, one.url), one.url, key)
        thread.join(30)
        assert asked[0][0].error is None
        assert judge.counts["unreachable"] >= 1
    silent = judges("", announce=str(tmp_path / "none"), silence_s=0.2, deadline_s=0.5)
    assert "0 of 1 judges are announced" in silent.ask([question()])[0].error


def closed_while_asking(
    judge: ServerJudge, count: int, *, after_s: float
) -> tuple[list[Answer], float]:
    """Answers of a judge that is closed while it is asked, and the seconds until they came."""
    found: list[Answer] = []
    asking = threading.Thread(
        target=lambda: found.extend(judge.ask([question(i) for i in range(count)]))
    )
    asking.start()
    time.sleep(after_s)
    started = time.monotonic()
    judge.close()
    asking.join(timeout=25)
    return found, time.monotonic() - started


def test_a_closed_judge_waits_for_nothing(server: Any, judges: Any) -> None:
    server.behave = lambda h, n: h.reply(500, b"")
    judge = judges(server.url, retries=1000, backoff_s=30.0, deadline_s=600.0, concurrency=2)
    answers, seconds = closed_while_asking(judge, 9, after_s=0.2)
    assert seconds < 25, "less than a back-off"
    assert [a.text for a in answers] == [None] * 9
    assert judge.ask([question()])[0].error == "the judge is closed"


def test_closing_cuts_off_requests(server: Any, judges: Any) -> None:
    server.behave = lambda h, n: server.over.wait(30)
    judge = judges(server.url, timeout_s=30.0, deadline_s=600.0, concurrency=2)
    answers, seconds = closed_while_asking(judge, 5, after_s=0.3)
    assert seconds < 25, "less than the server takes"
    assert [a.text for a in answers] == [None] * 5


def test_a_group_is_scored_beside_faults(server: Any, judges: Any) -> None:
    """One response's questions never get an answer, another's are dropped at first."""
    dropped: set[str] = set()

    def behave(handler: Handler, number: int) -> None:
        text = server.seen[number][1]["messages"][1]["content"]
        if "bad 0" in text:
            handler.reply(500, b"")
        elif "bad" in text and text not in dropped:
            dropped.add(text)
            handler.drop()
        else:
            handler.say(GOOD)

    server.behave = behave
    environment = Preference(judges(server.url, retries=2))
    (prompt,) = environment.prompts(seed=1, count=1)
    texts = ["bad 0", "bad 1", *(f"good {i}" for i in range(6))]
    (verdicts,) = environment.score_groups([(prompt, [[Message("assistant", t)] for t in texts])])
    assert verdicts[0].reward is None
    assert all(v.reward is not None for v in verdicts[1:])
    assert [v.details["unanswered"] for v in verdicts] == [7, *[1] * 7]
    assert {v.details["pairs"] for v in verdicts[1:]} == {6}


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"judge\.url.*judge\.model"):
        make_judge(JudgeConfig(kind="server"))
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_KEY"):
        make_judge(JudgeConfig(kind="server", url="http://x:1", model="m", api_key_env="NO_KEY"))
    monkeypatch.setenv("BAD_KEY", "two\nlines")
    with pytest.raises(ValueError, match="BAD_KEY") as error:
        make_judge(JudgeConfig(kind="server", url="http://x:1", model="m", api_key_env="BAD_KEY"))
    assert "lines" not in str(error.value), "a key is shown nowhere"
    for url in ("http://x:80a", "x:80", "http://", "ftp://x", "http://x:1/\n"):
        with pytest.raises(ValueError, match=r"judge\.url"):
            make_judge(JudgeConfig(kind="server", url=url, model="m"))
    with pytest.raises(ValueError, match="only a stage can make it"):
        make_judge(JudgeConfig(kind="artifact", artifact="x"))
