"""The reports: nothing is omitted, no name becomes markup, no number is invented, no file is half written."""

import re
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt

from fofa_deploy.errors import UserError
from fofa_deploy.report import read_report, render, words, write_report
from fofa_deploy.report.record import to_json
from fofa_deploy.results import (
    Comparison,
    DataSummary,
    Environment,
    Epoch,
    Latency,
    Measurement,
    ModelSummary,
    RunReport,
    StageTiming,
    TargetRow,
)
from fofa_deploy.types import Preprocessing, Sidecar, Status, TensorSpec

HOSTILE = (
    "</script><img src=x onerror=1>",
    "| a | b |",
    "one\n\n# two\r\n---\nx: y",
    "=cmd()",
    "[l](javascript:1) `c` **b** ![i](u)",
    "$\\frac{$ \\{ %",
    "{{ 7*7 }}{% raw %}",
    "- \"quoted\" 'single' \\",
    "\u202eevil\x1b[31m\x00\ud800",
    "http://evil.example www.evil.example",
)
FILES = ("report.json", "report.md", "report.html", "model_card.md")


def environment(fingerprint: str = "f" * 64) -> Environment:
    return Environment(
        machine="buildbox",
        cpu="Xeon",
        cores=2,
        features=("avx2",),
        governor=None,
        load_average=None,
        memory_bytes=16_000_000_000,
        os="Debian 12",
        python="3.11.7",
        versions={"onnxruntime": "1.32.0", "tensorrt_rtx": "1.7.1"},
        fingerprint=fingerprint,
    )


def measured(p50: float, batch: int = 1) -> Measurement:
    return Measurement(
        latency_ms=Latency(min=p50, mean=p50, p50=p50, p90=p50 * 1.1),
        batch=batch,
        throughput_sps=1000 * batch / p50,
        variation=0.031,
        runs=150,
        warmup_runs=30,
        cold_start_ms=99,
        peak_rss_bytes=88_000_000,
        energy_reason="no counter",
        threads=2,
        device="CPUExecutionProvider",
        artifact_sha256="abcdef123456" + "0" * 52,
        measured_at="2026-11-22T21:04:11Z",
        warnings=("the machine was busy",),
    )


def row(
    target="cpu", recipe="int8", status=Status.VERIFIED, reason="fastest inside the budget", p50=None, top1=None, **more
) -> TargetRow:
    run = measured(p50) if p50 else None
    return TargetRow(
        target=target,
        runtime="onnxruntime",
        profile="cpu-onnxruntime",
        recipe=recipe,
        status=status,
        reason=reason,
        latency_ms=run.latency_ms if run else None,
        measurement=run,
        environment=environment() if run else None,
        validation=Comparison(samples=100, finite=True, top1=top1, agreement=0.9) if top1 else None,
        **more,
    )


def epochs(**more) -> tuple[Epoch, ...]:
    values = {"losses": {"ce": 1.0}, "top1": 0.5, "diagnostics": {"prompted_teacher_top1": 0.9, "kl": 0.1}} | more
    return tuple(Epoch(epoch=n, step=n * 10, lr=0.1, loss=1 / n, seconds=1, **values) for n in (1, 2, 3))


