"""The heads' arithmetic: pooling by attention, tokens one at a time or all at once, shared openings, kept states."""

from pathlib import Path

import pytest
import torch

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError
from hhh_router.model.base import load_backbone
from hhh_router.model.encode import Encoded
from hhh_router.model.heads import Heads, Pooled, Ragged, Views
from hhh_router.model.pooling import RunningPool
from hhh_router.model.reader import HeadReader, RunningReply
from hhh_router.training.features import StateStore, token_states
from hhh_router.types import NEEDS, OUTCOMES, Message, ReadRequest

pytestmark = pytest.mark.integration

LAYERS, DIM = 2, 6


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(3)
    made = Heads(layers=LAYERS, dim=DIM, width=9, queries=3, needs=NEEDS, outcomes=OUTCOMES)
    made.prompt_scale.fill_(2.0)
    return made.eval()


@pytest.fixture(scope="module")
def reader(tiny: Bundle) -> HeadReader:
    backbone = load_backbone(tiny.root / "backbone", tiny.manifest.backbone)
    fitting = Heads.load(tiny.root / "heads.safetensors", layers=1, dim=32)
    return HeadReader(backbone.stack, fitting, (2,), 2)


def ragged(*lengths: int, seed: int = 0) -> Ragged:
    generator = torch.Generator().manual_seed(seed)
    return Ragged(torch.randn(sum(lengths), LAYERS, DIM, generator=generator), list(lengths))


