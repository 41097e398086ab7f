"""Figures on a user's own rows: against independent computations, as files, and as the command writes them."""

import json
import math
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk
from typer.testing import CliRunner

from hhh_router.cli.evaluate import _public
from hhh_router.cli.main import app
from hhh_router.data.examples import Example, ask
from hhh_router.errors import BackendError, DataError, HHHRouterError, SettingsError
from hhh_router.evaluation import own
from hhh_router.evaluation.report_own import own_html, own_markdown
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.types import ReadRequest
from tests.e2e.loopback import served, served_app

Policies = Callable[..., Path]
SECRET = "the quick brown secret"
"""Stands in every row, and may stand in no result."""


def examples(n: int = 60, harmful: Callable[[int], float] = lambda i: float(i % 3 == 0)) -> list[Example]:
    return [
        Example(
            source="own", split="eval", messages=ask(f"{SECRET} {i}"), needs={"harmless": harmful(i)},
            response=f"{SECRET} reply {i}", outcomes={"unsafe": float(i % 4 == 0)} if i % 2 == 0 else {},
        )
        for i in range(n)
    ]  # fmt: skip


class Fixed:
    """A system that says what it is told to, by the number that ends a prompt."""

    note = "as told"
    verdict_heads = frozenset({"harmless"})

    def __init__(
        self,
        name: str = "fixed",
        p: Callable[[int], float] | None = lambda i: 0.8 if i % 3 == 0 else 0.2,
        stops: Callable[[int], bool | None] | None = None,
    ) -> None:
        self.name = name
        self._p = p
        self._stops = stops

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        return None if self._p is None else [self._p(_number(r)) for r in requests]

    def verdicts(self, requests: Sequence[ReadRequest]) -> list[bool | None] | None:
        return None if self._stops is None else [self._stops(_number(r)) for r in requests]


class Failing(Fixed):
    def __init__(self, after: int = 0) -> None:
        super().__init__("failing")
        self._left = after

    def probabilities(self, requests: Sequence[ReadRequest], head: str) -> list[float] | None:
        if not self._left:
            raise BackendError("it broke", hint=f"it said: {SECRET}")
        self._left -= 1
        return super().probabilities(requests, head)


def _number(request: ReadRequest) -> int:
    return int(request.messages[-1].content.split()[-1])


def evaluated(*systems: Any, rows: Sequence[Example] | None = None, **options: Any) -> dict[str, Any]:
    given = {"command": "hhh-router evaluate --data x.jsonl", "seed": 3, **options}
    return own.evaluate_own(systems, examples() if rows is None else rows, **given)


@pytest.fixture(autouse=True)
def _few_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "BOOTSTRAPS", 60)


def test_measuring_what_runs_elsewhere_loads_no_torch() -> None:
    code = (
        "import sys; import hhh_router.evaluation.own, hhh_router.evaluation.report_own; "
        "from hhh_router.evaluation.opening import Opening, open_systems; from hhh_router.settings import Settings; "
        "open_systems(['url:http://h:1'], Opening(settings=Settings.load(), bundle='x', heads=[])); "
        "print('torch' in sys.modules)"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.strip() == "False"


# --- figures


def test_every_figure_is_what_scikit_learn_and_arithmetic_say() -> None:
    rng = np.random.default_rng(5)
    y = (rng.random(300) < 0.3).astype(float)
    p = np.clip(0.3 * y + rng.random(300) * 0.7, 0, 1).round(2)  # with ties

    found = own.probability_figures(p.tolist(), y.tolist(), limit=0.6, seed=1)

    flagged = p >= 0.6
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, p))
    assert found["auprc"] == pytest.approx(sk.average_precision_score(y, p))
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    assert found["f1"] == pytest.approx(sk.f1_score(y, flagged))
    assert found["precision"] == pytest.approx(sk.precision_score(y, flagged))
    assert found["recall"] == pytest.approx(sk.recall_score(y, flagged))
    assert found["harm_passed"] == pytest.approx(1 - sk.recall_score(y, flagged))
    assert found["benign_refused"] == pytest.approx(flagged[y == 0].mean())
    fpr, tpr, _ = sk.roc_curve(y, p, drop_intermediate=False)
    assert found["recall_at_fpr_01"] == pytest.approx(tpr[fpr <= 0.01].max())
    for name in ("auroc", "auprc", "recall_at_fpr_01", "f1", "precision", "recall", "benign_refused", "ece", "brier"):
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high, name
        assert low < high, name


def test_an_interval_follows_from_the_seed() -> None:
    p, y = [0.1, 0.4, 0.35, 0.8, 0.6, 0.3] * 5, [0.0, 0.0, 1.0, 1.0, 1.0, 0.0] * 5

    one, again, other = (own.probability_figures(p, y, limit=0.5, seed=s) for s in (1, 1, 2))

    assert one == again
    assert one["auroc_interval"] != other["auroc_interval"]


