"""The files in ``deploy/`` name what there is: settings, options, paths, probes and limits of this very code."""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer

from hhh_router.cli.main import app as commands
from hhh_router.interfaces.proxy.app import PREFIX
from hhh_router.interfaces.proxy.config import parse_proxy_file
from hhh_router.interfaces.proxy.run import CUT_S
from hhh_router.interfaces.server.endpoints import ENDPOINTS
from hhh_router.interfaces.server.run import GRACE_S
from hhh_router.pipeline import PolicyStore
from hhh_router.settings import SECRETS_DIR, Settings
from tests.deployed import (
    COMPOSE,
    CONFIG,
    DEPLOY,
    MANIFESTS,
    ROOT,
    UNITS,
    Pod,
    compose,
    documents,
    image,
    pods,
    stages,
    unit,
)

FILES = sorted(p for p in DEPLOY.rglob("*") if p.is_file() and "secrets" not in p.parts and p.name != ".env")
PODS = list(pods())
SERVICES = {name: s for name, s in compose()["services"].items() if name != "app"}
TARGETS = ("tools", "serve", "proxy")
IDS = {
    "file": lambda p: str(p.relative_to(DEPLOY)),
    "pod": lambda p: p.manifest.stem,
}
CONFIG_PATH = "/etc/hhh-router"
STATE_PATH = "/var/lib/hhh-router"
PROXY = parse_proxy_file((CONFIG / "proxy.yaml").read_bytes(), source="deploy/config/proxy.yaml")
SERVED = {e.path for e in ENDPOINTS if e.method == "GET" and not e.needs_key}
LONGEST_S = {"serve": float(GRACE_S), "proxy": PROXY.drain_s + CUT_S + 5}
"""From SIGTERM to the end, at most: the sidecar also waits for its observer."""

by_pod = pytest.mark.parametrize("pod", PODS, ids=IDS["pod"])
by_unit = pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)


