"""``bundle verify`` on a bundle with real weights: each way it can be damaged is found, named, and ends with exit 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hhh_router.bundle import MANIFEST, Bundle, file_sha256
from hhh_router.cli.main import app
from hhh_router.model.inspect import bundle_mistakes

pytestmark = pytest.mark.integration


def verify(root: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["bundle", "verify", str(root), *arguments])


def rewrite(root: Path, change: Callable[[dict[str, Any]], None], *, name: str = MANIFEST) -> None:
    content = json.loads((root / name).read_text())
    change(content)
    (root / name).write_text(json.dumps(content))


def rehash(root: Path) -> None:
    """Make the manifest agree with the files again, so that only what is inside them is wrong."""

    def update(manifest: dict[str, Any]) -> None:
        for spec in manifest["experts"].values():
            spec["sha256"] = file_sha256(root / spec["path"] / "adapter_model.safetensors")
        for part in ("heads", "calibrators"):
            manifest[part]["sha256"] = file_sha256(root / manifest[part]["path"])

    rewrite(root, update)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def test_a_whole_bundle_has_no_mistakes(any_tiny: Bundle) -> None:
    assert bundle_mistakes(any_tiny) == []
    assert verify(any_tiny.root).exit_code == 0


def test_verify_as_json_names_the_bundle(tiny: Bundle) -> None:
    found = json.loads(verify(tiny.root, "--json").stdout)

    assert found == {"name": "tiny-llama", "path": str(tiny.root), "sha256": tiny.sha256, "mistakes": []}


def test_every_mistake_is_listed_and_the_exit_code_is_2(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "heads.safetensors").unlink()
    (copy_of_tiny / "experts" / "honest" / "adapter_config.json").write_text("{")
    (copy_of_tiny / "experts" / "helpful" / "adapter_model.bin").write_bytes(b"pickle")

    result = verify(copy_of_tiny)

    assert result.exit_code == 2
    for part in ("heads.safetensors: missing", "honest/adapter_config.json: cannot be read", "pickles can run code"):
        assert part in result.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_in_an_expert_is_found(copy_of_tiny: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors, "lora_B")][0, 0] = value

    edit_tensors(copy_of_tiny / "experts" / "harmless" / "adapter_model.safetensors", spoil)
    rehash(copy_of_tiny)

    result = verify(copy_of_tiny)

    assert result.exit_code == 2
    assert "holds NaN or infinity" in result.stderr
    assert "harmless" in result.stderr


def edit_heads(root: Path, value: float) -> None:
    path = root / "heads.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["out.bias"][0] = value
    save_file(tensors, path, metadata=metadata)
    rehash(root)


def test_nan_in_the_heads_is_found(copy_of_tiny: Path) -> None:
    edit_heads(copy_of_tiny, float("nan"))

    mistakes = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert any("heads.safetensors: holds NaN" in m for m in mistakes)


def test_an_expert_of_another_rank_is_found(copy_of_tiny: Path) -> None:
    rewrite(copy_of_tiny, lambda manifest: manifest["experts"]["helpful"].update(rank=8))

    assert any("has rank 3, the manifest says 8" in m for m in bundle_mistakes(Bundle.load(copy_of_tiny)))


def test_an_expert_of_another_scale_is_found(copy_of_tiny: Path) -> None:
    rewrite(
        copy_of_tiny / "experts" / "helpful", lambda config: config.update(lora_alpha=99), name="adapter_config.json"
    )

    (mistake,) = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert "scale 33, the manifest says" in mistake


def test_an_expert_below_the_adapted_layers_is_found(copy_of_tiny: Path) -> None:
    def lower(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.2." in n]:
            tensors[name.replace(".layers.2.", ".layers.0.")] = tensors.pop(name)

    edit_tensors(copy_of_tiny / "experts" / "helpful" / "adapter_model.safetensors", lower)
    rehash(copy_of_tiny)

    mistakes = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert mistakes
    assert all("is outside the adapted layers 2 to 3" in m for m in mistakes)


def test_an_expert_of_another_width_is_found(copy_of_tiny: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, "q_proj.lora_A")
        tensors[name] = tensors[name][:, :16].contiguous()

    edit_tensors(copy_of_tiny / "experts" / "helpful" / "adapter_model.safetensors", narrow)
    rehash(copy_of_tiny)

    (mistake,) = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert "reads 16 numbers, the backbone's states have 32" in mistake


def test_a_truncated_expert_is_found(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "experts" / "helpful" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    rehash(copy_of_tiny)

    assert any("not readable as safetensors" in m for m in bundle_mistakes(Bundle.load(copy_of_tiny)))


def test_calibrators_fitted_for_other_heads_are_found(copy_of_tiny: Path) -> None:
    edit_heads(copy_of_tiny, 1.0)

    (mistake,) = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert "heads_sha256: fitted for" in mistake


def test_calibrators_changed_after_fitting_are_found(copy_of_tiny: Path) -> None:
    rewrite(copy_of_tiny, lambda file: file.update(heads_sha256="0" * 64), name="calibrators.json")
    rehash(copy_of_tiny)

    (mistake,) = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert "it was changed after fitting" in mistake


def test_heads_that_read_above_the_adapted_layer_are_found(copy_of_tiny: Path) -> None:
    rewrite(copy_of_tiny, lambda manifest: manifest["heads"].update(read_layers=[3]))

    assert any("heads read layer 3" in m for m in bundle_mistakes(Bundle.load(copy_of_tiny)))


def test_heads_with_other_names_are_found(copy_of_tiny: Path) -> None:
    rewrite(copy_of_tiny, lambda manifest: manifest["heads"].update(needs=["harmless"]))

    assert any("needs are helpful, harmless, honest" in m for m in bundle_mistakes(Bundle.load(copy_of_tiny)))


def test_a_path_that_leaves_the_bundle_is_refused_and_not_opened(copy_of_tiny: Path) -> None:
    rewrite(copy_of_tiny, lambda manifest: manifest["experts"]["helpful"].update(path="../../elsewhere"))

    (mistake,) = bundle_mistakes(Bundle.load(copy_of_tiny))

    assert "points outside the bundle" in mistake


def test_a_bundle_without_heads_or_calibrators_says_what_to_run(copy_of_tiny: Path) -> None:
    rewrite(copy_of_tiny, lambda manifest: manifest.update(heads=None, calibrators=None))

    mistakes = "\n".join(bundle_mistakes(Bundle.load(copy_of_tiny)))

    assert "hhh-router train router" in mistakes
    assert "hhh-router calibrate" in mistakes
