"""The store: once per distinct input, whole or not at all, whatever happens in between."""

import json
import signal
from enum import Enum
from pathlib import Path

import pytest
from tiny import python

from fofa_deploy.errors import LockedError, UserError
from fofa_deploy.store import MANIFEST, Store, canonical, digest, manifests, write_atomic
from fofa_deploy.types import Budget

# One stage whose work announces itself, then waits or stops as the test says.
STAGE = """
import os, sys, time
from pathlib import Path
from fofa_deploy.store import Store
from fofa_deploy import store as module
root, resumable, where = Path(sys.argv[1]), sys.argv[2] == "resumable", sys.argv[3]
def wait():
    print("here", flush=True)
    time.sleep(60)
if where == "before-rename":
    Store._publish = lambda *_: wait()
def work(out):
    (out / "half.txt").write_text("half")
    if where == "in-work":
        wait()
with Store(root) as store:
    store.run("stage", {"x": 1}, work, resumable=resumable)
"""


def kill_stage(root: Path, where: str, resumable: bool = False) -> None:
    with python(STAGE, root, "resumable" if resumable else "plain", where) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()


class Work:
    """Writes a file and counts its calls."""

    def __init__(self, text: str = "result") -> None:
        self.calls, self.text = 0, text
        self.found: list[str] = []

    def __call__(self, out: Path) -> None:
        self.calls += 1
        self.found = sorted(p.name for p in out.iterdir())
        (out / "file.txt").write_text(self.text)


def fail(out: Path) -> None:
    (out / "half.txt").write_text("half")
    raise RuntimeError("no")


def run(root: Path, inputs: dict, work, **options) -> Path:
    with Store(root) as store:
        return store.run("stage", inputs, work, **options)


def published(root: Path) -> set[str]:
    return {p.name for p in root.iterdir()} - {".lock", ".scratch"}


def why(root: Path, inputs: dict, work, **options) -> str:
    with Store(root) as store:
        store.run("stage", inputs, work, **options)
        return store.timings[0].why


# --- keys


def test_a_file_counts_by_content_and_not_by_path(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("other")
    a, b, c = (digest(tmp_path / f"{name}.txt") for name in "abc")
    assert a == b != c


def test_a_folder_counts_by_names_and_contents(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    (tmp_path / "b" / "file").rename(tmp_path / "b" / "renamed")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="gone does not exist"):
        digest(tmp_path / "gone")


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), len, {"deep": [{"er": 1j}]}])
def test_a_value_without_a_canonical_form_is_a_type_error(value):
    with pytest.raises(TypeError, match="cannot be part of a stage's key"):
        canonical(value)


def test_only_strings_name_inputs():
    with pytest.raises(TypeError, match="cannot name"):
        canonical({1: "a"})


def test_values_that_differ_have_different_digests():
    values = [None, True, 1, 1.5, "1", [1], {"a": 1}, {"a": None}, Budget(), Budget(size_bytes=1), []]
    assert len({digest(value) for value in values}) == len(values)


def test_equal_values_have_equal_digests():
    class Colour(Enum):
        RED = "red"

    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest((1, 2)) == digest([1, 2])
    assert digest(Colour.RED) == digest("red")


# --- running once


def test_the_same_inputs_run_once(tmp_path):
    work = Work()
    folder = run(tmp_path, {"x": 1}, work)
    assert run(tmp_path, {"x": 1}, work) == folder
    assert work.calls == 1
    assert (folder / "file.txt").read_text() == "result"


def test_a_moved_run_directory_runs_nothing_again(tmp_path):
    work = Work()
    run(tmp_path / "before", {"x": 1}, work)
    (tmp_path / "before").rename(tmp_path / "after")
    run(tmp_path / "after", {"x": 1}, work)
    assert work.calls == 1


def test_the_reason_names_what_changed(tmp_path):
    work = Work()
    assert why(tmp_path, {"x": 1, "y": 1}, work) == "first run"
    assert why(tmp_path, {"x": 2, "y": 1}, work) == "changed: x"
    assert why(tmp_path, {"x": 2}, work) == "changed: y"
    assert why(tmp_path, {"x": 2}, work, version=2) == "stage version 1 -> 2"
    assert why(tmp_path, {"x": 2}, work, version=2) == "same inputs as before"
    assert work.calls == 4


def test_a_new_result_replaces_the_old_one_whole(tmp_path):
    run(tmp_path, {"x": 1}, lambda out: (out / "old.txt").write_text("old"))
    folder = run(tmp_path, {"x": 2}, Work())
    assert sorted(p.name for p in folder.iterdir()) == ["file.txt", MANIFEST]


def test_stages_are_listed_with_their_reasons(tmp_path):
    with Store(tmp_path) as store:
        store.run("a", {}, Work())
        store.run("b/c", {"a": tmp_path / "a"}, Work())
    assert {(m.stage, m.why) for m in manifests(tmp_path)} == {("a", "first run"), ("b/c", "first run")}


# --- failing and being killed


