"""A command in a pseudo-terminal of its own, driven as a person would: type, wait for words, press keys."""

import os
import pty
import re
import select
import signal
import time

PATIENCE = 120.0  # seconds


class Terminal:
    """Start a command; `expect` waits for a pattern in what it prints after the last one found."""

    def __init__(self, *command: str):
        self.text = ""  # all that was printed
        self._at = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, os.environ | {"TERM": "dumb", "HF_HUB_OFFLINE": "1"})

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt_typing(self, text: str) -> None:
        """Type a text and press Ctrl-C, as a person does: again if nothing happens.

        Python notices a signal that comes before readline's `select` at the next key only.
        """
        self.send(text)
        self.expect(re.escape(text))  # the echo: readline has taken it in, and waits again
        before = len(self.text)
        for _ in range(10):
            self.send("\x03")
            self._more(2.0)
            if len(self.text) > before:
                return

    def expect(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + PATIENCE
        while True:
            if match := re.compile(pattern, re.S | re.M).search(self.text, self._at):
                self._at = match.end()
                return match
            if time.monotonic() > deadline or not self._more(deadline - time.monotonic()):
                raise AssertionError(f"no {pattern!r} in:\n{self.text[self._at :]}\nafter:\n{self.text[: self._at]}")

    def ask(self, question: str) -> tuple[str, str]:
        """Ask at the prompt; return the answer and the line about it."""
        self.send(f"{question}\n")
        self.expect(re.escape(question))  # the terminal's echo
        match = self.expect(r"^(.*?)\n\x1b\[2m\[([^\n]*)\]\x1b\[0m\n> $")
        return match[1].strip("\n"), match[2]

    def ended(self) -> int:
        """Wait for the end of the command; return its exit status."""
        while self._more(PATIENCE):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass

    def _more(self, seconds: float) -> bool:
        """Take in what is printed within so many seconds; tell whether the command is still there."""
        if not select.select([self._fd], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.text += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)