def sample(**changes) -> RunReport:
    report = RunReport(
        name="digits",
        created_at="2026-11-22T21:14:02Z",
        tool_version="0.1.0",
        method="fofa",
        data=DataSummary(name="digits", classes=10, train=1000, validation=100, test=200, digest="d" * 64),
        teacher=ModelSummary(model="vit_tiny", params=5_000_000, top1=0.96),
        student=ModelSummary(model="resnet10t", params=1_000_000, top1=0.95, top1_alone=0.93),
        targets=(
            chosen_row(),
            row(recipe="s8s8", status=Status.REJECTED, reason="fell by 31 points", p50=11.0, top1=0.62, precision={"int8": 20}),
            row(target="rtx", recipe="fp16", status=Status.BUILT_NOT_RUN, reason="no GPU here", size_bytes=23_800_000),
            row(target="orin", recipe="fp16", status=Status.FAILED, reason="the compiler crashed"),
            row(target="pi", recipe="int8", status=Status.SKIPPED, reason="no answer in 10 s"),
        ),
        reference=row(target="reference", recipe="fp32", reason="the model to beat", p50=12.84, top1=0.96).model_copy(
            update={"top1": 0.955, "size_bytes": 40_000_000, "description": "teacher vit_tiny, fp32 on ONNX Runtime"}
        ),
        curves={"distill": epochs(), "teacher": epochs(losses={}, diagnostics={}, top1=None)},
        environment=environment(),
        sidecar=Sidecar(
            model="resnet10t",
            input=TensorSpec(name="input", shape=(None, 1, 8, 8)),
            output=TensorSpec(name="logits", shape=(None, 10)),
            preprocessing=Preprocessing(image_size=(8, 8), channels=1, mean=(0.3,), std=(0.37,)),
            class_names=tuple("0123456789"),
        ),
        command="fofa-deploy compress-and-export digits --out 'runs/a b'",
        stages=(StageTiming(stage="distill", seconds=125.4, reused=True, why="same input"),),
        notices=("3 images are duplicates",),
    )
    return report.model_copy(update=changes)


def chosen_row() -> TargetRow:
    more = {"precision": {"int8": 20, "fp32": 1}, "layer_types": {"QLinearConv int8": 20, "Gemm fp32": 1}}
    return row(p50=3.21, top1=0.94, chosen=True, speedup=4.0, size_bytes=4_100_000, **more).model_copy(
        update={
            "top1": 0.931,
            "top5": 0.99,
            "artifact": "artifacts/cpu/int8",
            "sha256": "a" * 64,
            "other_batches": (measured(20.0, 8),),
        }
    )


RENDERERS = {"report.md": render.markdown, "model_card.md": render.model_card}
RENDERED: dict[str, dict[str, str]] = {}


@pytest.fixture
def written(tmp_path):
    """The files of a report by name; drawing is slow, so that each report is drawn once."""

    def write(report: RunReport) -> dict[str, str]:
        key = to_json(report)
        if key not in RENDERED:
            write_report(report, tmp_path / "written")
            RENDERED[key] = {name: (tmp_path / "written" / name).read_text() for name in FILES}
        return RENDERED[key]

    return write


