"""Policies from files: the shipped ones by name, anyone's by path."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import resources
from pathlib import Path

from hhh_router.errors import PolicyError
from hhh_router.policy.check import policy_from_tree
from hhh_router.policy.schema import Policy
from hhh_router.policy.tree import MAX_BYTES, Mistake, Node, Place, Scalar, Table, merge, read_tree, shorten, show
from hhh_router.policy.values import did_you_mean

_SUFFIXES = (".yaml", ".yml")


def list_policies() -> list[str]:
    """Names of the shipped policies."""
    folder = resources.files("hhh_router.policies")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def list_library() -> list[str]:
    """Names of the policies for one kind of use each, to start from. They are fitted to the default bundle."""
    folder = resources.files("hhh_router.policies").joinpath("library")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_policy(source: str | Path) -> Policy:
    """Load and check a policy.

    Args:
        source: Name of a shipped policy, or the path of a YAML file.

    Raises:
        PolicyError: No such policy, or the file has mistakes; the message has one line for each.
    """
    path = policy_path(source)
    return parse_policy(_read(path), source=str(path), folder=path.parent)


def policy_path(source: str | Path) -> Path:
    """The file of a policy.

    Raises:
        PolicyError: A name that no shipped policy has.
    """
    if isinstance(source, str) and source in list_policies():
        return _shipped(source)
    if isinstance(source, str) and source in list_library():
        return _shipped(f"library/{source}")
    if isinstance(source, Path) or os.sep in source or source.endswith(_SUFFIXES) or _is_file(source):
        return Path(source)
    names = [*list_policies(), *list_library()]
    raise PolicyError(
        f"policy {shorten(source)} not found: no shipped policy has that name{did_you_mean(source, names)}",
        hint=f"use {', '.join(names)}, or the path of a YAML file",
    )


def parse_policy(raw: bytes | str, *, source: str = "policy.yaml", folder: Path | None = None) -> Policy:
    """Check a policy's text.

    Args:
        raw: YAML.
        source: Its file name in messages.
        folder: Where ``extends`` looks for files; None allows shipped names only.

    Raises:
        PolicyError: One line for each mistake, as ``file:line  path: what was found; what was meant``.
    """
    mistakes: list[Mistake] = []
    files = [source]
    root = read_tree(_as_bytes(raw), source, mistakes)
    if isinstance(root, Table) and "extends" in root.entries:
        root = _extended(root, folder, mistakes, files)
    policy = None if root is None else policy_from_tree(root, source=source, mistakes=mistakes)
    if policy is None:
        ordered = sorted(dict.fromkeys(mistakes), key=lambda m: (m.place.file != source, m.place.file, m.place.line))
        raise PolicyError(
            "\n".join(map(str, ordered)),
            hint="correct the file; docs/policies.md explains each key, hhh-router policy validate FILE checks it",
        )
    return replace(policy, files=tuple(files))


def _extended(child: Table, folder: Path | None, mistakes: list[Mistake], files: list[str]) -> Node | None:
    """The child laid over its parent, whose file is noted; None when there is no such parent, which is reported."""
    own = Table(child.place, {k: v for k, v in child.entries.items() if k != "extends"}, child.keys)
    node = child.entries["extends"]
    path = _parent_path(node, folder)
    if path is None:
        _wrong(mistakes, node.place, f"{show(node)} is no policy; use {', '.join(list_policies())}, or a .yaml file")
        return None
    try:
        raw = _read(path)
    except PolicyError as error:
        _wrong(mistakes, node.place, f"{show(node)}: {error.message.split('file: ')[-1]}")
        return None
    files.append(str(path))
    parent = read_tree(raw, str(path), mistakes)
    if isinstance(parent, Table) and "extends" in parent.entries:
        _wrong(mistakes, node.place, f"{show(node)} itself extends another; one level is meant")
        return None
    if not isinstance(parent, Table):
        if parent is not None:
            _wrong(mistakes, node.place, f"{show(node)} is no mapping; a policy is meant")
        return None
    # a version and a name belong to one file: a child that kept its parent's could not be told apart in a trace. So do
    # a budget, what was fitted to it, and what was expected of it
    own_only = ("version", "name", "description", "budget", "lock", "examples")
    inherited = {k: v for k, v in parent.entries.items() if k not in own_only}
    return merge(Table(parent.place, inherited, parent.keys), own)


def _parent_path(node: Node, folder: Path | None) -> Path | None:
    if not isinstance(node, Scalar) or not node.text or not node.text.isprintable():
        return None
    if node.text in list_policies():
        return _shipped(node.text)
    return folder / node.text if folder is not None and node.text.endswith(_SUFFIXES) else None


def _wrong(mistakes: list[Mistake], place: Place, text: str) -> None:
    mistakes.append(Mistake(place, "extends", text))


def _shipped(name: str) -> Path:
    return Path(str(resources.files("hhh_router.policies").joinpath(f"{name}.yaml")))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False


def _read(path: Path) -> bytes:
    """The file, cut just beyond the largest size a policy may have.

    Raises:
        PolicyError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PolicyError(f"{path}:1  file: cannot be read ({why}); a policy in YAML is meant") from error


def _as_bytes(raw: bytes | str) -> bytes:
    # a lone surrogate in a str becomes bytes that are no UTF-8, and is then reported like any other
    return raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
