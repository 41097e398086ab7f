"""A bundle for another backbone: its recipe, a whole run on tiny random models, and several processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hhh_router.bundle import Bundle, file_sha256
from hhh_router.cli.main import app
from hhh_router.errors import BundleError, ConfigError, SettingsError
from hhh_router.interfaces.sdk import HHHRouter
from hhh_router.model.fetch import DEFAULT_SHA256, DEFAULT_SOURCE
from hhh_router.settings import Settings
from hhh_router.testing.tiny import tiny_bundle
from hhh_router.training.build import Workshop, train_experts, train_router
from hhh_router.training.calibrate import calibrate
from hhh_router.training.experts import _losses, train_expert
from hhh_router.training.lessons import lessons
from hhh_router.training.own_backbone import write_recipe
from hhh_router.training.processes import Processes, place, refuse_several
from hhh_router.training.recipe import Share, load_recipe

from .conftest import FAMILIES
from .datasets import RECIPE, write_sets

pytestmark = pytest.mark.integration

LIKE = RECIPE.replace("epochs: 25", "epochs: 3")
PAIRED = (Share(set="red_instruct", reply="refusal", against="backbone"), Share(set="dolly", rows=20))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def like(tiny: Bundle, tmp_path: Path) -> Path:
    """A recipe that is there already, of another backbone than the one that is asked for."""
    backbone = tiny.root / "backbone"
    path = tmp_path / "like.yaml"
    path.write_text(LIKE.format(backbone=backbone, sha256=file_sha256(backbone / "model.safetensors")))
    return path


def make_shop(recipe: Path, data: Path, folder: Path) -> Workshop:
    loaded, sha256 = load_recipe(recipe)
    return Workshop(
        recipe=loaded,
        recipe_file=recipe.name,
        recipe_sha256=sha256,
        data=data,
        bundle=folder / "bundle",
        work=folder / "work",
        cache_dir=folder / "cache",
        threads=1,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_another_backbone_goes_from_its_source_to_a_bundle_that_answers(
    family: str, like: Path, data: Path, tmp_path: Path
) -> None:
    config = {k: v for k, v in FAMILIES[family].items() if k != "max_window_layers"}
    other = tiny_bundle(tmp_path / "other", family=family, seed=3, num_hidden_layers=8, hidden_size=24, **config)
    out = tmp_path / "own.yaml"
    asked = ["train", "recipe", "--backbone", f"path:{other.root / 'backbone'}", "--name", "own", "--licence", "MIT"]

    said = CliRunner().invoke(app, [*asked, "--like", str(like), "--out", str(out)], catch_exceptions=False)
    shop = make_shop(out, data, tmp_path)
    train_experts(shop)
    train_router(shop)
    calibrate(shop)
    bundle = Bundle.load(shop.bundle)
    bundle.verify()
    with HHHRouter(bundle=bundle.root, cache_dir=shop.cache_dir, threads=1) as router:
        result = router.chat("How do I paint a boat?", max_tokens=5)

    assert f"{family}, 8 layers of width 24" in said.output
    assert bundle.manifest.backbone.architecture == family
    assert bundle.manifest.backbone.licence == "MIT"
    assert bundle.manifest.heads is not None
    assert (bundle.manifest.first_adapted_layer, bundle.manifest.heads.read_layers) == (4, (2, 3, 4))
    assert result.metadata.calibration.calibrated
    assert result.metadata.bundle.name == "own"


def test_a_recipe_says_what_differs_and_names_its_base_for_the_rest(tiny: Bundle, like: Path, tmp_path: Path) -> None:
    backbone = tiny.root / "backbone"
    out = tmp_path / "deeper" / "own.yaml"

    made = write_recipe(f"path:{backbone}", "own", like, out, tmp_path)

    base, _ = load_recipe(like)
    assert len(out.read_text().splitlines()) < 40
    assert made.router.mix == base.router.mix
    assert made.experts.mixes == base.experts.mixes
    assert made.experts.target_modules == ("q_proj", "down_proj")
    assert (made.experts.rank, made.first_adapted_layer, made.router.read_layers) == (10, 2, (1, 2))
    assert made.backbone.sha256 == file_sha256(backbone / "model.safetensors")
    assert (made.backbone.dtype, made.backbone.licence) == ("float32", "unknown")


def test_weights_in_several_files_are_not_pinned_by_one_hash(tiny: Bundle, like: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny.root / "backbone", sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tiny.root / "backbone")
    model.save_pretrained(sharded, max_shard_size="50KB")

    made = write_recipe(f"path:{sharded}", "own", like, tmp_path / "own.yaml", tmp_path)

    assert (sharded / "model.safetensors.index.json").is_file()
    assert made.backbone.sha256 is None
    assert made.experts.target_modules == ("q_proj", "down_proj")


def test_the_default_source_is_known_without_a_hash_of_it(like: Path, tmp_path: Path) -> None:
    made = write_recipe(DEFAULT_SOURCE, "own", like, tmp_path / "own.yaml", Settings.load().cache_dir)

    assert (made.backbone.layers, made.backbone.hidden_size, made.backbone.sha256) == (30, 576, DEFAULT_SHA256)
    assert (made.first_adapted_layer, made.router.read_layers) == (15, (8, 11, 15))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:org/name", "names no revision"),
        ("wheel:some-model==1.0/some/model.gguf", "has to be pinned"),
        ("gguf:nowhere.gguf", "no such file"),
        ("path:nowhere", "no such folder"),
        ("org/name", "is not understood"),
    ],
)
def test_a_source_that_cannot_be_had_or_is_not_pinned_is_refused(
    source: str, message: str, like: Path, tmp_path: Path
) -> None:
    out = tmp_path / "own.yaml"

    with pytest.raises(BundleError, match=message):
        write_recipe(source, "own", like, out, tmp_path)

    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"model_type": "gpt2"}, "family 'gpt2' is not supported"), ({"num_hidden_layers": None}, "layers")],
)
def test_a_backbone_that_cannot_be_trained_is_refused(
    changed: Mapping[str, object], message: str, tiny: Bundle, like: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny.root / "backbone", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    out = tmp_path / "own.yaml"

    with pytest.raises(ConfigError, match=message):
        write_recipe(f"path:{folder}", "own", like, out, tmp_path)

    assert not out.exists()


def test_a_backbone_without_a_chat_template_is_refused(tiny: Bundle, like: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny.root / "backbone", folder, ignore=shutil.ignore_patterns("chat_template.jinja"))

    with pytest.raises(BundleError, match="no chat template"):
        write_recipe(f"path:{folder}", "own", like, tmp_path / "own.yaml", tmp_path)


def test_a_recipe_that_is_there_is_not_overwritten(tiny: Bundle, like: Path, tmp_path: Path) -> None:
    before = like.read_bytes()

    with pytest.raises(ConfigError, match="already there"):
        write_recipe(f"path:{tiny.root / 'backbone'}", "own", like, like, tmp_path)

    assert like.read_bytes() == before


def test_shares_of_a_batch_add_up_to_its_figures_and_gradients(like: Path, data: Path, tmp_path: Path) -> None:
    shop = make_shop(like, data, tmp_path)
    backbone, plan = shop.backbone(), shop.recipe.experts
    batch = lessons(PAIRED, plan, backbone, data, seed=1, folder=tmp_path)[56:65]  # paired and single ones
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], layers_to_transform=[2, 3])
    config.init_lora_weights = False
    # in float64, so that the order of the sums, which a CPU chooses, shows in nothing that is compared
    model = get_peft_model(backbone.stack.model.double(), config)

    def run(shares: list[list]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[type-arg]
        model.zero_grad()
        figures = torch.zeros(3, dtype=torch.float64)
        for share in shares:
            found = _losses(model, backbone.stack, share, plan, whole=batch, first=2)
            found[:2].sum().backward()
            figures += found.detach()
        return figures, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    whole, expected = run([list(batch)])
    parts, found = run([Processes(i, 4).share(batch) for i in range(4)])

    assert {lesson.worse is None for lesson in batch} == {True, False}
    assert parts.tolist() == pytest.approx(whole.tolist(), rel=1e-5)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_cannot_be_shared_by_more_processes_than_it_has_rows(like: Path, data: Path, tmp_path: Path) -> None:
    shop = make_shop(like, data, tmp_path)
    backbone, plan = shop.backbone(), shop.recipe.experts
    rows = lessons(plan.mixes["helpful"], plan, backbone, data, seed=1, folder=tmp_path)

    with pytest.raises(ConfigError, match="shared by 9 processes"):
        next(train_expert("helpful", rows, backbone, shop.recipe, tmp_path, together=Processes(0, 9)))


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = place("cuda")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")

    assert alone == "cuda"
    assert place("cuda:0") == "cuda:3"
    assert place("cpu") == "cpu"


@pytest.mark.parametrize("stage", [train_router, calibrate])
def test_stages_that_share_no_work_refuse_several_processes(
    stage, like: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(SettingsError, match="2 were launched"):
        stage(make_shop(like, data, tmp_path))


def test_one_process_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")

    refuse_several("anything")


@pytest.mark.processes
def test_two_processes_come_to_what_one_comes_to(like: Path, data: Path, tmp_path: Path) -> None:
    text = like.read_text().replace(
        "harmless: [{set: red_instruct, reply: refusal}",
        "harmless: [{set: red_instruct, reply: refusal, against: backbone}",
    )
    like.write_text(text.replace("warmup_steps: 2", "warmup_steps: 2\n  own_reply_tokens: 6"))
    alone = make_shop(like, data, tmp_path / "alone")
    command = [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *(str(Path(sys.executable).with_name("hhh-router")), "train", "experts", "--recipe", str(like)),
        *("--data", str(data), "--out", str(tmp_path / "two/bundle"), "--work", str(tmp_path / "two/work")),
    ]
    environment = {**os.environ, "HHH_ROUTER_DEVICE": "cpu", "HHH_ROUTER_THREADS": "1"}

    train_experts(alone)
    ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("experts trained") == 2  # each process says it: there were two
    for dimension in ("helpful", "harmless", "honest"):
        file = f"bundle/experts/{dimension}/adapter_model.safetensors"
        one, two = load_file(tmp_path / "alone" / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert Bundle.load(tmp_path / "two/bundle").manifest.experts.keys() == {"helpful", "harmless", "honest"}
