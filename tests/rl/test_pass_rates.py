"""`nemocascade pass-rates` against a loopback server, killed and resumed; its rows, its errors."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.data import sentencepiece_tokenizer

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.envs.mathematics import Mathematics
from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    JudgeConfig,
    ParallelConfig,
    RecipeError,
    RolloutConfig,
)
from nemocascade.recipe.pass_rates import PassRateSettings, settings_of_stage
from nemocascade.rl.row_rates import RewardLog, open_journal, read_row_tasks, write_rated
from nemocascade.rl.tasks import read_tasks
from nemocascade.rollout.servers import ServerError
from nemocascade.runtime.row_errors import DataError, reject_row
from nemocascade.runtime.stopping import Stopped
from nemocascade.stages.pass_rates import run_pass_rates
from nemocascade.types import Environment, Message, Prompt, Verdict

ROWS, SAMPLES, SEED = 12, 4, 1
ROOT = Path(__file__).resolve().parents[2]


class Policy(BaseHTTPRequestHandler):
    """Solves a row in as many of its samples as the row's number modulo 5."""

    server: Any

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokenizer: Tokenizer = server.tokenizer
        text = body["prompt"] if server.text else tokenizer.decode(body["prompt"])
        length = len(tokenizer.encode(text, allow_special=True))
        length = length if server.text else len(body["prompt"])
        row = int(re.findall(r"is (\d+) \+ 1\?", text)[-1])
        number = (body["seed"] - SEED * 1_000_003 - length) // 8191
        with server.lock:
            server.asked.append((row, number))
            if len(server.asked) > server.patience:
                server.stuck.set()
        if server.stuck.is_set():
            server.release.wait(60)
        solved = number % SAMPLES < row % 5
        reply = f"\\boxed{{{row + 1 if solved else 0}}}<|im_end|>"
        ids = tokenizer.encode(reply, allow_special=True)
        finish = "length" if server.cuts else "stop"
        choice: dict[str, Any] = {"finish_reason": finish, "text": reply}
        if not server.text:
            choice["token_ids"] = ids
        data = json.dumps({"choices": [choice]}).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            """The client was killed."""

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Policy)
    found.tokenizer, found.text, found.asked = sentencepiece_tokenizer(), False, []
    found.cuts = False
    found.patience, found.stuck, found.release = 10**9, threading.Event(), threading.Event()
    found.lock = threading.Lock()
    found.url = f"http://127.0.0.1:{found.server_port}"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.release.set()
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def environments() -> Iterator[dict[str, Environment]]:
    found = make_environments()
    yield dict(found)
    close_environments(found)


def row(number: int, **fields: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"what is {number} + 1?"}]
    return {
        "uuid": f"r{number}",
        "responses_create_params": {"input": prompt, "x": None},
        "expected_answer": str(number + 1),
        "extra": {"\u00e9": [1, 2.5, 10**20]},
        **fields,
    }


def write_lines(path: Path, lines: list[Any]) -> Path:
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def start(server: Any, rows: Path, output: Path, *more: str) -> Command:
    command = ["-m", "nemocascade.cli", "pass-rates", str(rows), *more]
    command += ["--output", str(output), "--server", server.url, "--model", "m"]
    command += ["--tokenizer", server.tokenizer.path, "--samples", str(SAMPLES)]
    command += ["--rollout.max-response-tokens", "64", "--rollout.thinking", "False"]
    command += ["--rollout.slots", "3", "--rollout.prompts-per-step", "8"]
    command += ["--envs.check-workers", "1"]
    return Command(command)


def test_a_killed_run_resumes_and_repeats_no_finished_sample(server: Any, tmp_path: Path) -> None:
    good = [row(n) for n in range(ROWS)]
    good[3]["pass_rate"] = 0.125  # measured before, by another policy
    long = row(99)
    long["responses_create_params"]["input"][0]["content"] = "word " * 400 + "what is 99 + 1?"
    lines = [*good[:5], "{broken", row(50, expected_answer=""), *good[5:], {"a": 1}, long]
    rows, output = write_lines(tmp_path / "rows.jsonl", lines), tmp_path / "rated.jsonl"
    more = ("--domains", "math", "--rollout.max-prompt-tokens", "200")

    server.patience = 20
    with start(server, rows, output, *more) as first:
        assert server.stuck.wait(60), first.said()
        journal = tmp_path / "rated.jsonl.progress" / "rank_0.jsonl"
        deadline = time.monotonic() + 20
        while len(journal.read_text().splitlines()) < 21 and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not output.exists()
    with journal.open("a") as file:
        file.write('{"row": 0, "sam')  # as a kill in the middle of a line would leave it
    known = {(line["row"], line["sample"]) for line in lines_of_journal(journal)}
    assert len(known) == 20

    before = len(server.asked)
    server.patience = 10**9
    server.stuck.clear()
    server.release.set()
    with start(server, rows, output, *more) as second:
        done = second.wait(120)
    printed, log = done.stdout, done.stderr
    assert done.returncode == 0, log
    again = Counter(server.asked[before:])
    assert set(again.values()) == {1}
    assert len(again) == ROWS * SAMPLES - 20
    assert not {divmod(number, SAMPLES) for _, number in again} & known

    rated = {line["uuid"]: line for line in lines_of(output)}
    assert list(rated) == [f"r{n}" for n in range(ROWS)] + ["r99"]
    for n, line in enumerate(good):
        rate = min(n % 5, SAMPLES) / SAMPLES
        assert rated[f"r{n}"] == {**line, "pass_rate": rate, "pass_rate_samples": SAMPLES}
    assert rated["r99"] == long, "a row that no stage would take stays as it is"
    assert json.loads(printed) == {
        "output": str(output),
        "rows": ROWS + 1,
        "bad_rows": 3,
        "too_long": 1,
        "without_verdict": 0,
        "solved_always": 2,
        "solved_never": 3,
        "pass_rate": pytest.approx(sum(n % 5 for n in range(ROWS)) / SAMPLES / ROWS),
    }
    assert "3 bad rows are skipped" in log
    assert "rows.jsonl:6: not JSON" in log
    assert "20 finished samples are not repeated" in log

    # A stage filters by what was written.
    domain = DomainConfig("math", path=(str(output),), drop_solved=1.0, tasks=0)
    every = make_environments()
    kept = read_tasks(domain, every, seed=1, heldout=False, count=0)
    close_environments(every)
    assert len(kept) == ROWS + 1 - 2


