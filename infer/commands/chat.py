"""``stepjax chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from stepjax.errors import StepjaxError
from stepjax.infer.commands.options import (
    Printer,
    add_model_arguments,
    add_sampling_arguments,
    open_session,
    sampling_params,
)
from stepjax.infer.commands.progress import shown_startup
from stepjax.startup import Startup

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    startup = shown_startup()
    session = open_session(args, startup=startup, needs="chat")
    session.runner(args.speculate)  # refuses a bad number before the first answer
    params = sampling_params(session, args)
    chat = Conversation(session, params, system=args.system, speculate=args.speculate, startup=startup)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() a history and line editing)

        print(f"{args.model}. {HELP}.")
    while True:
        try:
            if not _take(input("> " if sys.stdin.isatty() else "").strip(), chat):
                return 0
        except EOFError:
            return 0
        except KeyboardInterrupt:  # at the prompt: discard the line, as a shell does
            print()


def _take(line: str, chat: Conversation) -> bool:
    """Run a command or answer a message; False to leave."""
    match line:
        case "":
            pass
        case "/exit" | "/quit":
            return False
        case "/reset":
            chat.reset()
            print("(forgotten)")
        case "/help":
            print(HELP)
        case _ if line.startswith("/"):
            print(f"{line.split()[0]} is not a command; {HELP}")
        case _:
            chat.answer(line)
    return True


class Conversation:
    """The messages so far; `answer` adds the user's message and the model's."""

    def __init__(
        self, session: Any, params: Any, *, system: str | None, speculate: int | None, startup: Startup | None = None
    ):
        """
        Args:
          startup: shows the programs that an answer waits for.
        """
        self._session, self._params, self._speculate = session, params, speculate
        self._startup = startup or Startup()
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = list(self._opening)

    def answer(self, text: str) -> None:
        """Print the answer while it grows. Ctrl-C ends it; the part until then stays in the conversation."""
        from stepjax.infer.generate import Generation

        messages = [*self.messages, {"role": "user", "content": text}]
        printer = Printer()
        try:
            ids = self._session.encode_chat(messages)
            generation = Generation(self._session, [ids], [self._params], speculate=self._speculate)
            generation.prepare(self._startup)
        except StepjaxError as error:
            print(f"{error}; /reset starts a new conversation", file=sys.stderr)
            return
        except KeyboardInterrupt:  # before the answer began
            print("(stopped)")
            return
        try:
            for _, delta in generation:
                printer.write(delta)
        except KeyboardInterrupt:
            pass
        printer.end()
        done = generation.completions()[0]
        if done.finish_reason == "cancelled":
            print("(stopped)")
        reply = {"role": "assistant", "content": done.content, "reasoning_content": done.reasoning_content}
        self.messages = [*messages, reply]
