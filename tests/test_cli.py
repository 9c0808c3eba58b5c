"""The command line, as a user meets it: in a process of its own."""

import json
import re

import pytest
from click.testing import CliRunner
from tiny import run_cli, write_graph

from fofa_deploy.backend import backend_names
from fofa_deploy.cli import VERBS, cli
from fofa_deploy.config import load_plan
from fofa_deploy.profile import find_profile, installed_profiles
from fofa_deploy.recorded import record_plan
from fofa_deploy.store import Store
from fofa_deploy.types import HardwareProfile

STAGES = ["compress-and-export", "distill", "export", "quantize", "verify", "profile", "report"]


def test_the_whole_job_comes_first_and_then_a_verb_per_stage():
    assert list(VERBS)[: len(STAGES)] == STAGES
    assert {"doctor", "backends", "profiles", "explain"} <= VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_explains_itself(verb, flag):
    shown = CliRunner().invoke(cli, [verb, flag])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Usage: cli {verb} ")
    assert len(shown.output.splitlines()[2].strip()) > 20


def test_help_lists_every_verb_and_the_exit_codes():
    shown = run_cli("--help")
    assert shown.returncode == 0
    for word in (*VERBS, "130 interrupted", "4 inconclusive"):
        assert word in re.sub(r"\s+", " ", shown.stdout)


def test_the_module_is_the_command():
    shown = run_cli("--version")
    assert (shown.returncode, shown.stdout) == (0, "fofa-deploy 0.1.0\n")


@pytest.mark.parametrize(("typed", "meant"), [("distil", "distill"), ("profils", "profiles"), ("quantise", "quantize")])
def test_a_misspelt_verb_is_recognized_and_not_run(typed, meant):
    shown = run_cli(typed)
    assert shown.returncode == 2
    assert f"no command '{typed}'; did you mean '{meant}'?" in shown.stderr


@pytest.mark.parametrize("arguments", [["zzz"], ["distill"], ["compress-and-export", "demo"], ["profiles", "--no-such"]])
def test_a_wrong_call_is_exit_code_2(arguments):
    shown = run_cli(*arguments)
    assert shown.returncode == 2
    assert "Error: " in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("verb", ["compress-and-export", "distill", "export"])
def test_a_missing_plan_is_exit_code_2_and_makes_nothing(verb, tmp_path):
    shown = run_cli(verb, "no-such.toml", "--out", "run", cwd=tmp_path)
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: there is no plan 'no-such.toml'\n  -> ")
    assert list(tmp_path.iterdir()) == []


def test_an_error_ends_in_what_to_do_next(tmp_path):
    shown = run_cli("profiles", "raspbery-pi-5")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.splitlines()[-1] == "  -> did you mean 'raspberry-pi-5'?"


def test_backends_lists_every_registered_one_with_its_precisions():
    shown = run_cli("backends")
    assert shown.returncode == 0
    for name in backend_names():
        assert re.search(rf"^{name} ", shown.stdout, re.MULTILINE)
    assert re.search(r"^onnxruntime .*fp32.*int8", shown.stdout, re.MULTILINE)


def test_profiles_lists_every_installed_one():
    shown = run_cli("profiles")
    assert shown.returncode == 0
    for profile in installed_profiles():
        assert re.search(rf"^{profile.name} .*{profile.runtime}", shown.stdout, re.MULTILINE)


def test_one_profile_is_shown_whole_and_can_be_read_back():
    shown = run_cli("profiles", "raspberry-pi-5")
    assert HardwareProfile.model_validate_json(shown.stdout) == find_profile("raspberry-pi-5")


def test_square_brackets_are_text_and_not_style(tmp_path):
    with Store(tmp_path) as store:
        store.run("stage", {"[bold]x": 1}, lambda out: None)
        store.run("stage", {"[bold]x": 2}, lambda out: None)
    assert "changed: [bold]x" in run_cli("explain", tmp_path).stdout


def test_doctor_answers_for_every_profile_in_json():
    shown = run_cli("doctor", "--json")
    assert shown.returncode == 0
    found = json.loads(shown.stdout)
    assert found["machine"]["cores"] >= 1
    rows = {row["profile"]: row["probe"] for row in found["profiles"]}
    assert rows.keys() == {profile.name for profile in installed_profiles()}
    assert rows["reference"]["can_run"]
    assert rows["cpu-onnxruntime"]["can_run"]
    for probe in rows.values():
        assert probe["can_run"] or probe["reason"], "a no without a reason"


