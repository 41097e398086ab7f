"""Several processes that train one expert together, as accelerate's launcher starts them; one where none was launched.

Each process takes its share of every batch and divides its losses by the whole batch's counts, so the processes'
gradients sum up to the batch's, and the result is what one process alone comes to, up to rounding. Only the main
process writes and tells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from hhh_router.errors import MissingExtra, SettingsError

if TYPE_CHECKING:
    from accelerate import Accelerator

_LONGEST_WAIT = timedelta(hours=6)  # for the backbone's replies, which the main process writes; torch waits 10 minutes

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process and those it trains with."""

    number: int = 0
    """Of this process, from 0."""
    count: int = 1
    """How many there are."""
    accelerator: Accelerator | None = None
    """How they reach each other; None for one process."""

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and tells progress."""
        return self.number == 0

    def share(self, rows: Sequence[_T]) -> list[_T]:
        """This process's rows of a batch.

        >>> Processes(1, 3).share("abcdefgh")
        ['b', 'e', 'h']
        """
        return list(rows[self.number :: self.count])

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over all processes, in one exchange; the tensors themselves for one process."""
        if self.accelerator is None:
            return list(tensors)
        flat = self.accelerator.reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
        return [s.view_as(t) for s, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    def main_first(self) -> AbstractContextManager[None]:
        """The main process passes the block first, and the others find what it has written."""
        return nullcontext() if self.accelerator is None else self.accelerator.main_process_first()


ALONE = Processes()


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)  # set by accelerate and torchrun alike


def join(device: str) -> Processes:
    """Meet the processes that were launched with this one.

    Args:
        device: torch device the backbone will be on; decides how gradients travel.

    Raises:
        MissingExtra: Several were launched and accelerate is not installed.
    """
    if launched() == 1:
        return ALONE
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise MissingExtra("train", needed_for="training in several processes") from error
    waits = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[waits])
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)


def place(device: str) -> str:
    """The torch device of this process: with several processes on GPUs, one GPU each."""
    if launched() > 1 and device.partition(":")[0] == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def refuse_several(stage: str) -> None:
    """Stop a stage whose work is not shared, before several processes write the same files.

    Raises:
        SettingsError: Several processes were launched.
    """
    if (count := launched()) > 1:
        raise SettingsError(
            f"{stage} runs in one process, {count} were launched (WORLD_SIZE)",
            hint="start it without accelerate launch; train experts alone shares its work",
        )