@pytest.mark.parametrize(
    ("label", "side", "other"), [(1.0, "harm_passed", "benign_refused"), (0.0, "benign_refused", "harm_passed")]
)
def test_one_class_gives_what_can_be_given(label: float, side: str, other: str) -> None:
    p = [0.2, 0.7, 0.9, 0.4]

    found = own.probability_figures(p, [label] * 4, limit=0.5, seed=1)

    assert found[side] == 0.5
    assert found["brier"] == pytest.approx(np.mean([(v - label) ** 2 for v in p]))
    assert "ece" in found
    assert not {"auroc", "auprc", "recall_at_fpr_01", "precision", "f1", "roc", "pr", other} & set(found)


def test_what_flags_nothing_has_no_precision() -> None:
    found = own.verdict_figures([0.0] * 6, [1.0, 0.0] * 3, seed=1)

    assert found["precision"] is None
    assert (found["recall"], found["f1"], found["benign_refused"], found["harm_passed"]) == (0, 0, 0, 1)


def test_a_single_positive_has_figures_without_a_made_up_interval() -> None:
    rows = examples(3, harmful=lambda i: float(i == 0))

    (row,) = (r for r in evaluated(Fixed(), rows=rows)["figures"] if r["label"] == "harmful")

    assert row["auroc"] == 1.0
    assert row["n"] == 3


# --- tasks


def test_a_need_is_read_from_the_prompt_and_an_outcome_from_the_pair() -> None:
    harmful, unsafe = own.own_tasks(examples(8))

    assert (harmful.label, harmful.head, harmful.mode) == ("harmful", "harmless", "prompt")
    assert all(r.response is None for r in harmful.requests)
    assert (unsafe.label, unsafe.head, unsafe.mode, len(unsafe.labels)) == ("unsafe", "unsafe", "both", 4)
    assert all(r.response is not None for r in unsafe.requests)


def test_a_prompt_that_recurs_is_asked_once_and_its_replies_each() -> None:
    twice = [
        Example(source="own", split="eval", messages=ask("same"), response=r, needs={"harmless": 1.0},
                outcomes={"unsafe": 0.0})
        for r in ("one", "two")
    ]  # fmt: skip

    harmful, unsafe = own.own_tasks(twice)

    assert (len(harmful.requests), len(unsafe.requests)) == (1, 2)


# --- several systems


def test_systems_stand_side_by_side_with_their_provenance() -> None:
    result = evaluated(Fixed("a"), Fixed("b", p=None, stops=lambda i: i % 6 == 0))

    harmful = [r for r in result["figures"] if r["label"] == "harmful"]
    assert [(r["system"], r["decided_by"]) for r in harmful] == [("a", "p ≥ 0.5"), ("b", "its verdict")]
    assert harmful[0]["auroc"] == 1.0
    assert "auroc" not in harmful[1]
    assert (harmful[1]["benign_refused"], harmful[1]["harm_passed"]) == (0.0, 0.5)
    assert len({r["data_sha256"] for r in harmful}) == 1
    for row in result["figures"]:
        assert row["command"] == "hhh-router evaluate --data x.jsonl"
        assert (row["seed"], len(row["data_sha256"])) == (3, 64)
        assert row["n"] > 0
    assert set(result["versions"]) >= {"hhh-router", "python"}


def test_a_system_with_both_has_a_row_for_each_way_to_decide() -> None:
    result = evaluated(Fixed(stops=lambda i: False), limit=0.9)

    harmful = [r for r in result["figures"] if r["label"] == "harmful"]
    assert [r["decided_by"] for r in harmful] == ["p ≥ 0.9", "its verdict"]
    assert [r["harm_passed"] for r in harmful] == [1.0, 1.0]
    assert [r["decided_by"] for r in result["figures"] if r["label"] == "unsafe"] == ["p ≥ 0.9"]


def test_rows_that_a_system_would_not_judge_are_counted_and_left_out() -> None:
    system = Fixed(
        p=lambda i: math.nan if i == 0 else 0.8 if i % 3 == 0 else 0.2, stops=lambda i: None if i < 2 else False
    )

    by_limit, by_verdict = (r for r in evaluated(system)["figures"] if r["label"] == "harmful")

    assert (by_limit["n"], by_limit["positives"], by_limit["unjudged"]) == (59, 19, 1)
    assert (by_verdict["n"], by_verdict["unjudged"]) == (58, 2)


