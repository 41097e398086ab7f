"""TrinityX's and H3Fusion's routing on our states and network: their losses, their shares, and the recipes that ask."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from scipy.special import softmax

from hhh_router.data.examples import Example, ask
from hhh_router.errors import ConfigError, DataError
from hhh_router.model.heads import Heads, Views
from hhh_router.training.features import Entry, TokenStates
from hhh_router.training.formulations import GateLoss, formulation_posterior, origins
from hhh_router.training.recipe import Formulation, Importance, RouterRecipe, load_recipe
from hhh_router.training.router import Epoch, train_heads
from hhh_router.types import DIMENSIONS, EXPERTS, NEEDS, OUTCOMES

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
LAYERS, DIM, TOKENS = 2, 8, 3
PLAN = RouterRecipe(
    read_layers=(1, 2), width=12, queries=2, learning_rate=0.02, weight_decay=0.01, epochs=12, batch_rows=32,
    dropout=0.1, max_tokens=32, mix=(),
)  # fmt: skip
TRINITYX = Formulation(name="trinityx", temperature=0.7, smoothness=0.01)
H3FUSION = Formulation(name="h3fusion")


def rows(count: int, seed: int = 0) -> tuple[list[Example], TokenStates]:
    """Prompts whose states lie along the axis of the one dimension they need, or of none; every third has a reply."""
    generator = torch.Generator().manual_seed(seed)
    examples, states, entries = [], [], []
    for i in range(count):
        origin, faulty, answered, alone = i % 4, i % 2, i % 3 == 0, i % 9 == 0
        prompt = 0.3 * torch.randn(TOKENS, LAYERS, DIM, generator=generator)
        response = 0.3 * torch.randn(TOKENS if answered else 0, LAYERS, DIM, generator=generator)
        if origin < 3:
            prompt[..., origin] += 2
        prompt[..., 5] += 2.0 * (i % 5 == 0)
        response[..., 6] += 2.0 * faulty
        needs = {d: float(k == origin) for k, d in enumerate(DIMENSIONS)} | {"injection": float(i % 5 == 0)}
        outcomes = dict.fromkeys(OUTCOMES, float(faulty)) if answered else {}
        messages = () if alone else ask(f"prompt {i}")
        reply = "reply" if answered else None
        examples.append(
            Example(source="own", split="train", messages=messages, response=reply, needs=needs, outcomes=outcomes)
        )
        states += [response] if alone else [prompt, response]
        length = 0 if alone else TOKENS
        start = sum(e.prompt + e.response for e in entries)
        entries.append(Entry(start, length, len(response), length + len(response)))
    return examples, TokenStates(torch.cat(states).bfloat16(), entries)


def train_formulation(
    name: str, examples: list[Example], given: TokenStates, plan: RouterRecipe, options: Formulation, *, seed: int,
    folder: Path | None = None,
) -> Iterator[Epoch | Heads]:  # fmt: skip
    chosen = plan.model_copy(update={"formulation": options.model_copy(update={"name": name})})
    yield from train_heads(examples, given, chosen, seed, folder=folder)


def trained(name: str, options: Formulation, folder: Path | None = None) -> Heads:
    *_, heads = train_formulation(name, *rows(240), PLAN, options, seed=3, folder=folder)
    assert isinstance(heads, Heads)
    return heads


@torch.no_grad()
def logits(heads: Heads, given: TokenStates, *, alone: bool = True) -> torch.Tensor:
    prompt, response = given.sides(range(len(given.entries)))
    views = Views(heads.pool(prompt, "prompt"), heads.pool(response, "response"), given.modes)
    return heads(views.alone() if alone else views)


@pytest.fixture(scope="module", params=["trinityx", "h3fusion"])
def found(request: pytest.FixtureRequest) -> tuple[Formulation, Heads]:
    options = TRINITYX if request.param == "trinityx" else H3FUSION
    return options, trained(request.param, options)


def test_heads_of_each_formulation_name_the_origin_of_prompts_they_have_not_seen(
    found: tuple[Formulation, Heads],
) -> None:
    options, heads = found
    examples, given = rows(120, seed=9)

    shares = formulation_posterior(options.name, logits(heads, given)[:, :3], options)

    known = [i for i, e in enumerate(examples) if e.messages and i % 4 < 3]
    right = [EXPERTS[shares[i].argmax()] == DIMENSIONS[i % 4] for i in known]
    assert sum(right) / len(right) > 0.9  # chance is a third


def test_outcomes_and_injection_are_learned_as_in_ours(found: tuple[Formulation, Heads]) -> None:
    examples, given = rows(120, seed=9)

    whole, alone = (logits(found[1], given, alone=a) for a in (False, True))

    answered = [(whole[i, len(NEEDS)].item(), e.outcomes["unsafe"]) for i, e in enumerate(examples) if e.outcomes]
    asked = [(alone[i, 3].item(), e.needs["injection"]) for i, e in enumerate(examples) if e.messages]
    for scored in (answered, asked):
        wins = [p > q for p, positive in scored for q, other in scored if positive and not other]
        assert sum(wins) / len(wins) > 0.9  # chance is .5


def test_a_softmax_trained_on_origins_says_nothing_of_a_request_that_needs_none(
    found: tuple[Formulation, Heads],
) -> None:
    """The reason why ours asks per need: here somebody always speaks, and base never does."""
    options, heads = found
    _, given = rows(40, seed=9)

    shares = formulation_posterior(options.name, logits(heads, given)[:, :3], options)

    assert (shares[:, 0] == 0).all()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(40, dtype=torch.float64))


def test_a_row_that_needs_none_teaches_the_softmax_as_little_as_one_whose_needs_are_unknown() -> None:
    """Ours learns from it that nothing is at stake."""
    examples, given = rows(240)
    injection = [{"injection": e.needs["injection"]} for e in examples]
    fewer = [replace(e, needs=n) if i % 4 == 3 else e for i, (e, n) in enumerate(zip(examples, injection, strict=True))]

    def weights(name: str, given_examples: list[Example]) -> torch.Tensor:
        *_, heads = train_formulation(name, given_examples, given, PLAN, Formulation(), seed=3)
        assert isinstance(heads, Heads)
        return heads.out.weight

    assert weights("h3fusion", fewer).equal(weights("h3fusion", examples))
    assert not weights("mocae", fewer).equal(weights("mocae", examples))


def test_ours_by_its_name_is_what_the_router_trains() -> None:
    *_, ours = train_heads(*rows(240), PLAN, 3)

    named = trained("mocae", Formulation())

    assert isinstance(ours, Heads)
    for key, tensor in named.state_dict().items():
        assert tensor.equal(ours.state_dict()[key])


def test_a_recipes_formulation_is_what_the_router_trains(found: tuple[Formulation, Heads]) -> None:
    options, heads = found

    *_, by_recipe = train_heads(*rows(240), PLAN.model_copy(update={"formulation": options}), 3)

    *_, other = train_heads(*rows(240), PLAN, 3)

    assert isinstance(by_recipe, Heads)
    assert isinstance(other, Heads)
    # to the bit only where memory lies alike, which another test in the same process may change
    torch.testing.assert_close(by_recipe.out.weight, heads.out.weight, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other.out.weight, heads.out.weight, rtol=1e-3, atol=1e-4)


def test_a_killed_training_goes_on_to_the_same_result(tmp_path: Path) -> None:
    options = TRINITYX.model_copy(update={"smoothness": 5.0})
    whole = trained("trinityx", options)
    run = train_formulation("trinityx", *rows(240), PLAN, options, seed=3, folder=tmp_path)
    for event in run:
        if isinstance(event, Epoch) and event.number == 2:
            run.close()

    resumed = trained("trinityx", options, folder=tmp_path)

    assert resumed.out.weight.equal(whole.out.weight)


def test_a_checkpoint_of_another_formulation_is_not_continued(tmp_path: Path) -> None:
    trained("h3fusion", H3FUSION, folder=tmp_path)

    after = list(train_formulation("trinityx", *rows(240), PLAN, TRINITYX, seed=3, folder=tmp_path))

    assert len(after) == PLAN.epochs + 1


def test_without_rows_of_an_origin_there_is_nothing_to_learn_it_from() -> None:
    examples, given = rows(60)
    kept = [i for i in range(60) if i % 4 != 2 or not examples[i].messages]  # honest in mode response alone
    fewer = TokenStates(given.states, [given.entries[i] for i in kept])

    with pytest.raises(DataError, match="no row comes from honest"):
        list(train_formulation("h3fusion", [examples[i] for i in kept], fewer, PLAN, H3FUSION, seed=3))


def test_trinityx_shares_are_importance_times_a_tempered_softmax() -> None:
    given = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    options = Formulation(
        name="trinityx", temperature=2.5, importance=Importance(helpful=1, harmless=4, honest=0.5), smoothness=0
    )

    shares = formulation_posterior("trinityx", given, options)

    raised = softmax(given.double().numpy() / 2.5, axis=1) * [1, 4, 0.5]
    expected = torch.from_numpy(raised / raised.sum(axis=1, keepdims=True))
    torch.testing.assert_close(shares[:, 1:], expected)


def test_h3fusion_shares_are_a_plain_softmax() -> None:
    given = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))

    shares = formulation_posterior("h3fusion", given, H3FUSION)

    torch.testing.assert_close(shares[:, 1:], torch.from_numpy(softmax(given.double().numpy(), axis=1)))


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [("mocae", (2, 3), "made by a gate from calibrated needs"), ("h3fusion", (2, 4), r"shape \(2, 4\)")],
)
def test_shares_that_cannot_be_made_say_why(name: str, shape: tuple[int, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        formulation_posterior(name, torch.zeros(shape), Formulation())


def test_a_row_that_needs_several_comes_from_the_gravest_and_one_that_needs_none_does_not_count() -> None:
    needs = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0.5, 0, 0]], dtype=torch.float)
    weights = torch.full((6, 3), 0.7)
    weights[4] = torch.tensor([0.2, 0.0, 0.7])  # harmless there is no label but the zero that stands for none

    place, weight = origins(needs, weights)

    assert [DIMENSIONS[p] for p in place[:3]] == ["helpful", "harmless", "honest"]
    assert DIMENSIONS[place[4]] == "helpful"
    torch.testing.assert_close(weight, torch.tensor([0.7, 0.7, 0.7, 0.0, 0.2, 0.0]))


def test_h3fusions_gate_loss_is_cross_entropy_of_logits_not_of_shares() -> None:
    """The release takes softmax twice, so that a perfect gate still pays 0.551."""
    sure, undecided = torch.eye(3) * 50, torch.zeros(3, 3)
    loss = GateLoss(Formulation(name="h3fusion", gate_loss=2.0))

    assert loss(sure, torch.arange(3), torch.ones(3)) == pytest.approx(0, abs=1e-6)
    assert loss(undecided, torch.arange(3), torch.ones(3)) == pytest.approx(2 * math.log(3))


def test_a_row_counts_by_its_weight() -> None:
    given = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    origin, weights = torch.tensor([0, 1, 1]), torch.tensor([3.0, 0.5, 0.0])

    loss = GateLoss(H3FUSION)(given, origin, weights)

    shares = softmax(given.double().numpy(), axis=1)
    assert loss == pytest.approx(-(3 * math.log(shares[0, 0]) + 0.5 * math.log(shares[1, 1])) / 3.5, rel=1e-5)


@pytest.mark.parametrize("options", [TRINITYX, H3FUSION])
def test_rows_without_an_origin_teach_nothing(options: Formulation) -> None:
    given = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.tensor([2.0, 0.0, 1.0, 0.0])
    loss = GateLoss(options)

    loss(given.detach()[[1, 3]], torch.zeros(2, dtype=torch.long), torch.zeros(2)).item()
    loss(given, torch.tensor([2, 0, 1, 0]), weights).backward()

    assert given.grad is not None
    assert (given.grad[[1, 3]] == 0).all()
    assert (given.grad[[0, 2]] != 0).all()


def test_a_batch_without_any_origin_has_a_loss_of_zero_that_can_be_descended() -> None:
    given = torch.randn(2, 3, requires_grad=True)

    loss = GateLoss(TRINITYX)(given, torch.zeros(2, dtype=torch.long), torch.zeros(2))
    loss.backward()

    assert loss.item() == 0
    assert given.grad is not None
    assert not given.grad.any()


def test_trinityx_adds_how_far_the_mean_shares_jumped_since_the_step_before() -> None:
    first, second = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()
    origin, weights = torch.tensor([0, 1, 2, 0, 1]), torch.ones(5)
    plain = TRINITYX.model_copy(update={"smoothness": 0.0})
    smooth = TRINITYX.model_copy(update={"smoothness": 3.0})
    without, with_term = GateLoss(plain), GateLoss(smooth)

    steps = [(without(x, origin, weights).item(), with_term(x, origin, weights).item()) for x in (first, second)]

    before, now = (softmax(x.double().numpy() / 0.7, axis=1).mean(axis=0) for x in (first, second))
    jump = sum(p * math.log(p / q) for p, q in zip(now, before, strict=True))
    assert jump > 0.01
    assert steps[0][0] == steps[0][1]
    assert steps[1][1] - steps[1][0] == pytest.approx(3 * jump, rel=1e-4)


SMALL = {
    "format": 1, "name": "small", "version": "1", "licence": "MIT", "commercial_use": True, "seed": 1,
    "backbone": {
        "source": "path:x", "sha256": "0" * 64, "dtype": "float32", "architecture": "llama", "layers": 4,
        "hidden_size": 8, "licence": "MIT",
    },
    "first_adapted_layer": 2,
    "experts": {
        "rank": 2, "alpha": 4, "target_modules": ["q_proj"], "learning_rate": 0.1, "batch_rows": 2, "max_tokens": 32,
        "mixes": {},
    },
    "router": PLAN.model_dump(mode="json", exclude={"formulation"}) | {"mix": [{"set": "a"}, {"set": "b"}]},
    "calibration": {"max_tokens": 32, "response_rows": 1, "mix": []},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def extended(folder: Path, text: str) -> Path:
    (folder / "own.yaml").write_text(text)
    return folder / "own.yaml"


def test_a_recipe_says_only_what_differs_from_its_base(folder: Path) -> None:
    base, base_hash = load_recipe(folder / "small.yaml")
    path = extended(folder, "base: small.yaml\nname: own\nrouter: {epochs: 2, mix: [{set: c}]}\n")

    recipe, found = load_recipe(path)

    router = base.router.model_copy(update={"epochs": 2, "mix": recipe.router.mix})
    assert recipe == base.model_copy(update={"name": "own", "router": router})
    assert [s.set for s in recipe.router.mix] == ["c"]
    assert found != base_hash


def test_the_hash_of_a_recipe_tells_a_change_of_its_base(folder: Path) -> None:
    path = extended(folder, "base: small.yaml\nname: own\n")
    _, before = load_recipe(path)

    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "seed": 2}))
    recipe, after = load_recipe(path)

    assert recipe.seed == 2
    assert before != after


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("base: gone.yaml\n", r"own\.yaml: base: .*gone\.yaml: cannot be read"),
        ("base: 3\n", r"own\.yaml: base: 3 is no file name"),
        ("base: list.yaml\n", r"own\.yaml: base: list\.yaml is no mapping"),
        ("base: second.yaml\n", r"own\.yaml: base: second\.yaml has a base itself \('small\.yaml'\)"),
        ("base: small.yaml\nrouter: {epoch: 3}\n", r"own\.yaml: router\.epoch: Extra inputs"),
        ("base: small.yaml\nrouter: 3\n", r"own\.yaml: router: Input should be"),
    ],
)
def test_a_base_that_cannot_be_extended_is_named(folder: Path, text: str, complaint: str) -> None:
    (folder / "list.yaml").write_text("- a\n")
    (folder / "second.yaml").write_text("base: small.yaml\n")

    with pytest.raises(ConfigError, match=complaint):
        load_recipe(extended(folder, text))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("{name: mixtral}", r"router\.formulation\.name: Input should be 'mocae', 'trinityx' or 'h3fusion'"),
        ("{name: trinityx, temperature: 0}", r"router\.formulation\.temperature: Input should be greater"),
        ("{name: trinityx, importance: {honest: 0}}", r"formulation\.importance\.honest: Input should be greater"),
        ("{name: trinityx, importance: {base: 1}}", r"formulation\.importance\.base: Extra inputs"),
        ("{name: trinityx, smoothness: .inf}", r"formulation\.smoothness: Input should be a finite number"),
        ("{name: h3fusion, gate_loss: -1}", r"formulation\.gate_loss: Input should be greater"),
        ("{name: h3fusion, temperature: 2}", r"temperature: not an option of h3fusion; it has gate_loss"),
        ("{gate_loss: 1, smoothness: 0}", r"gate_loss, smoothness: not an option of mocae; it has none"),
        ("{name: h3fusion, top_k: 2}", r"formulation\.top_k: Extra inputs"),
    ],
)
def test_options_that_a_formulation_cannot_take_are_named(folder: Path, options: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_recipe(extended(folder, f"base: small.yaml\nrouter: {{formulation: {options}}}\n"))


@pytest.mark.parametrize("name", ["trinityx", "h3fusion"])
def test_the_shipped_recipes_differ_from_the_default_in_name_and_formulation_alone(name: str) -> None:
    default, _ = load_recipe(ROOT / "recipes/smollm2-135m.yaml")

    recipe, _ = load_recipe(ROOT / f"recipes/{name}.yaml")

    router = default.router.model_copy(update={"formulation": recipe.router.formulation})
    assert default.router.formulation == Formulation()
    assert recipe.router.formulation.name == name
    assert recipe == default.model_copy(update={"name": f"smollm2-135m-{name}", "router": router})
