"""Devices elsewhere: a real SSH server on the loopback, real artifacts, and everything that goes wrong on the way there."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import remote_sshd
from click.testing import CliRunner
from remote_sshd import Server
from tiny import alive, build, run_cli, write_graph

from fofa_deploy.adopt import Preparation, adopt
from fofa_deploy.cli import cli
from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.errors import BackendError, ChildError, IntegrityError, PlanError, UnavailableError
from fofa_deploy.files import Wish, subjects
from fofa_deploy.measure import Candidate
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.remote import transport
from fofa_deploy.remote.bundle import RUNNER, Job, Line, job_for, write_bundle, write_question
from fofa_deploy.remote.device import Place, aimed, bundle, examine, places, profile_on
from fofa_deploy.remote.folder import measure_there
from fofa_deploy.remote.results import Failed, Timed, compare_outputs, read_results
from fofa_deploy.remote.transport import Adb, Ssh, exchange
from fofa_deploy.runner import receive
from fofa_deploy.schema import parse_toml
from fofa_deploy.store import Store
from fofa_deploy.tune import Settings
from fofa_deploy.types import Artifact, Budget, HardwareProfile

QUICK = MeasurePlan(seconds=0.02, max_seconds=0.1, warmup_seconds=0.01, warmup_runs=5)
LIMITS = LimitsPlan(run_seconds=60, build_seconds=60)
SETTINGS = Settings(AccuracyPlan(), QUICK, LIMITS, Budget(), 0, batches=(1, 3), threads=(1,))
LINES = (Line(batch=1, threads=1), Line(batch=2, threads=0))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    if remote_sshd.SSHD is None:
        pytest.skip("sshd is not installed (Debian: apt-get install openssh-server)")
    started = remote_sshd.start(tmp_path_factory.mktemp("sshd"))
    yield started
    started.process.terminate()
    started.process.wait(20)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> dict[str, Candidate]:
    root = tmp_path_factory.mktemp("remote")
    graph, golden = write_graph(root / "graph"), root / "graph" / "golden.npz"
    return {
        name: Candidate(artifact=build(graph, name, root / name), profile=find_profile(name), golden=golden)
        for name in ("cpu-onnxruntime", "cpu-openvino")
    }


def asked(candidate: Candidate, **changes) -> Job:
    return job_for(candidate, LINES, QUICK, LIMITS).model_copy(update=changes)


def sent(server: Server, candidate: Candidate, job: Job, **options):
    return server.place(**options).run(lambda out: write_bundle(candidate, job, out), job.seconds)


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# --- what works


@pytest.mark.parametrize("name", ["cpu-onnxruntime", "cpu-openvino"])
def test_an_artifact_is_verified_and_timed_over_there(server, candidates, name):
    job = asked(candidates[name])
    results = sent(server, candidates[name], job)
    assert results.error == ""
    assert results.job == job
    first, second = results.answers(job)
    found = compare_outputs(first, job, candidates[name].golden)
    assert found.samples == 1 + 2 + 8
    assert found.relative_error < 1e-5
    measured = [line.measurement(job.artifact_sha256) for line in (first, second)]
    assert [m.batch for m in measured] == [1, 2]
    assert [m.threads for m in measured] == [1, len(os.sched_getaffinity(0))]
    known = {layer.name for layer in Artifact.load(candidates[name].artifact).layers}
    assert {layer.name for layer in results.layers} & known
    assert sum(layer.ms for layer in results.layers) > 0
    for m in measured:
        assert 0 < m.latency_ms.min <= m.latency_ms.p50
        assert m.cold_start_ms == m.load_ms + m.first_run_ms
        assert m.peak_rss_bytes > 1 << 24
        assert m.energy_reason
    assert server.left() == []


def test_a_device_says_what_it_is(server):
    found = examine(server.place(), find_profile("cpu-onnxruntime")).machine()
    assert found.machine == os.uname().machine
    assert {"onnxruntime", "numpy"} <= found.versions.keys()
    assert found.affinity
    assert server.left() == []


SOURCES = sorted(Path(receive.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_is_sent_needs_only_what_a_device_has(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    foreign = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("fofa_deploy.runner.")} <= {"numpy", "onnxruntime", "openvino"}
    assert {path.name for path in SOURCES} == {"__init__.py", *RUNNER}


# --- devices that cannot do it


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("raspberry-pi-5" if os.uname().machine == "x86_64" else "x86-onnxruntime", "needs an"),
        ("reference", "on this machine only"),
    ],
)
def test_another_kind_of_device_is_told(server, profile, words):
    with pytest.raises(UnavailableError, match=words):
        examine(server.place(), find_profile(profile))


def test_a_missing_runtime_is_told_with_the_command_that_installs_it(server, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    with pytest.raises(UnavailableError) as caught:
        examine(server.place(python=str(bare / "bin" / "python")), find_profile("cpu-onnxruntime"))
    assert "has no onnxruntime and no numpy" in caught.value.message
    assert "-m pip install onnxruntime numpy" in caught.value.action


def test_a_missing_python_is_told(server):
    with pytest.raises(BackendError, match="has no such Python"):
        examine(server.place(python="no-such-python"), find_profile("cpu-onnxruntime"))


def test_a_dead_device_is_asked_again_and_then_told(server, monkeypatch):
    monkeypatch.setattr(transport, "ATTEMPTS", 2)
    asked_how_often = []
    real = Ssh.command
    monkeypatch.setattr(Ssh, "command", lambda self, arguments: asked_how_often.append(1) or real(self, arguments))
    with pytest.raises(BackendError, match=r"dead cannot be reached.*refused"):
        examine(server.place("dead"), find_profile("cpu-onnxruntime"))
    assert len(asked_how_often) == 2


def test_a_host_whose_key_is_not_known_is_not_trusted(server, tmp_path):
    strange = tmp_path / "config"
    strange.write_text(server.config.read_text().replace("known_hosts", "no_such_hosts"))
    place = Place(Ssh("board", strange), sys.executable)
    with pytest.raises(BackendError, match="verification failed"):
        examine(place, find_profile("cpu-onnxruntime"))


# --- names that are attacks

HOSTILE = [
    "-oProxyCommand=touch ran",
    "a b",
    "a;touch ran",
    "$(touch ran)",
    "a`b`",
    "me@-oX=y",
    "a|b",
    "a\nb",
    "",
    "@a",
    "a@b@c",
    "a/b",
]


@pytest.mark.parametrize("host", HOSTILE)
def test_what_is_no_host_name_is_refused_everywhere(host):
    with pytest.raises(PlanError, match="host"):
        places(find_profile("cpu-onnxruntime"), [host], None, None)
    board = f'name = "b"\ndescription = "d"\nruntime = "onnxruntime"\nprecisions = ["fp32"]\n[device]\nhost = {json.dumps(host)}\n'
    with pytest.raises(PlanError, match="host"):
        parse_toml(board, HardwareProfile, "board.toml")


@pytest.mark.parametrize("python", ["-c", "python3; touch ran", "$(touch ran)", "a b"])
def test_what_is_no_interpreter_is_refused(python):
    with pytest.raises(PlanError, match="python"):
        places(find_profile("cpu-onnxruntime"), ["board"], python, None)


def test_an_option_as_host_would_not_be_one_even_so():
    command = Ssh("-oProxyCommand=touch ran").command(["echo", "a b", "$(touch ran)"])
    assert command[-3:] == ["--", "-oProxyCommand=touch ran", "echo 'a b' '$(touch ran)'"]


def test_a_serial_number_is_an_argument_and_the_command_one_word_for_the_shell_there():
    """No device with adbd has been at hand: what is tried is the command line alone."""
    (place,) = places(find_profile("cpu-onnxruntime"), ["adb:emulator-5554"], "/data/python", None)
    assert place.transport == Adb("emulator-5554")
    assert place.name == "adb:emulator-5554"
    command = place.transport.command(["python3", "-c", "print('$HOME')\nx = 1", "a b"])
    assert command[:5] == ["adb", "-s", "emulator-5554", "shell", "-T"]
    assert len(command) == 6
    words = command[5].removeprefix("TMPDIR=/data/local/tmp ")
    shown = subprocess.run(["sh", "-c", f"printf '%s|' {words}"], capture_output=True, text=True, check=True)
    assert shown.stdout == "python3|-c|print('$HOME')\nx = 1|a b|"


def test_adb_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_question(tmp_path / "b.zip")
    with pytest.raises(BackendError, match="adb is not installed"):
        exchange(Adb("0123"), "python3", tmp_path / "b.zip", 5)


# --- whose GPU it is


def test_a_gpu_elsewhere_is_given_by_its_host():
    jetson = find_profile("jetson-orin")
    assert aimed(jetson, "me@board").device.host == "me@board"
    assert aimed(jetson, None) == jetson
    assert aimed(aimed(jetson, "me@board"), "you@other").device.host == "me@board"
    cpu = find_profile("raspberry-pi-5")
    assert aimed(cpu, "me@board") == cpu
    with pytest.raises(PlanError, match="host"):
        aimed(jetson, "-oProxyCommand=x")


def test_the_stock_jetson_profile_is_built_for_a_board_that_is_named(server, tmp_path):
    """As a typed ONNX file: the board builds the engine."""
    write_graph(tmp_path)
    arguments = ("quantize", "model.onnx", "--profile", "jetson-orin", "--recipe", "fp16", "--json", "--quiet")
    shown = run_cli(*arguments, "--on", "me@board", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)
    assert (row["status"], row["precision"]) == ("built-not-run", {"fp16": 1})
    assert "me@board builds the engine itself" in row["reason"]
    jetson, settings = find_profile("jetson-orin"), replace(SETTINGS, recipe="fp16", batches=(), threads=())
    with Store(tmp_path / "model.fofa") as store:
        tuner = adopt(store, tmp_path / "model.onnx", None, Preparation(), Quiet(), settings)
        bundle(tuner, [jetson], tmp_path / "b.zip")
        (there,) = profile_on([server.place()], tuner, jetson)
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        job = json.loads(archive.read("job.json"))
    assert (job["runtime"], job["main"], job["recipe"]) == ("tensorrt", "model.onnx", "fp16")
    assert (there.target, there.status) == ("jetson-orin on board", "skipped")
    assert re.search("is not a jetson-orin|has no tensorrt", there.reason)


def test_the_command_line_refuses_a_hostile_host(tmp_path):
    write_graph(tmp_path)
    shown = run_cli("profile", "model.onnx", "--profile", "cpu-onnxruntime", "--on", "-oProxyCommand=touch ran", cwd=tmp_path)
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "ran").exists()


# --- what breaks on the way

HANG = "import time, pathlib\npathlib.Path('{pids}').write_text(str(__import__('os').getpid()))\ntime.sleep(600)\n"


def write_hanging(pids: Path, out: Path) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("run.py"), HANG.format(pids=pids))


def test_a_job_that_hangs_is_ended_over_there(server, tmp_path):
    write_hanging(tmp_path / "pid", tmp_path / "b.zip")
    with pytest.raises(ChildError, match=r"killed after 1 s"):
        exchange(server.place().transport, sys.executable, tmp_path / "b.zip", 1)
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())), "the job is not ended")
    wait_until(lambda: server.left() == [], "the device's folder is not removed")


def test_a_connection_that_drops_leaves_nothing_behind(server, tmp_path):
    write_hanging(tmp_path / "pid", tmp_path / "b.zip")
    caught = []

    def talk() -> None:
        try:
            exchange(server.place().transport, sys.executable, tmp_path / "b.zip", 300)
        except BackendError as error:
            caught.append(error)

    talking = threading.Thread(target=talk)
    talking.start()
    wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text(), "the job does not start")
    for pid in server.children():
        os.kill(pid, signal.SIGKILL)
    talking.join(60)
    assert "broke while the job ran" in caught[0].message
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())), "an orphan is left")
    wait_until(lambda: server.left() == [], "the device's folder is not removed")


def test_a_full_disk_over_there_is_told_and_cleaned(server, candidates, tmp_path):
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -f 8\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    big = tmp_path / "b.zip"
    with zipfile.ZipFile(big, "w") as archive:
        archive.writestr(zipfile.ZipInfo("run.py"), "")
        archive.writestr(zipfile.ZipInfo("weights.bin"), bytes(100_000))
    with pytest.raises(ChildError, match="File too large"):
        exchange(server.place().transport, str(wrapper), big, 30)
    assert server.left() == []


def test_what_a_login_shell_prints_is_no_answer(server, candidates, tmp_path):
    wrapper = tmp_path / "python"
    last = "printf 'no line of its own'"
    wrapper.write_text(f'#!/bin/sh\necho Welcome\necho "fofa-0 results 1 x"\n{last}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    assert examine(server.place(python=str(wrapper)), find_profile("cpu-onnxruntime")).machine().cores


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("out.write(f'{m} results 4 {chr(97) * 64}\\n'.encode() + b'abcd')", "damaged on their way"),
        ("out.write(f'{m} results 400 {chr(97) * 64}\\n'.encode() + b'abcd')", "damaged on their way"),
        ("out.write(f'{m} results {1 << 40} {chr(97) * 64}\\n'.encode())", "are allowed"),
        ("out.write(f'{m} results 5\\n'.encode())", "announces no results"),
        ("out.write(f'{m} results x y\\n'.encode())", "announces no results"),
    ],
)
def test_a_damaged_answer_is_refused(tmp_path, end, words):
    fake = tmp_path / "device.py"
    fake.write_text(
        f"import sys\nout = sys.stdout.buffer\nm = sys.argv[4]\nout.write((m + ' ready\\n').encode())\n{end}\nout.flush()\n"
    )

    class Local:
        name = "local"

        def command(self, arguments):
            return [sys.executable, str(fake), *arguments[1:]]

    write_question(tmp_path / "b.zip")
    with pytest.raises(IntegrityError, match=words):
        exchange(Local(), "python3", tmp_path / "b.zip", 5)


def test_a_device_that_connects_and_says_nothing_is_given_up(tmp_path, monkeypatch):
    """A login shell that waits, say: ssh lives on."""
    monkeypatch.setattr(transport, "CONNECT_SECONDS", -59)  # one second

    class Silent:
        name, by_hand = "silent", "ssh silent"

        def command(self, arguments):
            return [sys.executable, "-c", "import time; time.sleep(60)"]

    write_question(tmp_path / "b.zip")
    started = time.monotonic()
    with pytest.raises(BackendError, match="silent cannot be reached: no answer"):
        exchange(Silent(), "python3", tmp_path / "b.zip", 5)
    assert time.monotonic() - started < 30


def test_an_altered_artifact_is_not_run_over_there(server, candidates, tmp_path):
    candidate = candidates["cpu-onnxruntime"]
    job = asked(candidate)
    forged = job.model_copy(update={"files": {**job.files, "model.onnx": "0" * 64}})
    results = sent(server, candidate, forged)
    assert "model.onnx is missing or altered" in results.error
    assert results.lines == ()


def test_a_crash_of_one_line_is_its_reason(server, candidates):
    candidate = candidates["cpu-onnxruntime"]
    job = asked(candidate, output="no-such-output")
    line = sent(server, candidate, job).lines[0]
    assert isinstance(line, Failed)
    assert "no-such-output" in line.error


def test_the_command_line_measures_on_every_device(server, tmp_path):
    write_graph(tmp_path)
    arguments = (
        "--profile",
        "cpu-onnxruntime",
        "--recipe",
        "fp32",
        "--batch",
        "2",
        "--ssh-config",
        server.config,
        "--json",
        "--quiet",
    )
    where = ("--on", "board", "--on", "dead", "--python", sys.executable)
    shown = run_cli("profile", "model.onnx", *arguments, *where, cwd=tmp_path)
    good, bad = json.loads(shown.stdout)
    assert (good["target"], good["status"], good["chosen"]) == ("cpu-onnxruntime on board", "verified", True)
    assert good["reason"] == "gives the right outputs there", "it was compared with no other"
    assert good["measurement"]["batch"] == 2
    assert good["golden"]["relative_error"] < 1e-5
    assert {layer["precision"] for layer in good["layers"]} == {"fp32"}
    assert sum(layer["share"] for layer in good["layers"]) == pytest.approx(1)
    assert (bad["target"], bad["status"], bad["measurement"]) == ("cpu-onnxruntime on dead", "skipped", None)
    assert "dead cannot be reached" in bad["reason"]
    assert shown.returncode == 1


def test_a_folder_by_itself_is_measured_over_there(server, candidates):
    """Without the run that it came from: its outputs there are held beside those here."""
    folder = candidates["cpu-openvino"].artifact
    (subject,) = subjects([folder], Wish(), SETTINGS)
    first, second = measure_there(subject, server.place(), SETTINGS, Quiet())
    assert (first.target, first.model) == ("cpu-openvino on board", str(folder))
    assert [(row.inputs["images"][0], row.measurement.batch) for row in (first, second)] == [(1, 1), (3, 3)]
    assert first.compared.samples == 1 + 2 + 8
    assert first.compared.relative_error < 1e-5
    assert "against the outputs here" in first.reason
    assert first.environment.cpu
    assert server.left() == []


def test_a_folder_on_a_dead_device_is_its_reason(server, candidates, monkeypatch):
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    (subject,) = subjects([candidates["cpu-onnxruntime"].artifact], Wish(), SETTINGS)
    (row,) = measure_there(subject, server.place("dead"), SETTINGS, Quiet())
    assert row.measurement is None
    assert "dead cannot be reached" in row.reason


def test_a_folder_goes_there_by_the_command_line(server, candidates):
    where = ("--on", "board", "--python", sys.executable, "--ssh-config", server.config, "--json", "--quiet")
    shown = run_cli("profile", candidates["cpu-onnxruntime"].artifact, *where)
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)
    assert (row["target"], row["measurement"]["device"]) == ("cpu-onnxruntime on board", "CPUExecutionProvider")


@pytest.mark.parametrize("option", ["--batch", "--threads"])
@pytest.mark.parametrize("value", ["0", "1,1", "x", "", "-1"])
def test_a_sweep_of_nothing_is_refused(tmp_path, option, value):
    (tmp_path / "m.onnx").touch()
    shown = CliRunner().invoke(cli, ["profile", str(tmp_path / "m.onnx"), "--profile", "cpu-onnxruntime", option, value])
    assert shown.exit_code == 2
    assert "whole numbers" in shown.output


# --- bundles


def test_a_bundle_is_the_same_bytes_for_the_same_job(candidates, tmp_path):
    job = asked(candidates["cpu-onnxruntime"])
    for name in ("a.zip", "b.zip"):
        write_bundle(candidates["cpu-onnxruntime"], job, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_carried_bundle_needs_nothing_of_ours(candidates, tmp_path):
    """In a Python that cannot see this package, as the user is told to: unzip, run."""
    candidate = candidates["cpu-onnxruntime"]
    job = asked(candidate)
    write_bundle(candidate, job, tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        archive.extractall(tmp_path / "there")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path / "there", env=environment, check=True, timeout=120, capture_output=True
    )
    results = read_results((tmp_path / "there" / "results.json").read_bytes(), "results.json")
    (first, *_) = results.answers(job)
    assert isinstance(first, Timed)
    assert compare_outputs(first, job, candidate.golden).relative_error < 1e-5


def zipped(path: Path, entries: dict[str, bytes], **attributes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(entry, key, value)
            archive.writestr(entry, content)
    return path


@pytest.mark.parametrize(
    ("entries", "attributes", "words"),
    [
        ({"../out": b""}, {}, "named"),
        ({"/etc/out": b""}, {}, "named"),
        ({"a/../../out": b""}, {}, "named"),
        ({"a\\out": b""}, {}, "named"),
        ({"link": b"/etc/passwd"}, {"external_attr": 0o120777 << 16}, "not a plain file"),
        ({"bomb": bytes(10 << 20)}, {}, "compressed beyond"),
        ({f"f{number}": b"" for number in range(100)}, {}, "100 entries"),
    ],
)
def test_a_hostile_archive_is_refused_before_anything_is_written(tmp_path, entries, attributes, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(receive.RefusedError, match=words):
        receive.unpack(zipped(tmp_path / "x.zip", entries, **attributes), folder)
    assert list(folder.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "x.zip"}


def test_a_cut_archive_is_refused(candidates, tmp_path):
    write_question(tmp_path / "x.zip")
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-30])
    with pytest.raises(receive.RefusedError, match="not a sound zip"):
        receive.unpack(tmp_path / "x.zip", tmp_path)


@pytest.mark.parametrize("how", ["scrambled", "encrypted"])
def test_an_archive_whose_content_cannot_be_read_is_refused(tmp_path, how):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("entry", b"some text, " * 20)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    if how == "scrambled":
        start = content.index(b"entry") + len(b"entry")
        content[start : start + 8] = bytes(byte ^ 0xFF for byte in content[start : start + 8])
    else:
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(receive.RefusedError, match="not a sound zip"):
        receive.unpack(tmp_path / "x.zip", tmp_path / "out")


# --- results that are not believed


@pytest.fixture(scope="module")
def genuine(candidates, tmp_path_factory) -> tuple[dict, Job]:
    folder = tmp_path_factory.mktemp("genuine")
    job = asked(candidates["cpu-onnxruntime"])
    write_bundle(candidates["cpu-onnxruntime"], job, folder / "b.zip")
    receive.unpack(folder / "b.zip", folder)
    subprocess.run([sys.executable, "run.py"], cwd=folder, check=True, timeout=120, capture_output=True)
    return json.loads((folder / "results.json").read_text()), job


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(schema_version=2),
        lambda data: data.update(more=1),
        lambda data: data["lines"][0].update(load_ms=float("nan")),
        lambda data: data["lines"][0].update(peak_rss_bytes=-1),
        lambda data: data["lines"][0].update(times_ns="!"),
        lambda data: data["lines"][0].update(error="x" * 5000),
        lambda data: data.pop("files"),
    ],
)
def test_results_of_another_schema_are_refused(genuine, change):
    data = json.loads(json.dumps(genuine[0]))
    change(data)
    with pytest.raises(IntegrityError):
        read_results(json.dumps(data).encode(), "results.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(content):
    with pytest.raises(IntegrityError):
        read_results(content, "results.json")


def test_outputs_and_times_must_be_whole(genuine, candidates):
    data, job = json.loads(json.dumps(genuine[0])), genuine[1]
    data["lines"][0].update(times_ns="", logits="AAAA")
    line = read_results(json.dumps(data).encode(), "x").lines[0]
    with pytest.raises(IntegrityError, match="times"):
        line.measurement(job.artifact_sha256)
    with pytest.raises(IntegrityError, match="outputs"):
        compare_outputs(line, job, candidates["cpu-onnxruntime"].golden)


def test_outputs_that_are_no_numbers_are_seen(genuine, candidates):
    import base64

    data, job = json.loads(json.dumps(genuine[0])), genuine[1]
    data["lines"][0]["logits"] = base64.b64encode(np.full((11, 3), np.nan, "<f4").tobytes()).decode()
    line = read_results(json.dumps(data).encode(), "x").lines[0]
    assert not compare_outputs(line, job, candidates["cpu-onnxruntime"].golden).finite


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["job"].update(grid=[]),
        lambda data: data["environment"].update(flags=[["x"]]),
        lambda data: data["environment"].update(cpu=10**400),
        lambda data: data["lines"][0].update(load_ms=1.5e308, first_run_ms=1.5e308),
        lambda data: data["lines"][0].update(peak_rss_bytes=10**400),
    ],
)
def test_numbers_that_no_device_has_are_refused(genuine, change):
    data = json.loads(json.dumps(genuine[0]))
    change(data)

    def believe():
        found = read_results(json.dumps(data).encode(), "results.json")
        found.machine()
        found.lines[0].measurement("sha")

    with pytest.raises(IntegrityError):
        believe()


@pytest.mark.parametrize("noise", ["b'x' * 65536", "b'x' * 64 + b'\\n'"])
def test_a_device_that_never_stops_talking_is_given_up(tmp_path, noise):
    class Talkative:
        name, by_hand = "talkative", "ssh talkative"

        def command(self, arguments):
            return [sys.executable, "-c", f"import sys\nwhile True: sys.stdout.buffer.write({noise})"]

    write_question(tmp_path / "b.zip")
    started = time.monotonic()
    with pytest.raises(BackendError, match="cannot be reached"):
        exchange(Talkative(), "python3", tmp_path / "b.zip", 5)
    assert time.monotonic() - started < 60