def test_a_failed_stage_stores_nothing_and_runs_again(tmp_path):
    with pytest.raises(RuntimeError, match="no"):
        run(tmp_path, {"x": 1}, fail)
    assert published(tmp_path) == set()
    work = Work()
    run(tmp_path, {"x": 1}, work)
    assert work.found == []


def test_a_failed_stage_leaves_the_result_before_it(tmp_path):
    folder = run(tmp_path, {"x": 1}, Work())
    with pytest.raises(RuntimeError):
        run(tmp_path, {"x": 2}, fail)
    assert (folder / "file.txt").read_text() == "result"


def test_a_resumable_stage_gets_its_own_folder_back(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, {"x": 1}, fail, resumable=True)
    other, same = Work(), Work()
    run(tmp_path, {"x": 2}, other, resumable=True)
    assert other.found == []
    run(tmp_path, {"x": 1}, same, resumable=True)
    assert same.found == ["half.txt"]


@pytest.mark.parametrize("resumable", [False, True])
def test_a_kill_leaves_nothing_visible_and_the_next_run_finishes(tmp_path, resumable):
    kill_stage(tmp_path, "in-work", resumable)
    assert published(tmp_path) == set()
    assert manifests(tmp_path) == []
    work = Work()
    folder = run(tmp_path, {"x": 1}, work, resumable=resumable)
    assert work.found == (["half.txt"] if resumable else [])
    assert (folder / "file.txt").is_file()


def test_a_finished_result_that_was_killed_before_its_rename_is_published(tmp_path):
    kill_stage(tmp_path, "before-rename")
    assert published(tmp_path) == set()
    work = Work()
    folder = run(tmp_path, {"x": 1}, work)
    assert work.calls == 0
    assert (folder / "half.txt").read_text() == "half"


def test_a_finished_result_that_was_damaged_before_its_rename_runs_again(tmp_path):
    kill_stage(tmp_path, "before-rename")
    (half,) = (tmp_path / ".scratch").rglob("half.txt")
    half.write_text("")
    work = Work()
    run(tmp_path, {"x": 1}, work)
    assert work.calls == 1


# --- integrity


@pytest.mark.parametrize("damage", [lambda p: p.write_text("resulT"), lambda p: p.unlink(), lambda p: p.write_text("")])
def test_an_altered_file_runs_again_with_a_notice_that_names_it(tmp_path, damage):
    work = Work()
    damage(run(tmp_path, {"x": 1}, work) / "file.txt")
    with Store(tmp_path) as store:
        store.run("stage", {"x": 1}, work)
        (notice,) = store.notices
    assert str(tmp_path / "stage" / "file.txt") in notice
    assert store.timings[0].why == "altered: file.txt"
    assert (tmp_path / "stage" / "file.txt").read_text() == "result"


def test_a_damaged_manifest_runs_again(tmp_path):
    work = Work()
    (run(tmp_path, {"x": 1}, work) / MANIFEST).write_text("{")
    run(tmp_path, {"x": 1}, work)
    assert work.calls == 2


def test_the_manifest_records_every_file(tmp_path):
    folder = run(tmp_path, {"x": 1}, Work())
    manifest = json.loads((folder / MANIFEST).read_bytes())
    assert [(f["path"], f["size_bytes"]) for f in manifest["files"]] == [("file.txt", 6)]
    assert manifest["inputs"] == {"x": digest(1)}


# --- one process at a time


def test_the_second_process_is_told_the_first_ones_pid(tmp_path):
    with python(STAGE, tmp_path, "plain", "in-work") as process:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(LockedError, match=f"in use by process {process.pid}\n") as caught, Store(tmp_path):
            pass
        process.kill()
        process.communicate()
    assert caught.value.exit_code == 3
    run(tmp_path, {"x": 1}, Work())  # the lock died with its holder


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run"), Store(tmp_path / "file" / "run"):
        pass


# --- write_atomic

NO_SPACE = """
import resource, signal, sys
from pathlib import Path
from fofa_deploy.store import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), b"x" * 100_000)
except OSError as error:
    print(type(error).__name__)
"""


def test_a_disk_that_is_full_leaves_the_old_file_and_no_scrap(tmp_path):
    (tmp_path / "file").write_text("old")
    with python(NO_SPACE, tmp_path / "file") as process:
        out, err = process.communicate()
    assert (out, err) == ("OSError\n", "")
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "file").write_text("old and long")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make", [lambda p: (p.mkdir(), (p / "thesis.txt").write_text("mine")), lambda p: p.write_text("mine")])
def test_what_was_not_made_here_is_not_replaced(tmp_path, make):
    """A user's own data/ beside a model, in the folder that --out names."""
    make(tmp_path / "data")
    ran = []
    with Store(tmp_path) as store, pytest.raises(UserError, match="was not made here"):
        store.run("data", {}, lambda out: ran.append(out))
    assert not ran
    assert [path.read_text() for path in (tmp_path / "data", *tmp_path.glob("data/*")) if path.is_file()] == ["mine"]


def test_names_that_are_no_text_have_a_digest(tmp_path):
    assert digest(["caf\udce9.png"]) != digest(["cafe.png"])
