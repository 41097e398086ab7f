"""The benchmarks run as a whole, write what they promise, and go on where they stopped. Timings are never judged."""

import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import baselines, continuous_batching, engine, llamacpp, server, throughput
from benchmarks.decoding import weight_bytes
from benchmarks.figures import Figure, Measured, NotMeasured, Results
from benchmarks.lab import BARE, MIXTURES, QUICK, Lab, plan_for
from benchmarks.present import draw, present
from benchmarks.prompts import mixed
from benchmarks.run import parse, run
from benchmarks.timing import interleaved
from hhh_router.bundle import Bundle
from hhh_router.protocols import Delta, Event

pytestmark = pytest.mark.integration
KEYS = {"name", "value", "unit", "target", "meets", "command", "n"}
NO_GGUF = {"decode-1-over-llamacpp", "prefill-over-llamacpp"}


@pytest.fixture(scope="module")
def lab(tiny: Bundle) -> Lab:
    torch.set_num_threads(1)
    return Lab.open(tiny, device="cpu", threads=1, sizes=QUICK, repeats=1)


def quick(bundle: Bundle, out: Path, *more: str) -> list[str]:
    return ["--quick", "--bundle", str(bundle.root), "--threads", "1", "--out", str(out), *more]


@pytest.fixture(scope="module")
def written(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "engine.json"
    assert engine.main(quick(tiny, out)) == 0
    return out


def read(path: Path) -> dict[str, Mapping[str, Any]]:
    return {r["name"]: r for r in json.loads(path.read_text())}


def check(record: Mapping[str, Any]) -> None:
    assert record.keys() >= KEYS
    assert record["n"] >= 1
    for key in ("value", "low", "high"):
        assert math.isfinite(record[key])
        assert record[key] > 0
    assert all(math.isfinite(v) and v > 0 for v in record["sides"].values())
    assert (record["meets"] is None) == (record["target"] is None)
    assert f"--only {record['name']} --quick" in record["command"]


def test_every_figure_comes_out(written: Path) -> None:
    found = read(written)

    assert list(found) == [f.name for f in engine.figures()]
    for name, record in found.items():
        if name in NO_GGUF:
            assert record.keys() >= KEYS
            assert (record["value"], record["meets"], record["n"]) == (None, None, 0)
            assert record["note"].startswith("not measured: ")
        else:
            check(record)


def test_a_target_that_depends_on_the_bundle_is_its_own(written: Path) -> None:
    assert read(written)["refusal-cost"]["target"] == pytest.approx(2 / 4 + 0.05)


def test_the_machine_is_described_without_naming_it(written: Path) -> None:
    found = json.loads(written.with_name("engine-machine.json").read_text())

    assert found["cores"] >= 1
    assert found["bandwidth_gb_s"] > 0
    assert found["versions"].keys() >= {"torch", "transformers", "peft"}
    assert {"load_at_start", "load_at_end", "threads", "dtype", "instructions"} <= found.keys()
    everything = "".join(p.read_text() for p in written.parent.iterdir())
    assert str(written.parent) not in everything
    assert str(Path.home()) not in everything


def test_chart_and_table_show_every_figure(written: Path) -> None:
    table, chart = (written.with_suffix(s).read_text() for s in (".md", ".svg"))

    for record in read(written).values():
        assert record["title"] in table
        if record["value"] is not None and record["target"] is not None:
            assert record["title"] in chart
    draw(list(read(written).values()), written.with_name("again.svg"))
    assert written.with_name("again.svg").read_text() == chart
    written.with_name("again.svg").unlink()


def test_what_is_there_is_not_measured_again(
    written: Path, tiny: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = read(written)
    out = tmp_path / "engine.json"
    out.write_text(written.read_text())

    assert engine.main(quick(tiny, out, "--only", "decode-8-over-bare", "added-memory")) == 0

    assert "2 of 2 figures are in" in capsys.readouterr().err
    assert read(out) == before
    assert engine.main(quick(tiny, out, "--only", "decode-8-over-bare", "--fresh")) == 0
    assert read(out)["decode-8-over-bare"]["value"] != before["decode-8-over-bare"]["value"]
    assert list(read(out)) == list(before)


def test_other_versions_or_another_command_are_measured_anew(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", ["a", "b"])
    results.add({"name": "a", "value": 1.0, "command": "c", "setting": "s"})
    results.add({"name": "b", "value": None, "command": "c", "setting": "s"})
    again = Results(tmp_path / "r.json", ["a", "b"])

    assert again.holds("a", command="c", setting="s")
    assert not again.holds("a", command="c --repeats 9", setting="s")
    assert not again.holds("a", command="c", setting="another torch")
    assert not again.holds("b", command="c", setting="s")  # what could not be measured is tried again


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "decode-8-over-bar"], "no figure 'decode-8-over-bar'; did you mean 'decode-8-over-bare'?"),
        (["--only", "speed"], "Known: decode-8-over-bare, "),
        (["--repeats", "0"], "--repeats: 0 is no number of rounds"),
    ],
)
def test_a_wrong_option_says_what_is_right(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        engine.main(given)

    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_bundle_or_a_foreign_results_file_is_an_error_of_use(
    tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')

    assert engine.main(["--bundle", "none-such"]) == 2
    assert "none-such" in capsys.readouterr().err
    assert engine.main(quick(tiny, tmp_path / "other.json")) == 2
    assert "not a list of figures" in capsys.readouterr().err


def test_a_figure_that_fails_costs_no_other(tiny: Bundle, tmp_path: Path) -> None:
    def broken(lab: Lab) -> Measured:
        lab.put(lab.prompts(1, 60)[0], plan_for(MIXTURES[0]), tokens=5)
        raise RuntimeError("boom")

    figures = [
        Figure(name="bad", title="Bad", unit="x", target=1, measure=broken),
        Figure(name="good", title="Good", unit="x", target=1, measure=_good),
        Figure(name="none", title="None", unit="x", target=1, measure=_not_here),
    ]
    options = parse("benchmarks.test", "", figures, quick(tiny, tmp_path / "r.json"))

    records, failed = run(options, figures)

    assert failed == 1
    assert [(r["name"], r["value"] is None) for r in records] == [("good", False), ("none", True)]
    present(records, options.out)


def _good(lab: Lab) -> Measured:
    return Measured(values=[lab.decode_rate(MIXTURES, 2)])


def _not_here(lab: Lab) -> Measured:
    raise NotMeasured("nothing of the kind is here")


def test_throughput_of_batches_comes_out(lab: Lab) -> None:
    found = throughput.tokens_per_s(4)(lab)

    assert found.values[0] > 0
    assert found.sides.keys() == {"ours (tokens/s)", "transformers generate (tokens/s)"}


def test_transformers_continuous_batching_comes_out(tiny: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "continuous_batching.json"

    assert continuous_batching.main(quick(tiny, out)) == 0

    found = read(out)
    assert list(found) == ["chats-16-over-manager", "prefill-8-over-manager"]
    for record in found.values():
        check(record)


def test_the_servers_figures_come_out(tiny: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "server.json"

    assert server.main(quick(tiny, out)) == 0

    found = read(out)
    assert list(found) == [f.name for f in server.FIGURES]
    for record in found.values():
        assert record.keys() >= KEYS
        assert record["n"] == 1
        assert math.isfinite(record["value"])  # the added time may come out below zero where calls take no time
        assert all(math.isfinite(v) and v > 0 for v in record["sides"].values())


class _Server:
    """Answers as llama.cpp's server does, with timings of its own."""

    def __init__(self, params: Any) -> None:
        self.asked: list[Mapping[str, Any]] = []

    def handle_completions(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append(asked)
        tokens = asked["n_predict"]
        timings = {"prompt_n": len(asked["prompt"]), "prompt_ms": 500.0, "predicted_n": tokens, "predicted_ms": 200.0}
        return {"timings": timings}


def test_llamacpp_is_believed_what_it_says_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SimpleNamespace(
        model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
    )  # fmt: skip
    binding = SimpleNamespace(CommonParams=lambda: params, Server=_Server, get_system_info=lambda: "AVX2 = 1 | ")
    monkeypatch.setitem(sys.modules, "xllamacpp", binding)
    with ThreadPoolExecutor(1, initializer=llamacpp._open, initargs=(str(tmp_path / "a"), 32, 3, False)) as pool:
        model = llamacpp.LlamaCpp(pool)

        assert model.prefill_s([1, 2, 3]) == 0.5
        assert model.decode_rate([1, 2, 3], 10) == pytest.approx(50)  # the prompt's own pass brings the eleventh token
        assert model.built_for == "AVX2 = 1"
    assert (params.cpuparams.n_threads, params.cpuparams_batch.n_threads, params.n_gpu_layers) == (3, 3, 0)


def test_the_documentation_names_every_figure_and_its_target() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")

    for figure in (*engine.figures("cpu"), *server.FIGURES):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{figure.name}` |")]
        if figure.target is not None and figure.name != "refusal-cost":
            wanted = f"{100 * figure.target:g} %" if figure.unit == "share" else f"{figure.target:g}".lstrip("0")
            assert row.endswith(f"{'≥' if figure.at == 'least' else '≤'} {wanted} |")


def test_sides_take_turns_and_warmups_do_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({"a": lambda: side("a"), "b": lambda: side("b")}, 2)

    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_reply_is_as_long_as_was_asked_whatever_it_says(lab: Lab) -> None:
    heard: list[Event] = []
    lab.put(lab.prompts(1, 60)[0], plan_for(BARE), tokens=40, tell=heard.append)
    while lab.batcher.busy:
        lab.turn()

    assert sum(e.tokens for e in heard if isinstance(e, Delta)) == 40


def test_prompts_have_the_length_that_was_asked(lab: Lab) -> None:
    lengths = [len(ids) for ids in lab.ids(lab.prompts(5, 90))]

    assert all(abs(n - 90) <= 2 for n in lengths)
    assert len({r.messages for r in mixed(1000, 1200)}) == 1000


@torch.inference_mode()
def test_baselines_have_the_weights_of_the_engine(lab: Lab) -> None:
    ids = baselines.prompt_batch(lab, 2)
    stack, gates = lab.batcher.reader.stack, lab.batcher.gates
    gates.set([MIXTURES[1]] * 2)
    mixture = stack.logits(stack.run(stack.begin(ids), stack.depth))
    gates.set(None)
    bare = stack.logits(stack.run(stack.begin(ids), stack.depth))

    torch.testing.assert_close(baselines.load_merged(lab, MIXTURES[1])(ids).logits, mixture, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(baselines.load(lab)(ids).logits, bare)


@torch.inference_mode()
def test_peft_and_xlora_run_all_three_adapters(lab: Lab) -> None:
    ids = baselines.prompt_batch(lab, 1)
    reference = baselines.load(lab)
    bare = reference(ids).logits
    for expert in baselines.load_experts(lab.bundle):
        for module, factor in expert.factors.items():
            reference.get_submodule(module).weight += expert.scale * factor.up @ factor.down

    torch.testing.assert_close(baselines.load_peft(lab)(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(baselines.load_xlora(lab)(ids).logits, bare, atol=1e-2)


def test_weights_read_for_a_token_are_counted_once(lab: Lab) -> None:
    model = baselines.load(lab)
    backbone = sum(p.nbytes for p in model.parameters())
    experts = sum(p.nbytes for n, p in baselines.load_peft(lab).named_parameters() if "lora_" in n)

    assert weight_bytes(lab) == backbone + experts
