"""Run a function of this package in a child process: a native crash, a hang or a memory leak costs one target, not the run.

The parent writes JSON lines to the child's standard input; the child answers on a pipe of its own, so that what libraries
print cannot be taken for an answer. The child ends with its parent: end of file on standard input is its order to leave.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from types import TracebackType
from typing import Any, Self, TypeVar, get_type_hints

from pydantic import BaseModel

from fofa_deploy import errors
from fofa_deploy.errors import ChildError, FofaError

LOG_TAIL = 2000
M = TypeVar("M", bound=BaseModel)


class Child:
    """An object that lives in a process of its own.

    Args:
        target: ``module:callable``, called there with ``request``, whose type is the annotation of its first parameter.
        seconds: time limit of every single answer.
        memory_bytes: limit of the child's private memory, or None.

    Raises:
        ChildError: it crashed, hung, or raised something unexpected; the whole process group is gone then.
        FofaError: whatever the callable raised on purpose.
    """

    def __init__(self, target: str, request: BaseModel, *, seconds: float, memory_bytes: int | None = None) -> None:
        self._target, self._seconds = target, seconds
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        read, write = os.pipe()
        # -P: python -m would look for numpy, and for everything else, in the current folder first.
        command = [sys.executable, "-P", "-m", "fofa_deploy.isolate", str(write), str(memory_bytes or 0)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=[write], start_new_session=True
        )
        os.close(write)
        self._answers = os.fdopen(read, "rb", buffering=0)
        self._buffer = b""
        self.first = self._ask({"target": target, "request": request.model_dump_json()})

    def call(self, method: str, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        """Call a method of the object over there; arguments and result are JSON."""
        return self._ask({"method": method, "arguments": arguments})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child and whatever it started; a second call does nothing."""
        if self._answers.closed:
            return
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()
        self._log.close()

    def _ask(self, message: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read_reply()
        except BrokenPipeError as error:
            problem = ChildError(f"{self._target} {self._ending()}", "the other targets go on without it")
            self.close()
            raise problem from error
        except BaseException:
            self.close()
            raise
        if "error" in reply:
            self.close()
            raise _rebuild(reply["error"], self._target)
        return reply["result"]

    def _read_reply(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], self._seconds)
            if not ready:
                raise ChildError(f"{self._target} gave no answer in {self._seconds:g} s", "raise the plan's [limits], or drop it")
            chunk = self._answers.read(1 << 16)
            if not chunk:
                raise ChildError(f"{self._target} {self._ending()}", "see the log above; the other targets go on without it")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ending(self) -> str:
        code = self._process.wait(timeout=10)
        self._log.seek(max(0, self._log.tell() - LOG_TAIL))
        tail = self._log.read().decode(errors="replace").strip()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{how}{': ' + tail if tail else ''}"


def run_isolated(target: str, request: BaseModel, returns: type[M], *, seconds: float, memory_bytes: int | None = None) -> M:
    """Call ``target(request)`` once in a child process; see `Child` for arguments and errors."""
    with Child(target, request, seconds=seconds, memory_bytes=memory_bytes) as child:
        return returns.model_validate(child.first)


def _rebuild(error: dict[str, str], target: str) -> FofaError:
    kind = getattr(errors, error["type"], None)
    if isinstance(kind, type) and issubclass(kind, FofaError):
        return kind(error["message"], error["action"])
    return ChildError(f"{target} raised {error['type']}: {error['message']}", f"report it with this trace:\n{error['action']}")


# --- the child's side -----------------------------------------------------------------------------------------


def _resolve(name: str) -> Any:  # noqa: ANN401 - any callable
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _start(message: dict[str, Any]) -> Any:  # noqa: ANN401 - whatever the target makes
    target = _resolve(message["target"])
    hints = get_type_hints(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    request_type = next(kind for name, kind in hints.items() if name != "return")
    return target(request_type.model_validate_json(message["request"]))


def _plain(result: Any) -> Any:  # noqa: ANN401 - JSON
    return result.model_dump(mode="json") if isinstance(result, BaseModel) else result


def _guarded(work: Any, *arguments: Any, **named: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401 - any callable
    """Call, and make an answer of whatever happens: the parent decides what an unexpected exception means."""
    try:
        result = work(*arguments, **named)
    except FofaError as error:
        return {"error": {"type": type(error).__name__, "message": error.message, "action": error.action}}, None
    except Exception as error:  # noqa: BLE001 - a process boundary: the other side raises it again
        return {"error": {"type": type(error).__name__, "message": str(error), "action": traceback.format_exc()}}, None
    return {"result": _plain(result) if isinstance(result, BaseModel) else None}, result


def _lines() -> queue.SimpleQueue[bytes]:
    """Standard input, line by line, from a thread that ends the process, and what it started, when its parent is gone."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stdin = open(0, "rb", closefd=False)  # noqa: SIM115 - sys.stdin's lock would abort the interpreter's shutdown

    def read() -> None:
        for line in stdin:
            lines.put(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _serve(answers: int) -> None:
    lines = _lines()
    reply, held = _guarded(_start, json.loads(lines.get()))
    while True:
        os.write(answers, json.dumps(reply, allow_nan=False).encode() + b"\n")
        message = json.loads(lines.get())
        reply, result = _guarded(getattr(held, message["method"]), **message["arguments"])
        if "result" in reply:
            reply = {"result": _plain(result)}


def _main() -> None:
    answers, memory = int(sys.argv[1]), int(sys.argv[2])
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    _serve(answers)


if __name__ == "__main__":
    _main()