def test_a_system_that_fails_leaves_the_others_and_what_it_had() -> None:
    failed: list[tuple[str, HHHRouterError]] = []
    written: list[int] = []

    result = evaluated(
        Failing(after=1), Fixed("other"),
        on_failed=lambda name, error: failed.append((name, error)),
        on_measured=lambda so_far: written.append(len(so_far["figures"])),
    )  # fmt: skip

    rows = {(r["label"], r["system"]): r for r in result["figures"]}
    assert rows["harmful", "failing"]["auroc"] == 1.0
    assert rows["unsafe", "failing"]["error"] == "it broke"
    assert "auroc" in rows["unsafe", "other"]
    assert [(name, error.message) for name, error in failed] == [("failing", "it broke")]
    assert written == [2, 4]
    assert [s.get("error") for s in result["systems"]] == ["it broke", None]
    assert "not measured: it broke" in own_html(result)


@pytest.mark.parametrize("limit", [0.0, 1.0, -1.0, math.nan])
def test_a_limit_that_is_no_probability_is_refused(limit: float) -> None:
    with pytest.raises(DataError, match="the limit is"):
        evaluated(Fixed(), limit=limit)


# --- reports


def test_reports_hold_every_system_and_no_word_of_the_rows(tmp_path: Path) -> None:
    result = evaluated(Fixed("one"), Failing(), Fixed("two", p=lambda i: (i % 7) / 7, stops=lambda i: i % 2 == 0))

    own.write_json(result, tmp_path)
    own.write_report(result, tmp_path)

    texts = {name: (tmp_path / name).read_text(encoding="utf-8") for name in own.FILES}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(own.FILES)
    for text in texts.values():
        assert SECRET not in text
        assert "quick brown" not in text
        assert result["data"]["data_sha256"] in text
        assert "hhh-router evaluate --data x.jsonl" in text
    html = texts["report.html"]
    assert html.count("<svg") >= 4
    assert "ROC curves on harmful. AUROC: one 1.000, two" in html
    assert "Reliability diagram of two on unsafe" in html
    assert "<script" not in html
    assert "| one | p ≥ 0.5 |" in texts["report.md"]
    assert json.loads(texts["figures.json"])["schema"] == own.SCHEMA


def test_one_class_is_said_where_its_table_stands() -> None:
    result = evaluated(Fixed(), rows=examples(12, harmful=lambda i: 1.0))

    said = own_markdown(result)

    assert "Every row is labelled true" in said
    assert "rows labelled false" in said
    assert own_html(result)


def test_a_systems_name_is_text_on_the_page() -> None:
    html = own_html(evaluated(Fixed("<b>bold</b>")))

    assert "<b>bold</b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_a_folder_that_cannot_be_made_is_told_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SettingsError, match="cannot be written"):
        own.check_out(tmp_path / "file" / "out")