def lines_of_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_server_of_text_and_one_without_ids(server: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [row(n) for n in range(2, 5)])
    server.text = True
    asked = settings(
        tmp_path,
        server=server.url,
        tokenizer=server.tokenizer.path,
        samples=SAMPLES,
        rollout=RolloutConfig(max_response_tokens=64, thinking=False, slots=3),
    )
    with pytest.raises(
        ServerError, match="set --text True if the server exchanges text only; the same command"
    ):
        run_pass_rates(asked)
    found = run_pass_rates(replace(asked, text=True))
    assert (found["rows"], found["without_verdict"]) == (3, 0)
    with pytest.raises(RecipeError, match=r"out.jsonl\) exists: name another file, or delete it"):
        run_pass_rates(asked)


@pytest.mark.parametrize(("coefficient", "rate"), [(None, 1.0), (0.0, 0.0)])
def test_truncated_answers_count_as_in_training(
    server: Any, tmp_path: Path, coefficient: float | None, rate: float
) -> None:
    write_lines(tmp_path / "rows.jsonl", [row(4)])
    server.cuts = True
    asked = settings(
        tmp_path,
        server=server.url,
        tokenizer=server.tokenizer.path,
        samples=SAMPLES,
        rollout=RolloutConfig(
            max_response_tokens=64, thinking=False, stop_properly_penalty_coef=coefficient
        ),
    )
    run_pass_rates(asked)
    assert [line["pass_rate"] for line in lines_of(Path(asked.output))] == [rate]


