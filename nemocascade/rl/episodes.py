"""Episodes: alternating turns of the policy and of the environment that answers its tool calls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from threading import Lock

import torch

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.data.reply import Reply
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.envs.base import failed, tool_results
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.tasks import Task
from nemocascade.rollout.engine import Completion
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.watchdog import Watchdog
from nemocascade.types import Environment, Message, SandboxUnavailable, ToolSession, Verdict


class Episodes:
    """The episodes of one engine run, by request.

    The task's tools answer a turn with calls. The episode ends with a turn without calls, at turn
    number `max_turns`, or when the session reports that it is done. A call that cannot be parsed
    is answered with the error. A tool failure ends its own episode only; the verifier decides the
    outcome, unless the host caused the failure: then the episode has no reward.

    watch: receives progress for every finished call, so that slow tools do not count as a stall.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        environments: Mapping[str, Environment],
        settings: RolloutConfig,
        tasks: Mapping[int, Task],
        watch: Watchdog | None = None,
    ) -> None:
        self.tokenizer, self.environments = tokenizer, environments
        self.settings, self.tasks = settings, tasks
        self._watch = watch or Watchdog()
        self._sessions: dict[int, ToolSession | None] = {}
        self._results: dict[int, list[list[Message]]] = {}
        self._failures: dict[int, Verdict] = {}
        self._lock = Lock()

    def respond(self, completion: Completion) -> list[int] | None:
        """Tokens of the environment's turn and the next generation prompt; None ends the episode.

        Runs in a worker thread, at most once at a time for each episode. Raises SandboxUnavailable:
        without isolation every later call would fail too.
        """
        number = completion.request.id
        try:
            return self._answer(number, completion)
        except SandboxUnavailable:
            raise
        except Exception as error:
            with self._lock:
                self._failures[number] = failed(error)
            LOGGER.warning(
                "%s: its tools failed, the episode ends: %s: %s",
                self.tasks[number].prompt.source,
                type(error).__name__,
                error,
            )
            return None

    def _answer(self, number: int, completion: Completion) -> list[int] | None:
        session = self._session(number)
        if session is None or completion.turns >= self.settings.max_turns:
            return None
        reply = self._parse(number, completion.last_turn())
        if not reply.message.tool_calls and not reply.faults:
            return None
        said = f"a tool of request {number} has answered"
        results = tool_results(
            session, reply.message, reply.faults, lambda: self._watch.progress(said)
        )
        with self._lock:
            self._results.setdefault(number, []).append(results)
        if session.done:
            return None
        prompt = self.tasks[number].prompt
        segments = self.tokenizer.template.render_results(
            Conversation(prompt.messages, prompt.tools),
            reply.message,
            results,
            thinking=self._thinking(number),
        )
        return encode(segments, self.tokenizer)[0]

    def close(self, number: int) -> None:
        """Close the tools of a finished episode, given its request id."""
        with self._lock:
            session = self._sessions.pop(number, None)
        if session is not None:
            session.close()

    def close_all(self) -> None:
        """Close all episodes, including interrupted ones."""
        for number in list(self._sessions):
            self.close(number)

    def host_failure(self, number: int) -> Verdict | None:
        """The verdict on an episode whose tools failed because of the host; None for others."""
        found = self._failures.get(number)
        return found if found is not None and found.fault == "host" else None

    def response(self, completion: Completion) -> list[Message]:
        """All turns after the prompt: the policy's turns and the tool results between them."""
        results = self._results.get(completion.request.id, [])
        messages: list[Message] = []
        for turn, ids in enumerate(_turns(completion)):
            messages.append(self._parse(completion.request.id, ids).message)
            if turn < len(results):
                messages += results[turn]
        return messages

    def _parse(self, number: int, ids: list[int]) -> Reply:
        text = self.tokenizer.decode(ids)
        return self.tokenizer.template.parse(text, thinking=self._thinking(number))

    def _thinking(self, number: int) -> bool:
        thinking = self.tasks[number].thinking
        return self.settings.thinking if thinking is None else thinking

    def _session(self, number: int) -> ToolSession | None:
        with self._lock:
            if number in self._sessions:
                return self._sessions[number]
        # Outside the lock: opening a repository may take long.
        prompt = self.tasks[number].prompt
        session = self.environments[prompt.domain].session(prompt)
        with self._lock:
            self._sessions[number] = session
        return session


def _turns(completion: Completion) -> list[list[int]]:
    """Token ids of each turn of the policy."""
    start = len(completion.request.prompt)
    written, ids = completion.written[start:], completion.tokens[start:]
    if not ids.numel():
        return []
    cuts = torch.nonzero(written[1:] != written[:-1])[:, 0].add(1).tolist()
    bounds = [0, *cuts, ids.numel()]
    return [ids[a:b].tolist() for a, b in itertools.pairwise(bounds) if bool(written[a])]
