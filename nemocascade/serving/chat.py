"""`nemocascade chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nemocascade.data.reply import Reply
from nemocascade.envs.base import tool_results
from nemocascade.envs.registry import close_environments, domain_problems, make_environments
from nemocascade.recipe import RecipeError
from nemocascade.rollout.engine import Request
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import printable
from nemocascade.runtime.turns import encodable
from nemocascade.serving.model import OpenModel, open_model
from nemocascade.serving.settings import ChatSettings
from nemocascade.serving.text import Part, ReplyText, StreamDecoder
from nemocascade.types import Environment, Message, Prompt, ToolSession

HELP = """/reset           forget the conversation
/system TEXT     set the system prompt, and forget the conversation
/thinking        reasoning on or off
/task            ask a held-out task of --domain, and score the answer
/exit            leave, as does Ctrl-D; Ctrl-C ends an answer"""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

Read = Callable[[str], str]
Write = Callable[[str], object]


def chat(settings: ChatSettings) -> None:
    """Talk until the end of the input. Raises RecipeError for several ranks."""
    if (size := world_size_of_environment()) > 1:
        raise RecipeError(
            [f"chat runs in one process, and there are {size}: start it without torchrun"]
        )
    if settings.domain and (
        problems := domain_problems("domain", [settings.domain], settings.envs.modules)
    ):
        raise RecipeError(problems)
    with open_model(settings) as model, _environment(settings) as environment:
        said = f"{model.name}: {model.context} tokens of context. /help lists commands."
        print(said, flush=True)
        colors = sys.stdout.isatty()
        talk = Talk(model, settings, environment, write=_print, colors=colors)
        with contextlib.closing(talk):
            talk.run(input)


def _print(text: str) -> None:
    print(text, end="", flush=True)


@contextlib.contextmanager
def _environment(settings: ChatSettings) -> Iterator[Environment | None]:
    if not settings.domain:
        yield None
        return
    environments = make_environments(settings.envs)
    try:
        yield environments[settings.domain]
    finally:
        close_environments(environments)


class Talk:
    """A conversation. write: shows text. colors: dim the reasoning."""

    def __init__(
        self,
        model: OpenModel,
        settings: ChatSettings,
        environment: Environment | None = None,
        *,
        write: Write,
        colors: bool = False,
    ) -> None:
        self.model, self.settings, self.environment = model, settings, environment
        self.write = write
        self.thinking, self.system = settings.thinking, settings.system
        self._dim, self._plain = (_DIM, _PLAIN) if colors else ("", "")
        self._answers = 0
        self._tasks = self._prompts()
        self._session: ToolSession | None = None
        self.reset()

    def run(self, read: Read) -> None:
        """Read lines and answer them, until /exit or the end of the input."""
        while True:
            try:
                # Input that is not UTF-8 comes as halves of surrogate pairs, or as an error.
                line = encodable(read("\n> ")).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            except UnicodeDecodeError as error:
                self.write(f"the line is not UTF-8 ({error.reason}): type it again\n")
                continue
            command, _, rest = line.partition(" ")
            if command == "/exit":
                return
            if command == "/help":
                self.write(HELP + "\n")
            elif command == "/reset":
                self.reset()
            elif command == "/system":
                self.system = rest.strip()
                self.reset()
            elif command == "/thinking":
                self.thinking = not self.thinking
                self.write(f"reasoning is {'on' if self.thinking else 'off'}\n")
            elif command == "/task":
                self.task()
            elif command.startswith("/"):
                self.write(f"{printable(command)} is not a command\n{HELP}\n")
            elif line:
                self.say(line)

    def reset(self) -> None:
        """Forget the conversation. The tools of the domain start anew."""
        prompt = next(self._tasks, None)
        self._start(prompt)
        if self.system:
            self._messages = [Message("system", self.system)]
        elif prompt is not None and prompt.messages[0].role == "system":
            self._messages = [prompt.messages[0]]
        else:
            self._messages = []

    def say(self, text: str) -> None:
        """Answer a line of the user."""
        before = len(self._messages)
        self._messages.append(Message("user", text))
        try:
            self._respond()
        except KeyboardInterrupt:
            del self._messages[before:]
            self.write(f"{self._plain}\ninterrupted: this line is forgotten\n")
        except ValueError as error:
            del self._messages[before:]
            self.write(f"{printable(str(error))}; /reset forgets the conversation\n")

    def task(self) -> None:
        """Ask the domain's next held-out task, and show the verdict on the answer."""
        prompt = next(self._tasks, None)
        if prompt is None or self.environment is None:
            self.write("no task: start with --domain NAME\n")
            return
        self._start(prompt)
        self._messages = list(prompt.messages)
        for message in prompt.messages:
            self.write(printable(f"[{message.role}] {message.content}") + "\n")
        asked = len(self._messages)
        try:
            self._respond()
        except (KeyboardInterrupt, ValueError) as error:
            del self._messages[asked:]
            why = str(error) or "interrupted"
            self.write(f"{self._plain}\n{printable(why)}; /reset forgets the task\n")
            return
        verdict = self.environment.score(prompt, self._messages[asked:])
        shown = f"no verdict: {verdict.error}" if verdict.reward is None else f"{verdict.reward:g}"
        self.write(printable(f"reward {shown}") + "\n")

    def close(self) -> None:
        """End the tools."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _prompts(self) -> Iterator[Prompt]:
        if self.environment is not None:
            for seed in range(self.settings.seed, 2**32):
                yield from self.environment.prompts(seed=seed, count=16, heldout=True)

    def _start(self, prompt: Prompt | None) -> None:
        """Open the tools of a task."""
        self.close()
        self._tools = () if prompt is None else prompt.tools
        if prompt is not None and self.environment is not None:
            self._session = self.environment.session(prompt)

    def _respond(self) -> None:
        """Append the model's turns and the results of its calls."""
        for _ in range(self.settings.max_turns):
            reply = self._turn()
            self._messages.append(reply.message)
            calls = reply.message.tool_calls
            for call in calls:
                arguments = ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
                self.write(printable(f"{call.name}({arguments})") + "\n")
            if self._session is None or not (calls or reply.faults):
                return
            results = tool_results(self._session, reply.message, reply.faults)
            for result in results:
                self.write(printable(f"[tool] {result.content}") + "\n")
            self._messages += results
            if self._session.done:
                return
        self.write(f"[no answer after {self.settings.max_turns} turns: --max-turns]\n")

    def _turn(self) -> Reply:
        """Generate and show one turn."""
        model = self.model
        # Without its reasoning, an earlier turn is shorter; the template decides.
        prompt = model.tokenizer.prompt_ids(self._messages, self._tools, thinking=self.thinking)
        max_tokens = model.max_new_tokens(prompt, self.settings.max_tokens)
        sampling = replace(model.sampling, max_tokens=max_tokens)
        template = model.tokenizer.template
        decoder = StreamDecoder(model.tokenizer)
        text = ReplyText(template.reasoning(self.thinking), template.ends)
        shown: Part = "content"

        def show(deltas: Sequence[tuple[Part, str]]) -> None:
            nonlocal shown
            for part, new in deltas:
                if part == "reasoning" and not self.settings.show_thinking:
                    continue
                if part != shown:
                    self.write(self._dim if part == "reasoning" else f"{self._plain}\n\n")
                    shown = part
                self.write(printable(new))

        def observe(_: Sequence[int], tokens: Sequence[int], __: Sequence[float]) -> None:
            show(text.add(decoder.add(tokens[0])))

        self._answers += 1
        request = Request(self._answers, tuple(prompt), sampling)
        (completion,) = model.engine.run([request], sampling, observe=observe)
        show(text.add(decoder.rest()))
        reply = model.reply(completion.response, thinking=self.thinking)
        show(text.finish(reply))
        self.write(f"{self._plain}\n")
        if completion.finish == "length":
            self.write(f"[cut at {max_tokens} tokens: --max-tokens]\n")
        return reply