def options(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of them; nothing is run."""
    group = typer.main.get_command(commands)
    assert isinstance(group, typer.core.TyperGroup)
    with group.make_context("hhh-router", [], resilient_parsing=True) as outer:
        command = group.get_command(outer, arguments[0])
        assert command is not None
        return dict(command.make_context(arguments[0], arguments[1:]).params)


def started() -> list[tuple[str, list[str]]]:
    """Every command line of a server, with where it stands."""
    found = [(f"Dockerfile {t}", image(t).cmd) for t in ("serve", "proxy")]
    found += [(p.manifest.name, p.ours["args"]) for p in PODS]
    return found + [(u.name, shlex.split(unit(u)["ExecStart"][0])[1:]) for u in UNITS]


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=IDS["file"])
def test_every_setting_that_is_named_is_one(file: Path) -> None:
    known = {f"HHH_ROUTER_{name.upper()}" for name in Settings.model_fields} | set(SECRETS_DIR)

    assert set(re.findall(r"\bHHH_ROUTER_[A-Z_]+\b", file.read_text())) <= known


@pytest.mark.parametrize(("where", "arguments"), started(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_command_line_is_understood(where: str, arguments: list[str]) -> None:
    given = options(arguments)

    assert given["port"] == 8000  # what the probes ask
    for name in ("config", "policy"):
        if given.get(name):
            assert str(given[name]) in {f"{CONFIG_PATH}/{file.name}" for file in CONFIG.iterdir()}


def test_the_deployed_policy_is_one_that_a_server_carries_out() -> None:
    store = PolicyStore(CONFIG / "policy.yaml")

    assert store.default.mode == "enforce"
    assert store.default.on_error == "closed"


def test_the_deployed_proxy_file_names_what_is_mounted() -> None:
    assert PROXY.policy == f"{CONFIG_PATH}/policy.yaml"
    assert PROXY.audit.path is not None
    assert Path(PROXY.audit.path).parent == Path(STATE_PATH)


@by_pod
def test_a_config_map_holds_the_deployed_files(pod: Pod) -> None:
    for name, text in pod.config.items():
        assert text == (CONFIG / name).read_text(), name
    if pod.ours["args"][0] == "proxy":
        assert set(pod.config) == {"policy.yaml", "proxy.yaml"}


def test_the_compose_files_variables_are_those_of_the_example() -> None:
    example = re.findall(r"(?m)^(\w+)=", (DEPLOY / ".env.example").read_text())

    assert set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) == set(example)


def test_every_upstreams_key_is_handed_over_by_each_deployment() -> None:
    wanted = {u.api_key_env for u in PROXY.upstreams.values()} - {None}

    assert wanted
    assert wanted <= set(compose()["services"]["sidecar"]["secrets"])
    [proxy_unit] = [u for u in UNITS if " proxy " in unit(u)["ExecStart"][0]]
    assert wanted <= {c.split(":")[0] for c in unit(proxy_unit)["LoadCredential"]}
    for pod in PODS:
        if pod.ours["args"][0] == "proxy":
            assert all(f"--from-literal={key}=" in pod.manifest.read_text() for key in wanted)


# -- health and ends --------------------------------------------------------------------------------------------------


def probed(command: str, path: str) -> bool:
    return (path.removeprefix(PREFIX) if command == "proxy" and path.startswith(f"{PREFIX}/") else path) in SERVED and (
        (command == "proxy") == path.startswith(f"{PREFIX}/")
    )


@pytest.mark.parametrize("target", ["serve", "proxy"])
def test_an_images_health_check_asks_what_its_command_serves(target: str) -> None:
    of = image(target)

    assert of.health is not None
    assert of.health[:3] == ["python", "-IS", "/opt/hhh-router/health.py"]
    assert probed(target, of.health[3])
    assert image("tools").health is None


@by_pod
def test_a_pods_probes_ask_what_its_command_serves(pod: Pod) -> None:
    ours = pod.ours
    paths = {}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = ours[kind]
        paths[kind] = asked["httpGet"]["path"] if "httpGet" in asked else asked["exec"]["command"][-1]
        assert probed(ours["args"][0], paths[kind])
        is_loopback = options(ours["args"])["host"] == "127.0.0.1"
        assert ("exec" in asked) == is_loopback  # the kubelet asks the pod's address
    assert paths["livenessProbe"].endswith(
        "/live"
    )  # a server that drains or starts its model again is to be left alone
    assert paths["readinessProbe"].endswith("/ready")


@by_pod
def test_a_pod_may_drain_before_it_is_killed(pod: Pod) -> None:
    pause = pod.ours.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])[1]

    assert pod.spec["terminationGracePeriodSeconds"] >= int(pause) + LONGEST_S[pod.ours["args"][0]]


@pytest.mark.parametrize("name", SERVICES)
def test_a_composed_service_may_drain_before_it_is_killed(name: str) -> None:
    service = SERVICES[name]

    assert float(service["stop_grace_period"].removesuffix("s")) >= LONGEST_S[service["build"]["target"]]


@by_unit
def test_a_unit_may_drain_before_it_is_killed(path: Path) -> None:
    said = unit(path)

    assert float(said["TimeoutStopSec"][0]) >= LONGEST_S[said["ExecStart"][0].split()[1]]
    assert said["KillMode"] == ["mixed"]  # or the model's process would get the signal too


# -- what is confined -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_number_that_is_not_root(target: str) -> None:
    assert all(int(number) > 0 for number in image(target).user.split(":"))


@pytest.mark.parametrize("name", SERVICES)
def test_a_composed_service_is_confined(name: str) -> None:
    service = SERVICES[name]

    assert service["user"] == image(service["build"]["target"]).user
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert float(service["environment"]["HHH_ROUTER_THREADS"]) == service["cpus"]


def test_the_composed_app_reaches_nothing_but_what_guards_it() -> None:
    file = compose()

    assert file["services"]["app"]["networks"] == ["inside"]
    assert file["networks"]["inside"]["internal"] is True
    assert not set(file["services"]["app"].get("secrets", [])) & set(file["secrets"])


@by_pod
def test_a_pod_is_confined(pod: Pod) -> None:
    whole = pod.spec["securityContext"]

    assert whole["runAsNonRoot"] is True
    assert f"{whole['runAsUser']}:{whole['runAsGroup']}" == image("proxy").user
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.spec["automountServiceAccountToken"] is False
    for container in pod.containers:
        own = container["securityContext"]
        assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert re.search(r":[^:/]+$", container["image"])
        assert not container["image"].endswith(":latest")


@by_pod
def test_a_pod_has_as_many_threads_as_cores_and_its_secrets_as_files(pod: Pod) -> None:
    ours = pod.ours
    env = {e["name"]: e for e in ours["env"]}
    mounts = {m["name"]: m for m in ours["volumeMounts"]}
    [kept] = [v for v in pod.spec["volumes"] if "secret" in v]
    assert f"create secret generic {kept['secret']['secretName']} --from" in pod.manifest.read_text()

    limit = env["HHH_ROUTER_THREADS"]["valueFrom"]["resourceFieldRef"]
    assert limit == {"containerName": ours["name"], "resource": "limits.cpu"}
    assert ours["resources"]["limits"]["cpu"]
    assert env["HHH_ROUTER_SECRETS_DIR"]["value"] == mounts[kept["name"]]["mountPath"]
    assert mounts["config"]["mountPath"] == CONFIG_PATH
    assert "subPath" not in mounts["config"]  # or a changed policy would never arrive
    others = [c for c in pod.containers if c is not ours]
    assert all(kept["name"] not in {m["name"] for m in c.get("volumeMounts", [])} for c in others)
    if ours["args"][0] == "proxy":
        assert STATE_PATH in {m["mountPath"] for m in mounts.values()}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.stem)
def test_what_selects_pods_selects_those_of_the_manifest(manifest: Path) -> None:
    found = documents(manifest)
    [workload] = [d for d in found if d["kind"] in ("Deployment", "StatefulSet")]
    template = workload["spec"]["template"]
    ports = {p["name"] for c in template["spec"]["containers"] for p in c.get("ports", [])}
    selecting = {"Service": ("selector",), "NetworkPolicy": ("podSelector", "matchLabels")}
    selecting |= dict.fromkeys(("Deployment", "StatefulSet", "PodDisruptionBudget"), ("selector", "matchLabels"))

    kinds = {d["kind"] for d in found}
    assert {"ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget"} <= kinds
    for document in found:
        labels = document["spec"] if document["kind"] in selecting else {}
        for key in selecting.get(document["kind"], ()):
            labels = labels[key]
        assert labels.items() <= template["metadata"]["labels"].items(), document["kind"]
        if document["kind"] == "Service":
            assert {p["targetPort"] for p in document["spec"]["ports"]} <= ports
    maps = {v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v}
    assert maps == {d["metadata"]["name"] for d in found if d["kind"] == "ConfigMap"}


@by_unit
def test_a_unit_is_confined(path: Path) -> None:
    said = unit(path)

    for key in ("DynamicUser", "NoNewPrivileges", "PrivateDevices", "PrivateTmp", "ProtectHome", "RestrictNamespaces"):
        assert said[key] == ["yes"], key
    assert said["ProtectSystem"] == ["strict"]
    assert said["CapabilityBoundingSet"] == [""]
    assert said["StateDirectory"] == [Path(STATE_PATH).name]
    assert "--host 127.0.0.1" in said["ExecStart"][0]


def test_the_units_are_confined_alike() -> None:
    one, other = (u.read_text().split("DynamicUser=yes\n")[1] for u in UNITS)

    assert one == other


# -- the build --------------------------------------------------------------------------------------------------------


def copied() -> list[str]:
    """What the Dockerfile takes from the repository."""
    found: list[str] = []
    for stage in stages().values():
        for instruction, rest in stage.lines:
            if instruction == "COPY" and not rest.startswith("--from="):
                found += rest.split()[:-1]
    return found


def test_the_build_takes_only_what_its_context_lets_through() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    allowed = {line[1:] for line in lines if line.startswith("!")}

    assert lines[0] == "*"
    assert set(copied()) == allowed
    assert all((ROOT / path).exists() for path in copied())
    assert not any(fnmatch(path, "*research*") for path in copied())  # not for commercial use


def test_every_installation_is_pinned_and_no_stage_holds_a_secret() -> None:
    for name, stage in stages().items():
        for instruction, rest in stage.lines:
            if "pip install" in rest:
                assert "--constraint constraints.txt" in rest, name
            if instruction in ("ARG", "ENV"):
                assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", rest), name


def test_what_runs_has_neither_the_builds_tools_nor_root() -> None:
    built = stages()

    for target in TARGETS:
        assert built[target].base == "runtime"
        instructions = [i for i, _ in built[target].lines]
        assert not {"USER", "RUN"} & set(instructions)
    assert built["runtime"].base.startswith("python:")
