"""Processes that take turns: what is compared then meets the same moods of the machine."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class InTurns:
    """A command, with all its processes, that goes on only while it has its turn; so several can be compared fairly.

    It starts at once, so that several can start at the same time: its first turn only ends that.
    """

    def __init__(self, words: Sequence[Any], **streams: Any) -> None:
        self.words = [str(word) for word in words]
        self.process = subprocess.Popen(self.words, start_new_session=True, text=True, **streams)
        atexit.register(self.end)  # Ctrl-C does not reach its session

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let it go on meanwhile."""
        os.killpg(self.process.pid, signal.SIGCONT)
        yield
        os.killpg(self.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        """End it wherever it is."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


ANSWER = "measured: "  # begins the line of an answer, among all else that may be printed


class Measurer(InTurns):
    """A script that measures whenever it is asked to."""

    def __init__(self, words: Sequence[Any]) -> None:
        super().__init__(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, question: str = "") -> Any:
        """Its answer.

        Raises:
            SystemExit: it has ended instead.
        """
        assert self.process.stdin and self.process.stdout
        with self.turn(), contextlib.suppress(BrokenPipeError):
            print(question, file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
        raise SystemExit(f"{' '.join(self.words)}\nended with {self.process.wait()}")


def answer(measure: Callable[[str], Any]) -> None:
    """In the process of a Measurer: answer its questions."""
    for question in sys.stdin:
        print(f"{ANSWER}{json.dumps(measure(question.strip()))}", flush=True)