def test_a_failed_verifier_is_no_attempt(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again by the next start, and counts in no rate."""
    write_lines(tmp_path / "rows.jsonl", [row(3), row(4)])
    asked = settings(
        tmp_path,
        server=server.url,
        tokenizer=server.tokenizer.path,
        samples=SAMPLES,
        rollout=RolloutConfig(max_response_tokens=64, thinking=False),
    )
    check = Mathematics.check

    def fail(self: Mathematics, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        if prompt.answer["expected"] == "5" and "dummy" not in response[-1].content:
            raise OSError("no process can start")
        return check(self, prompt, response)

    monkeypatch.setattr(Mathematics, "check", fail)
    assert run_pass_rates(asked)["without_verdict"] == 1
    first, second = lines_of(Path(asked.output))
    assert (first["pass_rate"], first["pass_rate_samples"]) == (0.75, 4)
    assert (second["pass_rate"], second["pass_rate_samples"]) == (None, 0)
    monkeypatch.undo()
    Path(asked.output).unlink()
    before = len(server.asked)
    assert run_pass_rates(asked)["without_verdict"] == 0
    assert {n for n, _ in server.asked[before:]} == {4}
    assert lines_of(Path(asked.output))[1]["pass_rate"] == 1.0


def test_a_request_to_stop_ends_the_sampling(server: Any, tmp_path: Path) -> None:
    asked = settings(
        tmp_path,
        server=server.url,
        tokenizer=server.tokenizer.path,
        samples=2,
        rollout=RolloutConfig(max_response_tokens=64, thinking=False),
    )
    progress = Path(f"{asked.output}.progress")
    progress.mkdir()
    (progress / "stop").touch()
    with pytest.raises(Stopped) as caught:
        run_pass_rates(asked)
    assert caught.value.code == 75
    assert (progress / "stop.done").exists()
    assert run_pass_rates(asked)["rows"] == 1


def settings(tmp_path: Path, **changes: Any) -> PassRateSettings:
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        write_lines(rows, [row(1)])
    whole = PassRateSettings(
        rows=str(rows), output=str(tmp_path / "out.jsonl"), server="http://a:1", model="m"
    )
    envs = EnvConfig(check_workers=1)
    return replace(whole, **{"tokenizer": "t", "envs": envs, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows": ""}, r"rows\(''\) is not a file: name a file"),
        ({"output": "x.parquet"}, r"output\('x.parquet'\) must name a file that ends in .jsonl"),
        ({"server": ""}, "set either --artifact or --server"),
        ({"artifact": "a"}, "set either --artifact or --server"),
        ({"model": ""}, "name its --model, and the --tokenizer"),
        ({"tokenizer": ""}, "name its --model, and the --tokenizer"),
        ({"samples": 0}, r"samples\(0\) must be at least 1"),
        ({"solved_at": float("nan")}, r"solved_at\(nan\) must be a finite number"),
        ({"domains": ("maths",)}, "domains names 'maths', known are instruction_following"),
        (
            {"envs": EnvConfig(judge=JudgeConfig(kind="artifact", artifact="a"))},
            r"envs.judge.kind\(artifact\) runs beside an --artifact",
        ),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        run_pass_rates(settings(tmp_path, **changes))


def test_a_stage_gives_its_sampling() -> None:
    recipes = ROOT / "recipes/nemotron3_nano_30b"
    found = settings_of_stage(str(recipes / "swe_agentic_rl.py"))
    assert (found.rollout.temperature, found.rollout.max_turns) == (0.8, 200)
    assert found.domains == ("swe_agentic",)
    assert found.envs.sandbox.memory_mib == 8192
    assert found.parallel == ParallelConfig(tp=2, cp=8, ep=8)
    assert settings_of_stage("") == PassRateSettings()
    with pytest.raises(RecipeError, match=r"sft.py\) is of no RL stage: name another script"):
        settings_of_stage(str(recipes / "sft.py"))


def test_a_row_belongs_to_one_domain(environments: dict[str, Environment], tmp_path: Path) -> None:
    swe = {"problem_statement": "x", "repository": "there", "golden_files": ["a.py"]}
    path = write_lines(tmp_path / "rows.jsonl", [row(1), swe])
    both = {name: environments[name] for name in ("math", "swe_agentic", "swe_agentless")}
    with pytest.raises(DataError, match=r"jsonl:2: swe_agentic and swe_agentless claim the row"):
        read_row_tasks(path, both, tmp_path / "out.jsonl")
    one = {name: environments[name] for name in ("math", "swe_agentic")}
    with pytest.raises(
        DataError, match=rf"'repository' is relative.*write --output into {tmp_path}"
    ):
        read_row_tasks(path, one, tmp_path / "else" / "out.jsonl")
    found = read_row_tasks(path, one, tmp_path / "out.jsonl")
    assert list(found.prompts) == [0]
    assert list(found.bad) == [f"{path}:2"]
    with pytest.raises(DataError, match="none of its 2 rows is a task of code"):
        read_row_tasks(path, {"code": environments["code"]}, tmp_path / "out.jsonl")
    write_lines(path, [row(1, expected_answer=[])])
    with pytest.raises(
        DataError, match=r"(?s)none of its 1 rows.*jsonl:1: expected_answer must be"
    ):
        read_row_tasks(path, one, tmp_path / "out.jsonl")


def test_rows_of_several_domains(environments: dict[str, Environment], tmp_path: Path) -> None:
    options = [{"A": "x"}, {"B": "y"}]
    choice = row(7, expected_answer="B", options=options)
    path = write_lines(tmp_path / "rows.jsonl", [row(1), choice, row(2), [1]])
    found = read_row_tasks(path, environments, tmp_path / "out.jsonl")
    names = {number: prompt.domain for number, prompt in found.prompts.items()}
    assert names == {0: "math", 1: "multiple_choice", 2: "math"}
    assert found.summary().startswith("1 bad rows are skipped\n  ")


def test_a_journal_belongs_to_its_settings(tmp_path: Path) -> None:
    first = settings(tmp_path, rollout=RolloutConfig(slots=7)).key("digest", "tokens", "hash")
    assert open_journal(tmp_path, first) == {}
    for rank in (0, 1):
        with closing(RewardLog(tmp_path, rank)) as journal:
            journal.record(rank, 3, 0.5)
    same = settings(tmp_path, rollout=RolloutConfig(slots=9)).key("digest", "tokens", "hash")
    assert open_journal(tmp_path, same) == {(0, 3): 0.5, (1, 3): 0.5}
    other = settings(tmp_path, samples=5, rollout=RolloutConfig(top_p=0.5)).key(
        "digest", "tokens", "hash"
    )
    with pytest.raises(DataError, match=r"another rollout\.top_p, samples: set them as"):
        open_journal(tmp_path, other)


def test_a_row_without_a_verdict_has_no_rate(
    environments: dict[str, Environment], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row(1), row(2)])
    output = tmp_path / "out.jsonl"
    rates = {0: {"pass_rate": None, "pass_rate_samples": 0}}
    assert write_rated(path, output, rates, ()) == 2
    assert lines_of(output) == [row(1) | rates[0], row(2)]
    prompts = list(environments["math"].read(output, reject_row, ()))
    assert [p.pass_rate for p in prompts] == [None, None]
