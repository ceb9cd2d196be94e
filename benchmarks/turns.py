"""Processes that take turns: what is compared then meets the same moods of the machine."""

import atexit
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that atexit ends what was started


def rounds(least: int, most: int, seconds: float) -> Iterator[int]:
    """The numbers of rounds: at least and at most so many, and in between no further one after so many seconds.

    So a machine on which each takes long measures fewer of them.
    """
    began = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - began > seconds:
            return
        yield number


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
        """Let it go on meanwhile, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        """End it wherever it is, with all that it has started."""
        atexit.unregister(self.end)  # its number may become that of another process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self) -> SystemExit:
        """To raise when it has ended where it should not."""
        status = self.process.wait()
        self.end()
        return SystemExit(f"{' '.join(self.words)}\nended with {status}")


class InTerminal(InTurns):
    """The same in a terminal, so that it draws its progress bars as a user sees them."""

    def __init__(self, words: Sequence[Any], **environment: str) -> None:
        screen, terminal = pty.openpty()  # what is written to the second is read from the first
        termios.tcsetwinsize(screen, (30, 100))
        super().__init__(words, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | environment)
        os.close(terminal)
        self.printed = bytearray()
        self.reader = threading.Thread(target=self.read, args=(screen,), daemon=True)
        self.reader.start()

    def read(self, screen: int) -> None:
        """Read what it prints, or it would have to wait, until nobody is left to print."""
        with contextlib.suppress(OSError):  # how Linux says so
            while text := os.read(screen, 4096):
                self.printed += text
        os.close(screen)

    def ended(self) -> SystemExit:
        """The same, with its last lines."""
        self.reader.join(1)
        return SystemExit(f"{super().ended()}:\n{self.printed[-3000:].decode(errors='replace')}")


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
        raise self.ended()


def answer(measure: Callable[[str], Any]) -> None:
    """In the process of a Measurer: answer its questions."""
    for question in sys.stdin:
        print(f"{ANSWER}{json.dumps(measure(question.strip()))}", flush=True)
