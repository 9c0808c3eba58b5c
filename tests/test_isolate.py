"""Child processes: whatever happens in there is one error out here, and nobody is left behind."""

import signal
import time
from pathlib import Path

import pytest
from isolated_targets import Number, Text
from tiny import alive, python

from fofa_deploy.errors import BuildError, ChildError, InterruptedRunError
from fofa_deploy.isolate import Child, run_isolated

PARENT = """
import sys
from isolated_targets import Text
from fofa_deploy.isolate import run_isolated
run_isolated("isolated_targets:hang", Text(text=sys.argv[1]), Text, seconds=300)
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def ask(name: str, text: str = "", returns=Text, seconds: float = 60, **options):
    return run_isolated(f"isolated_targets:{name}", Text(text=text), returns, seconds=seconds, **options)


def wait_for_pids(file: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.is_file() and file.read_text().endswith("\n"):
            return [int(pid) for pid in file.read_text().split()]
        time.sleep(0.02)
    raise TimeoutError(f"{file} was not written")


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_a_result_comes_back_typed():
    assert ask("echo", "ä \n 'quoted' \0") == Text(text="ä \n 'quoted' \0")


def test_the_child_is_gone_when_the_answer_is_there():
    assert not alive(int(ask("pid", returns=Number).value))


def test_what_is_raised_on_purpose_arrives_as_it_was():
    with pytest.raises(BuildError) as caught:
        ask("refuse", "the graph")
    assert type(caught.value) is BuildError
    assert (caught.value.message, caught.value.action) == ("the graph does not fit", "make it fit")
    with pytest.raises(InterruptedRunError) as caught:
        ask("interrupt")
    assert caught.value.exit_code == 130


def test_what_is_raised_by_accident_comes_with_its_trace():
    with pytest.raises(ChildError, match="isolated_targets:trip raised ZeroDivisionError: oops") as caught:
        ask("trip", "oops")
    assert "in trip" in caught.value.action


@pytest.mark.parametrize("target", ["isolated_targets:nothing", "no_such_module:f"])
def test_a_target_that_is_not_there_is_an_error(target):
    with pytest.raises(ChildError, match=r"raised (AttributeError|ModuleNotFoundError)"):
        run_isolated(target, Text(), Text, seconds=60)


def test_a_crash_names_the_signal_and_the_last_words():
    with pytest.raises(ChildError, match=r"died of SIGSEGV: (.|\n)*last words"):
        ask("segfault")


def test_an_exit_names_its_code():
    with pytest.raises(ChildError, match="ended with code 1: bye"):
        ask("leave", "bye")


def test_a_hang_ends_at_the_time_limit_and_leaves_no_process(tmp_path):
    started = time.monotonic()
    with pytest.raises(ChildError, match="gave no answer in 5 s"):
        ask("hang", str(tmp_path / "pids"), seconds=5)
    assert time.monotonic() - started < 20
    assert gone(wait_for_pids(tmp_path / "pids"))


def test_the_memory_limit_holds():
    with pytest.raises(ChildError, match="raised MemoryError"):
        ask("devour", str(1 << 30), Number, memory_bytes=512 << 20)
    assert ask("devour", str(1 << 20), Number, memory_bytes=512 << 20).value == 1 << 20


def test_what_libraries_print_is_no_answer():
    assert ask("chatter", "mine") == Text(text="mine")


def test_a_result_that_is_not_a_number_is_refused():
    with pytest.raises(ChildError, match="not JSON compliant"):
        ask("nan", returns=Number)


def test_nobody_survives_a_killed_parent(tmp_path):
    with python(PARENT, tmp_path / "pids") as parent:
        pids = wait_for_pids(tmp_path / "pids")
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    assert gone(pids)


def test_an_object_lives_on_between_calls():
    with Child("isolated_targets:Counter", Number(value=1), seconds=60) as child:
        assert child.first is None
        assert child.call("add", amount=2) == 3
        assert child.call("add", amount=2) == 5


@pytest.mark.parametrize(("method", "kind", "words"), [("fail", BuildError, "broken"), ("die", ChildError, "died of SIGKILL")])
def test_an_object_that_fails_is_gone(method, kind, words):
    with Child("isolated_targets:Counter", Number(value=1), seconds=60) as child:
        process = child._process.pid
        with pytest.raises(kind, match=words):
            child.call(method)
        assert not alive(process)


def test_what_lies_in_the_current_folder_is_not_run(tmp_path, monkeypatch):
    """Beside a downloaded model there may be any file, a numpy.py for one."""
    (tmp_path / "json.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    assert ask("echo", "safe") == Text(text="safe")