class Page(HTMLParser):
    """The tags, attributes and visible text of a page, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


# --- what is said ---------------------------------------------------------------------------------------------


def test_the_headline_compares_with_the_reference(written):
    for text in (files := written(sample()))["report.md"], Page(files["report.html"]).text:
        assert "1 of 4 targets verified." in text
        for fact in ("93.1 %", "95.5 %", "3.21 ms", "12.8 ms", "4.00×", "4.1 MB", "40 MB"):  # noqa: RUF001
            assert fact in text


@pytest.mark.parametrize("name", ["report.md", "report.html", "model_card.md"])
def test_no_target_is_omitted_whatever_became_of_it(written, name):
    text = written(sample())[name]
    for fact in (
        "rtx",
        "built-not-run",
        "no GPU here",
        "orin",
        "failed",
        "the compiler crashed",
        "pi",
        "skipped",
        "no answer in 10 s",
    ):
        assert fact in text


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_every_recipe_has_its_reason_and_its_proof(written, name):
    text = written(sample())[name]
    for fact in ("s8s8", "rejected", "fell by 31 points", "20 int8, 1 fp32", "20 QLinearConv int8", "batch 8: p50 20.0 ms"):
        assert fact in text


@pytest.mark.parametrize("name", ["report.md", "report.html", "model_card.md"])
def test_a_latency_has_its_conditions_beside_it(written, name):
    text = written(sample())[name]
    assert (
        "CPUExecutionProvider · 2 threads, batch 1 · 30 warm-up + 150 runs · variation 3.1 % · buildbox: onnxruntime 1.32.0" in text
    )
    assert "artifact abcdef123456 · 2026-11-22 21:04 UTC" in text


@pytest.mark.parametrize("name", ["report.md", "report.html", "model_card.md"])
def test_a_percentile_that_the_sample_cannot_support_is_not_a_number(written, name):
    assert "not enough runs" in written(sample())[name]


def test_a_factor_that_was_not_measured_is_not_computed(written):
    alone = chosen_row().model_copy(update={"speedup": None})
    text = written(sample(targets=(alone,)))["report.md"]
    assert "×" not in text  # noqa: RUF001
    assert "12.8 ms" not in text.splitlines()[2]


def test_a_run_without_teacher_reference_labels_or_targets_still_reports(written):
    bare = sample(
        teacher=None, reference=None, curves={}, targets=(), sidecar=None, stages=(), notices=(), command="", method="none"
    )
    files = written(bare)
    assert "No target was asked for." in files["report.html"]
    assert "No reference was measured" in files["report.md"]
    assert front_matter(files["model_card.md"])["model-index"][0]["results"] == []


def test_two_environments_are_both_shown(written):
    there = row(target="pi", p50=9.0, top1=0.9).model_copy(
        update={"environment": environment("0" * 64).model_copy(update={"machine": "pi5"})}
    )
    text = written(sample(targets=(chosen_row(), there)))["report.html"]
    assert "pi5 <span" in text
    assert "buildbox <span" in text


def test_the_curves_and_the_scatter_are_there(written):
    page = Page(written(sample())["report.html"])
    assert page.tags.count("svg") == 3
    for label in ("prompted_teacher_top1", "↓ 62.0 %", "int8", "reference: teacher vit_tiny"):
        assert label in page.text


def test_the_card_tells_preprocessing_use_and_metrics(written):
    card = written(sample())["model_card.md"]
    (model,) = front_matter(card)["model-index"]
    assert model["name"] == "resnet10t"
    assert [metric["value"] for result in model["results"] for metric in result["metrics"]] == [0.931]
    for fact in (
        "8 × 8",  # noqa: RUF001
        "mean = 0.3, std = 0.37",
        "one channel",
        "Limitations",
        "93.0 %",
        "Artifact.load",
        "orin is not verified",
    ):
        assert fact in card


# --- what cannot happen ---------------------------------------------------------------------------------------


def poisoned(evil: str) -> RunReport:
    """A report with the hostile text in every place that takes free text."""
    base = sample()
    rows = tuple(
        r.model_copy(update={"target": f"{evil}{n}", "reason": evil, "description": evil}) for n, r in enumerate(base.targets)
    )
    place = environment().model_copy(update={"machine": evil, "cpu": evil, "versions": {evil: evil}, "features": (evil,)})
    return base.model_copy(
        update={
            "name": evil,
            "created_at": evil,
            "method": evil,
            "command": evil,
            "data": base.data.model_copy(update={"name": evil, "digest": evil}),
            "teacher": base.teacher.model_copy(update={"model": evil}),
            "student": base.student.model_copy(update={"model": evil}),
            "targets": rows,
            "reference": base.reference.model_copy(update={"description": evil, "reason": evil}),
            "curves": {evil: epochs(losses={evil: 1.0}, diagnostics={evil: 0.5})},
            "environment": place,
            "sidecar": base.sidecar.model_copy(update={"class_names": (evil, "ok"), "model": evil}),
            "stages": (StageTiming(stage=evil, seconds=1, reused=False, why=evil),),
            "notices": (evil,),
        }
    )


@pytest.mark.parametrize("evil", HOSTILE)
def test_no_name_becomes_markup_in_the_page(written, evil):
    tame, page = Page(written(poisoned("tame"))["report.html"]), Page(written(poisoned(evil))["report.html"])
    assert page.tags == tame.tags
    assert page.attributes == tame.attributes
    assert words.one_line(evil).split() == [word for word in words.one_line(evil).split() if word in page.text]


@pytest.mark.parametrize("evil", HOSTILE)
@pytest.mark.parametrize("name", ["report.md", "model_card.md"])
def test_no_name_becomes_markup_in_markdown(evil, name):
    tame, text = (prose(RENDERERS[name](poisoned(words))) for words in ("tame", evil))
    assert structure(text) == structure(tame)
    assert Page(text).tags == Page(tame).tags


def prose(markdown: str) -> str:
    return markdown.split("\n---\n", 1)[1] if markdown.startswith("---") else markdown


def structure(markdown: str) -> list[str]:
    """What a Markdown parser takes for structure: all its tokens but plain text."""
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(markdown)
    inner = [kind for token in tokens for kind in (token.type, *(child.type for child in token.children or ()))]
    return [kind for kind in inner if kind not in ("text", "text_special")]


def test_a_bare_address_is_not_made_a_link():
    text = render.markdown(poisoned("http://evil.example www.evil.example")).replace("<pre><code>http://evil.example www.evil", "")
    assert "://" not in text.replace("\\://", "")
    assert "www." not in text


@pytest.mark.parametrize("evil", HOSTILE)
def test_no_name_breaks_the_front_matter(evil):
    matter = front_matter(render.model_card(poisoned(evil)))
    assert set(matter) == set(front_matter(render.model_card(sample())))
    assert matter["model-index"][0]["name"] == words.one_line(evil)


def test_the_page_is_self_contained(written):
    text = written(sample())["report.html"]
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_same_report_gives_the_same_bytes(written, tmp_path):
    write_report(sample(), tmp_path)
    assert {name: (tmp_path / name).read_text() for name in FILES} == written(sample())


def test_json_holds_no_nan_and_a_nan_is_refused(tmp_path):
    write_report(sample(), tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", text)
    broken = sample().model_copy(
        update={"stages": (StageTiming.model_construct(stage="x", seconds=float("nan"), reused=False, why=""),)}
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(broken, tmp_path)
    assert (tmp_path / "report.json").read_text() == text


# --- files ----------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path):
    write_report(sample(), tmp_path / "a b")
    assert read_report(tmp_path / "a b" / "report.json") == sample()
    assert read_report(tmp_path / "a b") == sample()
    assert sorted(path.name for path in (tmp_path / "a b").iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"schema_version": 2}', "schema_version 2; this fofa-deploy reads 1"),
        ("{}", "schema_version None"),
        ('{"schema_version": 1}', "is not a report: name: Field required"),
        ("{", "is not valid JSON"),
        ('{"schema_version": NaN}', "NaN is not a JSON number"),
        ("[]", "top level is not an object"),
        ("[" * 100_000, "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, expected):
    path = tmp_path / "report.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_report(path)
    assert expected in caught.value.message
    assert str(path) in caught.value.message


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json is not there"):
        read_report(tmp_path / "none.json")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(sample(), tmp_path / "file" / "out")


def test_a_failed_write_leaves_the_old_report_and_no_scrap(tmp_path, monkeypatch):
    write_report(sample(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(sample(name="new"), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


# --- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.size(999), "999 B"),
        (words.size(4_100_000), "4.1 MB"),
        (words.size(111_400_000), "111 MB"),
        (words.size(2_000_000_000), "2 GB"),
        (words.milliseconds(0.0421), "0.042"),
        (words.milliseconds(3.214), "3.21"),
        (words.milliseconds(41.24), "41.2"),
        (words.milliseconds(1234.5), "1,234"),
        (words.percentile(None), "not enough runs"),
        (words.points(-0.0004), "±0.0 points"),
        (words.points(0.004), "+0.4 points"),
        (words.duration(59.94), "59.9 s"),
        (words.duration(3725), "1 h 2 min"),
        (words.moment("yesterday"), "yesterday"),
        (words.clipped("a\nb" * 400, 5), "a ba…"),
        (words.tally({}), "—"),
    ],
)
def test_numbers_read_well(said, expected):
    assert said == expected