def test_explain_says_why_each_stage_ran(tmp_path):
    with Store(tmp_path) as store:
        store.run("graph", {"weights": 1}, lambda out: None)
        store.run("graph", {"weights": 2}, lambda out: None)
        store.run("artifacts/cpu/int8", {}, lambda out: None)
    shown = run_cli("explain", tmp_path).stdout
    assert re.search(r"graph .*changed: weights", shown)
    assert re.search(r"artifacts/cpu/int8 .*first run", shown)


def test_a_folder_without_stages_is_explained_as_what_it_is_not(tmp_path):
    shown = run_cli("explain", tmp_path)
    assert shown.returncode == 2
    assert "is not a run directory" in shown.stderr


def test_a_report_does_not_train(tmp_path):
    plan = load_plan("demo")
    with Store(tmp_path) as store:
        record_plan(store, plan, [find_profile(target) for target in plan.targets], force=False)
    shown = run_cli("report", tmp_path)
    assert shown.returncode == 2
    assert "student is not a finished stage" in shown.stderr
    assert "finish the run first" in shown.stderr


def test_a_report_of_nothing_says_how_to_get_one(tmp_path):
    shown = run_cli("report", tmp_path)
    assert shown.returncode == 2
    assert "is not a run directory" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("  -> make one: fofa-deploy compress-and-export")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    shown = run_cli("quantize", tmp_path)
    assert shown.returncode == 2
    assert "is not a run directory" in shown.stderr


def test_an_onnx_file_is_built_verified_and_told_in_json(tmp_path):
    write_graph(tmp_path / "graph")
    shown = run_cli("quantize", tmp_path / "graph" / "model.onnx", "--profile", "reference", "--json", "--quiet")
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)
    assert (row["status"], row["recipe"], row["precision"]) == ("verified", "fp32", {"fp32": 1})
    assert (tmp_path / "graph" / "model.fofa" / row["artifact"] / "artifact.json").is_file()


def test_an_onnx_file_needs_a_profile(tmp_path):
    write_graph(tmp_path)
    shown = run_cli("quantize", tmp_path / "model.onnx")
    assert shown.returncode == 2
    assert "--profile" in shown.stderr


def test_a_table_in_a_log_is_neither_squeezed_nor_padded(capsys):
    from fofa_deploy.cli.show import table

    path, note = "/".join(["folder"] * 40), "a note of several words"
    table("", ("model", "note"), [(path, note), (path, "")])
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{path}  {note}", path]


@pytest.mark.parametrize("where", ["table", "error", "progress"])
def test_nothing_from_elsewhere_commands_the_terminal(where, capsys):
    from fofa_deploy.cli import show, tell
    from fofa_deploy.errors import FofaError
    from fofa_deploy.progress import Terminal

    evil = "a board\x1b]52;c;ZXZpbA==\x07\x1b[2J"
    if where == "table":
        show.table("", ("cpu",), [(evil,)])
    elif where == "error":
        tell(FofaError(f"{evil}\nsecond line", evil))
    else:
        Terminal().say(evil)
    shown = "".join(capsys.readouterr())
    assert "a board" in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_a_manifest_with_markup_is_explained(tmp_path):
    done = run_cli("explain", _with_markup(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "[/x]" in done.stdout


def _with_markup(folder):
    from fofa_deploy.store import Store

    with Store(folder) as store:
        path = store.run("data", {}, lambda out: None) / "manifest.json"
    path.write_text(
        path.read_text().replace('"finished_at":"', '"finished_at":"[/x]').replace('"finished_at": "', '"finished_at": "[/x]')
    )
    return folder


def test_json_into_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    done = run_cli("profile", tmp_path / "m.onnx", "--json", tmp_path / "nowhere" / "x.json")
    assert done.returncode == 2
    assert "does not exist: make it first" in done.stderr


def test_what_was_measured_far_away_is_shown_though_the_report_cannot_be_read(tmp_path, capsys):
    from fofa_deploy.cli.source import Source, keep

    (tmp_path / "report.json").write_text('{"schema_version": 2}')
    keep(Source(tmp_path, None, None, None, None, (0.5,), (0.5,), False), [])
    assert "not kept in the report" in capsys.readouterr().err
