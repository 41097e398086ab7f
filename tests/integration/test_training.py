"""Train → calibrate → serve on small data that the project makes itself, and what goes wrong on the way."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hhh_router.bundle import Bundle, Manifest, file_sha256
from hhh_router.data.sets import read_set
from hhh_router.errors import BundleError, ConfigError, DataError
from hhh_router.interfaces.sdk import HHHRouter
from hhh_router.model.base import Backbone, load_backbone
from hhh_router.model.experts import load_expert, load_experts
from hhh_router.training.blocks import Trial, search_blocks
from hhh_router.training.build import Workshop, _provenance, calibration_examples, train_experts, train_router
from hhh_router.training.calibrate import _reader, calibrate, read_all
from hhh_router.training.experts import TrainingDiverged, train_expert
from hhh_router.training.lessons import Lesson, lessons
from hhh_router.training.mix import _eval_prompts, _eval_rows, check_licences, draw
from hhh_router.training.recipe import BlocksRecipe, Share, load_recipe

from .datasets import RECIPE, write_sets

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def shop(tiny: Bundle, data: Path, tmp_path: Path) -> Workshop:
    return make_shop(tiny, data, tmp_path)


def make_shop(tiny: Bundle, data: Path, folder: Path, recipe_text: str = RECIPE) -> Workshop:
    backbone = tiny.root / "backbone"
    path = folder / "tiny.yaml"
    path.write_text(recipe_text.format(backbone=backbone, sha256=file_sha256(backbone / "model.safetensors")))
    recipe, sha256 = load_recipe(path)
    return Workshop(
        recipe=recipe,
        recipe_file=path.name,
        recipe_sha256=sha256,
        data=data,
        bundle=folder / "bundle",
        work=folder / "work",
        cache_dir=folder / "cache",
        threads=1,
    )


def helpful_lessons(shop: Workshop, backbone: Backbone) -> list[Lesson]:
    plan = shop.recipe.experts
    return lessons(plan.mixes["helpful"], plan, backbone, shop.data, seed=1, folder=shop.work)


@pytest.fixture(scope="session")
def trained(tiny: Bundle, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = make_shop(tiny, data, tmp_path_factory.mktemp("trained"))
    train_experts(shop)
    train_router(shop)
    calibrate(shop)
    return shop


def test_a_trained_bundle_verifies_and_answers(trained: Workshop) -> None:
    bundle = Bundle.load(trained.bundle)
    bundle.verify()

    with HHHRouter(bundle=bundle.root, cache_dir=trained.cache_dir, threads=1) as router:
        result = router.chat("How do I paint a boat?", max_tokens=5)
        guarded = router.guard(prompt="How do I paint a boat?", response="Slowly.")

    assert sum(result.metadata.weights.values()) == pytest.approx(1, abs=1e-5)
    assert result.metadata.calibration.calibrated
    assert guarded.metadata.calibration.calibrated
    assert result.metadata.bundle.name == "tiny"


def test_the_manifest_tells_licence_use_and_rows_of_all_data(trained: Workshop) -> None:
    data = {(d.name, d.use): d for d in Bundle.load(trained.bundle).manifest.data}

    assert data["red_instruct", "expert harmless"].rows == 60
    assert data["gptfuzz_responses", "router"].licence == "MIT"
    assert ("gptfuzz_responses", "calibration") not in data


def test_learned_heads_tell_harmful_from_benign_prompts_they_have_not_seen(trained: Workshop) -> None:
    rows = read_set(trained.data, "openai_moderation", "eval")

    with HHHRouter(bundle=trained.bundle, cache_dir=trained.cache_dir, threads=1) as router:
        needs = [r.metadata.needs["harmless"] for r in router.route([e.prompt for e in rows])]

    harmful = [q for q, e in zip(needs, rows, strict=True) if e.needs["harmless"]]
    benign = [q for q, e in zip(needs, rows, strict=True) if not e.needs["harmless"]]
    wins = sum(h > b for h in harmful for b in benign) / (len(harmful) * len(benign))
    assert wins > 0.8  # the wording differs in verbs alone; chance is .5


def test_expert_training_lowers_the_loss(shop: Workshop) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    rows = helpful_lessons(shop, backbone)

    losses = [p.loss for p in train_expert("helpful", rows, backbone, shop.recipe, shop.work)]

    assert losses[-1] < losses[0]


def test_a_killed_training_goes_on_to_the_same_result(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hhh_router.training.experts.CHECKPOINT_STEPS", 2)
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    rows = helpful_lessons(shop, backbone)
    list(train_expert("helpful", rows, backbone, shop.recipe, tmp_path / "whole"))

    run = train_expert("helpful", rows, backbone, shop.recipe, tmp_path / "killed")
    while next(run).step < 5:  # dies between two checkpoints
        pass
    run.close()
    resumed = list(train_expert("helpful", rows, backbone, shop.recipe, tmp_path / "killed"))

    assert resumed[0].step == 5
    whole = load_file(tmp_path / "whole/expert/adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "killed/expert/adapter_model.safetensors").items():
        assert tensor.equal(whole[name])


def test_a_checkpoint_of_another_recipe_is_not_continued(shop: Workshop, tmp_path: Path) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    rows = helpful_lessons(shop, backbone)
    list(train_expert("helpful", rows, backbone, shop.recipe, tmp_path / "work"))
    other = shop.recipe.model_copy(update={"experts": shop.recipe.experts.model_copy(update={"drift": 0.5})})

    with pytest.raises(ConfigError, match="checkpoint of other rows"):
        list(train_expert("helpful", rows, backbone, other, tmp_path / "work"))


def test_a_preference_moves_the_expert_from_the_worse_reply_to_the_good_one(shop: Workshop) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    plan = shop.recipe.experts
    mix = (Share(set="red_instruct", reply="refusal", against="backbone"), Share(set="dolly", against="refusal"))
    shown = lessons(mix, plan, backbone, shop.data, seed=1, folder=shop.work)

    steps = list(train_expert("harmless", shown, backbone, shop.recipe, shop.work))

    assert all(lesson.worse is not None for lesson in shown)
    assert steps[0].margin == pytest.approx(0.0, abs=1e-4)  # it begins as the backbone, its own reference
    assert steps[-1].margin > 0.5


def test_a_search_finds_scales_that_lose_less_than_they_win_and_leaves_the_backbone_bare(
    trained: Workshop, tmp_path: Path
) -> None:
    backbone = load_backbone(Path(trained.recipe.backbone.source.removeprefix("path:")), trained.recipe.backbone)
    plan = trained.recipe.experts
    shown = lessons(
        (Share(set="red_instruct", rows=8, reply="refusal", against="backbone"),), plan, backbone, trained.data,
        seed=1, folder=tmp_path,
    )  # fmt: skip
    expert = load_expert(trained.bundle / "experts/harmless", "harmless")
    before = {name: type(module) for name, module in backbone.stack.model.named_modules()}
    costly = BlocksRecipe(count=2, tax=1000.0, benign=(), pairs={})

    def search(blocks: BlocksRecipe) -> list[Trial]:
        return list(
            search_blocks(expert, backbone, shown, [x.worse for x in shown if x.worse], blocks, first=2, beta=plan.beta)
        )

    free, bound = search(costly.model_copy(update={"tax": 0.0})), search(costly)

    assert free[-1].reward == max(t.reward for t in free) > 0.5
    assert bound[-1].tax == pytest.approx(min(t.tax for t in bound), abs=1e-3)
    assert free[-1].tax > bound[-1].tax
    assert next(t.reward for t in bound if t.blocks == (0.0, 0.0)) == pytest.approx(0.5)
    assert {name: type(module) for name, module in backbone.stack.model.named_modules()} == before


def test_scales_in_the_manifest_are_applied_block_by_block(trained: Workshop) -> None:
    bundle = Bundle.load(trained.bundle)
    spec = bundle.manifest.experts["harmless"].model_copy(update={"blocks": (0.0, 2.0)})
    manifest = bundle.manifest.model_copy(update={"experts": {**bundle.manifest.experts, "harmless": spec}})

    plain = load_experts(bundle)[1]
    found = load_experts(Bundle(bundle.root, manifest, bundle.sha256))[1]

    for module, factor in found.factors.items():
        factor_of = 0.0 if ".layers.2." in module else 2.0
        assert factor.up.equal(plain.factors[module].up * factor_of)


def test_a_lesson_takes_the_backbones_own_reply_and_keeps_it(shop: Workshop) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    plan = shop.recipe.experts.model_copy(update={"own_reply_tokens": 5})
    mix = (Share(set="dolly", rows=3, reply="backbone", against="refusal"),)
    first = lessons(mix, plan, backbone, shop.data, seed=1, folder=shop.work)
    (kept,) = shop.work.glob("backbone-replies-5.jsonl")
    kept.write_text(kept.read_text() + '["cut off')  # a kill while a row is written

    again = lessons(mix, plan, backbone, shop.data, seed=1, folder=shop.work)

    assert again == first
    assert len(kept.read_text().splitlines()) == 3


def test_only_a_reply_that_came_to_its_end_teaches_the_end_mark(shop: Workshop) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    plan = shop.recipe.experts.model_copy(update={"own_reply_tokens": 5})
    mix = (Share(set="dolly", rows=4, reply="backbone", against="refusal"),)

    shown = lessons(mix, plan, backbone, shop.data, seed=1, folder=shop.work)

    end = backbone.encoder.end_id
    assert all(lesson.worse is not None and lesson.worse.ids[-1] == end for lesson in shown)
    written = [json.loads(row)[1] for row in (shop.work / "backbone-replies-5.jsonl").read_text().splitlines()]
    whole = sum(len(backbone.encoder.response_ids(reply)) < 4 for reply in written)
    assert sum(lesson.good.ids[-1] == end for lesson in shown) == whole < len(shown)


def test_experts_are_written_in_the_bundles_precision_and_without_the_scales_of_older_ones(
    shop: Workshop,
) -> None:
    half = shop.recipe.backbone.model_copy(update={"dtype": "bfloat16"})
    shop = replace(shop, recipe=shop.recipe.model_copy(update={"backbone": half}))
    stale = shop.bundle / "experts/helpful/blocks.tsv"
    stale.parent.mkdir(parents=True)
    stale.write_text("blocks\n0,0\n")

    train_experts(shop, ("helpful",))

    written = load_file(stale.parent / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert not stale.exists()
    assert Manifest.model_validate_json((shop.bundle / "manifest.json").read_text()).experts["helpful"].blocks == ()


def test_the_manifest_counts_a_pair_of_replies_once_and_names_no_search_that_was_not_made(shop: Workshop) -> None:
    experts = shop.recipe.experts
    mix = (Share(set="truthfulqa/judged", rows=3, against="faulty"),)
    scales = BlocksRecipe(benign=(), pairs={"honest": (Share(set="made", rows=5),)})
    changed = experts.model_copy(update={"mixes": {**experts.mixes, "honest": mix}, "blocks": scales})
    rows = [
        {"question": "What is it?", "answer": answer, "truthful": truth, "informative": 1, "split": "train"}
        for answer, truth in (("A hat.", 1), ("A fish.", 0), ("A cow.", 0), ("A pig.", 0), ("A fly.", 0))
    ]
    data = shop.work / "sets"
    shutil.copytree(shop.data, data)
    with gzip.open(data / "truthfulqa/judged_answers.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    shop = replace(shop, data=data, recipe=shop.recipe.model_copy(update={"experts": changed}))

    used = {(d.name, d.use): d.rows for d in _provenance(shop)}

    assert used["truthfulqa/judged", "expert honest"] == 3
    assert not [use for _, use in used if use.startswith("scales")]


def test_faulty_replies_stand_beside_good_ones_to_the_same_prompt(shop: Workshop) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    plan = shop.recipe.experts

    with pytest.raises(DataError, match="no prompt has both"):
        lessons((Share(set="dolly", against="faulty"),), plan, backbone, shop.data, seed=1, folder=shop.work)


def test_a_diverging_loss_stops_with_what_to_do(shop: Workshop) -> None:
    backbone = load_backbone(Path(shop.recipe.backbone.source.removeprefix("path:")), shop.recipe.backbone)
    rows = helpful_lessons(shop, backbone)
    wild = shop.recipe.model_copy(update={"experts": shop.recipe.experts.model_copy(update={"learning_rate": 1e30})})

    with pytest.raises(TrainingDiverged, match="learning_rate"):
        list(train_expert("helpful", rows, backbone, wild, shop.work))


def test_commercial_recipes_refuse_data_that_forbids_it(shop: Workshop) -> None:
    router = shop.recipe.router.model_copy(update={"mix": (*shop.recipe.router.mix, share("falseqa"))})

    with pytest.raises(DataError, match="falseqa"):
        check_licences(shop.recipe.model_copy(update={"router": router}))


def share(name: str):  # type: ignore[no-untyped-def]
    from hhh_router.training.recipe import Share

    return Share(set=name)


def test_rows_that_were_trained_on_are_not_calibrated_on(shop: Workshop, trained: Workshop) -> None:
    part = trained.recipe.calibration
    mix = (*part.mix, share("gptfuzz_responses").model_copy(update={"split": "calibrate"}))
    moved = trained.recipe.model_copy(update={"calibration": part.model_copy(update={"mix": mix})})

    with pytest.raises(DataError, match="gptfuzz_responses"):
        calibrate(replace(trained, recipe=moved))


def test_a_router_needs_its_experts(shop: Workshop) -> None:
    with pytest.raises(BundleError, match="train experts"):
        train_router(shop)


def test_a_wrong_recipe_lists_every_mistake(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("format: 2\nname: x\nsed: 3\n")

    with pytest.raises(ConfigError) as caught:
        load_recipe(path)

    assert "format" in caught.value.message
    assert "sed" in caught.value.message
    assert "experts" in caught.value.message


def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    folder = write_sets(tmp_path)
    (folder / "advbench").mkdir()
    (folder / "advbench/advbench.jsonl").write_text('{"prompt": "a", "split": "eval"}\n{oops\n')

    with pytest.raises(DataError, match=r"advbench\.jsonl:2"):
        read_set(folder, "advbench", "eval")


def test_nothing_is_learned_from_rows_whose_prompt_is_an_eval_prompt(data: Path, tmp_path: Path) -> None:
    copied = write_sets(tmp_path)
    prompt = draw([share("dolly")], copied, seed=1)[0].prompt
    (copied / "advbench").mkdir()
    (copied / "advbench/advbench.jsonl").write_text(json.dumps({"prompt": prompt.upper(), "split": "eval"}) + "\n")
    _eval_rows.cache_clear()
    _eval_prompts.cache_clear()

    rows = {e.prompt: e for e in draw([share("dolly")], copied, seed=1)}

    assert not rows[prompt].needs
    assert not rows[prompt].outcomes
    assert sum(not e.needs for e in rows.values()) == 1


def test_answer_side_sets_are_never_read_by_their_prompts(trained: Workshop) -> None:
    readings = read_all(trained, calibration_examples(trained), *_reader(trained))

    assert any(r.example.answer_side for r in readings["both"])
    assert not any(r.example.answer_side for r in readings["prompt"])
    assert not any(e.needs for e in draw([share("jailjudge_mini")], trained.data, split="calibrate", seed=1))