def test_pooling_is_softmax_attention_worked_out_row_by_row(heads: Heads) -> None:
    given = ragged(4, 1, 7)

    found = heads.features(given, "prompt")

    for row, states in enumerate(given.states.split([4, 1, 7])):
        tokens = heads.tokens(states, "prompt")  # (T, W)
        shares = torch.softmax(tokens @ heads.query["prompt"].weight.T, dim=0)  # (T, Q)
        gathered = shares.T @ heads.value["prompt"](tokens)  # (Q, V)
        expected = heads.gather["prompt"](torch.cat([gathered.flatten(), tokens[-1]]))
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("pieces", [[1] * 300, [500], [3, 128, 1, 200, 64, 7], [63, 1, 64]])
def test_tokens_that_come_in_pieces_are_pooled_as_all_at_once(heads: Heads, pieces: list[int]) -> None:
    given = ragged(sum(pieces), seed=5)
    given.states[: sum(pieces) // 2] *= 3  # so that later tokens do not find a new maximum
    running, done = RunningPool(heads, "response"), 0
    for piece in pieces:
        states = given.states[done : (done := done + piece)]
        running.add(heads.tokens(states, "response"), states[:, -1])
        so_far = heads.pool(Ragged(given.states[:done], [done]), "response")

        assert torch.allclose(running.pooled().features, so_far.features, atol=1e-5)
        assert torch.allclose(running.pooled().summary, so_far.summary, atol=1e-5)


def test_the_last_tokens_can_be_taken_back_and_no_more_than_those(heads: Heads) -> None:
    given = ragged(300, seed=6)
    features = heads.tokens(given.states, "response")
    running = RunningPool(heads, "response")
    running.add(features, given.states[:, -1])

    assert not running.cut(200)
    assert running.tokens == 300
    assert running.cut(250)
    cut = running.pooled()
    running.add(features[250:260], given.states[250:260, -1])

    for found, tokens in ((cut, 250), (running.pooled(), 260)):
        expected = heads.pool(Ragged(given.states[:tokens], [tokens]), "response")
        assert torch.allclose(found.features, expected.features, atol=1e-5)
        assert torch.allclose(found.summary, expected.summary, atol=1e-5)


def test_rows_without_a_side_get_zeros_and_no_nan(heads: Heads) -> None:
    found = heads.pool(ragged(3, 0, 2), "response")

    assert torch.isfinite(found.features).all()
    assert not found.features[1].any()
    assert not found.summary[1].any()


def test_a_rows_scores_do_not_depend_on_its_neighbours(heads: Heads) -> None:
    together = heads.pool(ragged(3, 5), "prompt")
    alone = heads.pool(Ragged(ragged(3, 5).states[:3], [3]), "prompt")

    torch.testing.assert_close(together.features[:1], alone.features)
    torch.testing.assert_close(together.summary[:1], alone.summary)


def test_needs_do_not_change_with_the_reply(heads: Heads) -> None:
    prompt = heads.pool(ragged(4), "prompt")
    scores = [
        heads.scores(Views(prompt, heads.pool(ragged(6, seed=s), "response"), ["both"]), tokens=[10], layers_run=2)[0]
        for s in (1, 2)
    ]

    assert scores[0].needs == scores[1].needs
    assert scores[0].outcomes != scores[1].outcomes


def test_a_reply_read_token_by_token_scores_as_when_read_at_once(heads: Heads, reader: HeadReader) -> None:
    states = ragged(5, seed=4).states
    prompt = heads.pool(ragged(4), "prompt")
    running = RunningReply(HeadReader(reader.stack, heads, (1, 2), 2), prompt, 4)

    for token in states:
        running.add([layer[None, None] for layer in token])
    whole = heads.pool(Ragged(states, [5]), "response")
    (expected,) = heads.scores(Views(prompt, whole, ["both"]), tokens=[9], layers_run=2)

    assert running.tokens == 5
    assert running.scores().outcomes == pytest.approx(expected.outcomes, abs=1e-5)
    assert running.scores().distance == pytest.approx(expected.distance, rel=1e-4)


def test_distances_grow_away_from_the_rows_they_were_fitted_on(heads: Heads) -> None:
    torch.manual_seed(0)
    near = torch.randn(90, 2 * DIM)
    modes = ["prompt", "response", "both"] * 30
    heads.fit_support(near, near, modes)

    def distance(summaries: torch.Tensor) -> float:
        sides = Pooled(torch.zeros(len(summaries), 9), summaries)
        return float(heads.distances(Views(sides, sides, ["prompt"] * len(summaries))).mean())

    assert distance(near) < 2
    assert distance(near + 6) > 2 * distance(near)


def test_heads_of_another_shape_are_refused(heads: Heads, tmp_path: Path) -> None:
    heads.save(tmp_path / "h.safetensors")

    assert Heads.load(tmp_path / "h.safetensors", layers=LAYERS, dim=DIM).needs == NEEDS
    with pytest.raises(BundleError, match="made for 2 layers of 6"):
        Heads.load(tmp_path / "h.safetensors", layers=3, dim=DIM)


def encoded(reader: HeadReader, tiny: Bundle, *prompts: str) -> list[Encoded]:
    encoder = load_backbone(tiny.root / "backbone", tiny.manifest.backbone).encoder
    system = Message(role="system", content="You answer questions about boats.")
    return [encoder.encode(ReadRequest(messages=(system, Message(role="user", content=p)))) for p in prompts]


def test_a_shared_opening_is_run_once_and_changes_no_state(reader: HeadReader, tiny: Bundle) -> None:
    texts = encoded(reader, tiny, "How do I paint it?", "Why?", "What colour is best for a small one?")
    tokens: list[int] = []
    handle = reader.stack.layers[0].register_forward_hook(lambda _, given, __: tokens.append(given[0].shape[1]))

    prompt, _ = reader.sides(texts)
    again, _ = reader.sides(texts)
    handle.remove()
    one_by_one = [_bare(reader, t) for t in texts]

    torch.testing.assert_close(prompt.states, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)
    assert prompt.states.equal(again.states)
    opening = tokens[0]
    assert opening > 8  # the system turn, on its own, in the first call only
    assert tokens[1:] == [max(len(t.ids) for t in texts) - opening] * 2


def test_a_long_opening_is_kept_in_part_and_changes_no_state(
    reader: HeadReader, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hhh_router.model.reader._LONGEST_PREFIX", 10)
    texts = encoded(reader, tiny, "How do I paint it?", "Why?")
    fresh = HeadReader(reader.stack, reader.heads, (2,), 2)

    prompt, _ = fresh.sides(texts)

    (kept,) = fresh._prefixes
    assert len(kept) == 10
    torch.testing.assert_close(prompt.states, torch.cat([_bare(reader, t) for t in texts]), rtol=1e-4, atol=1e-4)


def _bare(reader: HeadReader, text: Encoded) -> torch.Tensor:
    with torch.inference_mode():
        state = reader.stack.begin(torch.tensor([text.ids]))
        hidden = reader.stack.run(state, 2)
    start, stop = text.prompt_span
    return hidden[0, start:stop][:, None]


def test_token_states_are_read_once_and_survive_a_kill(reader: HeadReader, tiny: Bundle, tmp_path: Path) -> None:
    encoder = load_backbone(tiny.root / "backbone", tiny.manifest.backbone).encoder
    asked = [ReadRequest(messages=(Message(role="user", content=f"question {i}"),)) for i in range(6)]
    asked[3] = ReadRequest(messages=asked[3].messages, response="an answer")
    options = {"max_tokens": 100, "folder": tmp_path}
    token_states(asked[:4], reader, encoder, **options)
    (index,) = tmp_path.glob("*/index.jsonl")
    index.write_text(index.read_text() + '["cut off by a ki')
    with index.with_name("states.bf16").open("ab") as file:
        file.write(b"half a row")
    passes: list[int] = []
    handle = reader.stack.layers[0].register_forward_hook(lambda *_: passes.append(1))

    resumed = token_states(asked, reader, encoder, **options)
    first_passes = len(passes)
    again = token_states(asked, reader, encoder, **options)
    handle.remove()

    assert first_passes > 0
    assert len(passes) == first_passes  # nothing is read a third time
    assert resumed.modes == ["prompt"] * 3 + ["both"] + ["prompt"] * 2
    for i, request in enumerate(asked):
        expected, _ = reader.sides([encoder.encode(request)])
        found, response = again.sides([i])
        torch.testing.assert_close(found.states.float(), expected.states, rtol=1e-2, atol=2e-2)  # kept as bf16
        assert response.lengths == [again.entries[i].response]


def test_a_store_counts_its_tokens(tmp_path: Path) -> None:
    store = StateStore(tmp_path, LAYERS, DIM)
    store.add([("a", torch.ones(2, LAYERS, DIM), torch.zeros(1, LAYERS, DIM), 9)])
    store.add([("b", torch.full((1, LAYERS, DIM), 3.0), torch.zeros(0, LAYERS, DIM), 4)])

    reopened = StateStore(tmp_path, LAYERS, DIM)

    assert reopened["b"].start == 3
    assert reopened["a"].mode == "both"
    assert reopened["b"].mode == "prompt"
    assert reopened.open()[:, 0, 0].tolist() == [1, 1, 0, 3]
