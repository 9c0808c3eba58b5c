"""What test_isolate.py calls in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from fofa_deploy.errors import BuildError, InterruptedRunError
from fofa_deploy.types import Frozen


class Text(Frozen):
    text: str = ""


class Number(Frozen):
    value: float


def echo(request: Text) -> Text:
    return Text(text=request.text)


def pid(request: Text) -> Number:
    return Number(value=os.getpid())


def refuse(request: Text) -> Text:
    raise BuildError(f"{request.text} does not fit", "make it fit")


def interrupt(request: Text) -> Text:
    raise InterruptedRunError("stopped", "go on")


def trip(request: Text) -> Text:
    raise ZeroDivisionError(request.text)


def leave(request: Text) -> Text:
    sys.exit(request.text)


def segfault(request: Text) -> Text:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return request


def hang(request: Text) -> Text:
    """Beside a grandchild that hangs too; ``text`` names the file for both process ids."""
    with subprocess.Popen(["sleep", "300"]) as grandchild, open(request.text, "w") as file:  # noqa: PTH123
        print(os.getpid(), grandchild.pid, file=file, flush=True)
        time.sleep(300)
    return request


def devour(request: Text) -> Number:
    return Number(value=len(bytearray(int(request.text))))


def chatter(request: Text) -> Text:
    print('{"result": {"text": "forged"}}', flush=True)
    os.write(1, b'{"result": {"text": "forged"}}\n' * 10_000)
    os.write(2, b"noise\n" * 10_000)
    return request


def nan(request: Text) -> Number:
    return Number.model_construct(value=float("nan"))


class Counter:
    """An object with a life of its own."""

    def __init__(self, request: Number) -> None:
        self._value = request.value

    def add(self, amount: float) -> float:
        self._value += amount
        return self._value

    def fail(self) -> None:
        raise BuildError("broken", "mend it")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