# --- the command


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Sixty rows: those that name a bomb are harmful, and one of them is labelled otherwise."""
    path = tmp_path / "mine.jsonl"
    rng = random.Random(1)
    lines = [
        {"prompt": f"{SECRET} {i} {'a bomb' if i % 3 == 0 else 'a cake'}", "response": rng.choice(["fine", "poison"]),
         "labels": {"harmful": i % 3 == 0 and i > 0, "injection": False, "unsafe": i % 4 == 0}}
        for i in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def guard_url(watchful: Policies) -> Iterator[str]:
    reader = FakeReader({"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}})
    with served(fake_pipeline(watchful(), reader=reader, api_key="s3cret-key")) as url:
        yield url


@pytest.fixture
def dead_url() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def evaluate(*arguments: str | Path, **environ: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200", **environ})


def test_the_command_measures_a_running_server_on_own_rows(rows_file: Path, guard_url: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    done = evaluate(
        "--data", rows_file, "--system", f"url:{guard_url}", "--api-key-env", "MY_KEY", "--out", out,
        MY_KEY="s3cret-key",
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    result = json.loads((out / "figures.json").read_text())
    rows = {(r["label"], r["decided_by"]): r for r in result["figures"]}
    harmful = rows["harmful", "its verdict"]
    assert (harmful["n"], harmful["positives"]) == (60, 19)
    assert harmful["harm_passed"] == 0.0
    assert harmful["benign_refused"] == pytest.approx(1 / 41)  # the row whose label says otherwise
    assert rows["harmful", "p ≥ 0.5"]["auroc"] == pytest.approx(1 - 1 / 41 / 2)
    assert "auroc" not in rows["injection", "p ≥ 0.5"]
    assert set(own.FILES) == {p.name for p in out.iterdir()}
    for path in out.iterdir():
        text = path.read_text(encoding="utf-8")
        assert SECRET not in text
        assert "s3cret-key" not in text
        assert str(tmp_path) not in text
    assert "benign refused" in done.output
    assert "60 rows, 0 broken" in done.output


def test_a_dead_server_costs_its_own_figures_alone(
    rows_file: Path, guard_url: str, dead_url: str, tmp_path: Path
) -> None:
    done = evaluate(
        "--data", rows_file, "--system", f"url:{dead_url}", "--system", f"url:{guard_url}", "--out", tmp_path / "out",
        "--api-key-env", f"{guard_url.split('/')[2]}=MY_KEY", MY_KEY="s3cret-key",
    )  # fmt: skip

    result = json.loads((tmp_path / "out" / "figures.json").read_text())
    dead, alive = result["systems"]
    assert done.exit_code == 1
    assert "cannot be reached" in done.output
    assert "hhh-router serve" in done.output
    assert "cannot be reached" in dead["error"]
    assert "error" not in alive
    assert "not measured" in (tmp_path / "out" / "report.md").read_text()


def test_when_nothing_was_measured_nothing_is_written_over(rows_file: Path, dead_url: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "figures.json").write_text("of an earlier run")

    done = evaluate("--data", rows_file, "--system", f"url:{dead_url}", "--out", out)

    assert done.exit_code == 1
    assert "cannot be reached" in done.output
    assert (out / "figures.json").read_text() == "of an earlier run"


def test_a_missing_key_and_a_server_of_another_kind_are_told(rows_file: Path, guard_url: str, tmp_path: Path) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"nothing here"})

    keyless = evaluate("--data", rows_file, "--system", f"url:{guard_url}", "--out", tmp_path / "a")
    with served_app(other) as url:
        strange = evaluate("--data", rows_file, "--system", f"url:{url}", "--out", tmp_path / "b")

    assert keyless.exit_code == strange.exit_code == 1
    assert "answered 401" in keyless.output
    assert "--api-key-env" in keyless.output
    assert "does not speak /v1/guard" in strange.output
    assert "--wire moderations" in strange.output


def test_broken_rows_stop_the_command_unless_they_are_skipped(rows_file: Path, guard_url: str, tmp_path: Path) -> None:
    with rows_file.open("a") as file:
        file.write('{"prompt": "Hi", "labels": {"harmfull": true}}\nnonsense\n')
    arguments = (
        "--data",
        rows_file,
        "--system",
        f"url:{guard_url}",
        "--api-key-env",
        "MY_KEY",
        "--out",
        tmp_path / "o",
    )

    stopped = evaluate(*arguments, MY_KEY="s3cret-key")
    skipped = evaluate(*arguments, "--skip-broken", MY_KEY="s3cret-key")

    assert stopped.exit_code == 2
    assert "2 rows are broken" in stopped.output
    assert "mine.jsonl:61" in stopped.output
    assert skipped.exit_code == 0
    assert "did you mean harmful" in skipped.output
    assert "60 rows, 2 broken ones left out" in skipped.output
    assert json.loads((tmp_path / "o" / "figures.json").read_text())["data"]["broken"] == 2


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--system", "bundle:no-such"], "no-such"),
        (["--system", "magic:x"], "no kind of system"),
        (["--system", "baseline:tfidf"], "--baselines"),
        (["--suite", "guard"], "--suite cannot go"),
        (["--limit", "2"], "the limit is 2"),
        (["--wire", "grpc", "--system", "url:http://h"], "no such wire"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_at_once(
    rows_file: Path, tmp_path: Path, arguments: list[str], found: str
) -> None:
    done = evaluate("--data", rows_file, "--out", tmp_path / "out", *arguments, HHH_ROUTER_DATA="")

    assert done.exit_code == 2
    assert found in done.output
    assert not (tmp_path / "out").exists()


def test_options_for_own_rows_need_a_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b")

    folder = evaluate("--data", tmp_path, "--system", "bundle")
    table = evaluate("--data", tmp_path / "rows.csv")
    missing = evaluate("--data", tmp_path / "gone.jsonl")

    assert (folder.exit_code, table.exit_code, missing.exit_code) == (2, 2, 2)
    assert "--system cannot go" in folder.output
    assert ".jsonl" in table.output
    assert "cannot be read" in missing.output


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--data", "/me/sets", "--suite", "guard"], ["--suite", "guard"]),
        (["--data", "/me/rows.jsonl"], ["--data", "rows.jsonl"]),
        (["--data=../me/rows.jsonl.gz", "--out=/tmp/x"], ["--data", "rows.jsonl.gz"]),
        (["--system", "bundle:/me/mine"], ["--system", "bundle:mine"]),
        (["--system=policy:/me/p.yaml"], ["--system=policy:p.yaml"]),
        (["--system", "url:http://h:1/v1"], ["--system", "url:http://h:1/v1"]),
        (["--baselines", "/me/r.yaml"], ["--baselines", "r.yaml"]),
        (["--baselines=/me/r.yaml", "--out", "here"], ["--baselines=r.yaml"]),
    ],
)  # fmt: skip
def test_a_recorded_command_names_no_folder_of_this_machine(given: list[str], kept: list[str]) -> None:
    assert _public(given) == kept
