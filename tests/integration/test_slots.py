"""Room for keys and values: rows of different lengths, joining and leaving."""

import pytest
import torch

from hhh_router.model.slots import Slots

pytestmark = pytest.mark.integration


def row(slots: Slots, tokens: int, fill: float) -> int:
    """Write a prompt of one number into a new slot."""
    slots.reserve(len(slots.lengths) + 1, tokens + 20)
    opening = slots.opening()
    for layer in (0, 1):
        opening.update(torch.full((1, 2, tokens, 3), fill), torch.full((1, 2, tokens, 3), -fill), layer)
    return slots.keep(opening)


def step(slots: Slots, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    cache = slots.step(range(len(slots.lengths)))
    new = torch.full((len(slots.lengths), 2, 1, 3), fill)
    found = cache.update(new, -new, 0)
    cache.update(new, -new, 1)
    slots.advance()
    return found


def test_a_step_writes_each_row_at_its_own_place_and_sees_all_of_it() -> None:
    slots = Slots(100_000)
    row(slots, 4, 1.0)
    row(slots, 2, 2.0)

    keys, values = step(slots, 9.0)

    assert keys.shape == (2, 2, 5, 3)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 9]
    assert keys[1, 0, :, 0].tolist() == [2, 2, 9, 0, 0]
    assert values.equal(-keys)
    assert slots.lengths == [5, 3]


def test_the_mask_hides_what_is_not_the_rows_own_and_what_lies_behind_a_window() -> None:
    slots = Slots(100_000)
    row(slots, 4, 1.0)
    row(slots, 2, 2.0)
    cache = slots.step([0, 1])
    here = torch.device("cpu")

    assert cache.visible(None, here)[:, 0, 0].tolist() == [[True] * 5, [True, True, True, False, False]]
    assert cache.visible(2, here)[:, 0, 0].tolist() == [
        [False, False, False, True, True], [False, True, True, False, False],
    ]  # fmt: skip
    assert slots.step([0]).visible(None, here) is None


def test_the_last_row_moves_into_a_slot_that_is_freed_and_nothing_stays_behind() -> None:
    slots = Slots(100_000)
    for tokens, fill in ((6, torch.nan), (3, 2.0), (2, 3.0)):
        row(slots, tokens, fill)

    assert slots.release(0) == 2

    assert slots.lengths == [2, 3]
    keys, _ = slots.store(0, torch.zeros(1, 2, 1, 3))
    assert keys[0, 0, :3, 0].tolist() == [3, 3, 0]
    assert keys[1, 0, :4, 0].tolist() == [2, 2, 2, 0]
    assert torch.isfinite(keys).all()
    assert not keys[2:].any()


def test_growing_keeps_what_is_there() -> None:
    slots = Slots(100_000)
    row(slots, 3, 1.0)
    before = slots.tokens
    slots.reserve(5, 1000)

    assert slots.tokens > before
    keys, _ = step(slots, 9.0)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 9]


def test_a_prompt_that_is_not_answered_leaves_no_trace() -> None:
    slots = Slots(100_000)
    slots.reserve(1, 10)
    opening = slots.opening()
    opening.update(torch.full((1, 2, 4, 3), 7.0), torch.full((1, 2, 4, 3), 7.0), 0)
    slots.forget(opening)

    keys, values = slots.store(0, torch.zeros(1, 2, 1, 3))
    assert not keys.any()
    assert not values.any()
    assert slots.lengths == []


def test_room_of_many_rows_lets_go_of_what_one_long_row_needed() -> None:
    slots = Slots(2000)
    slots.reserve(1, 1900)
    row(slots, 4, 1.0)

    slots.reserve(8, 100)

    assert slots.tokens <= 2000
    assert slots.store(0, torch.zeros(1, 2, 1, 3))[0][0, 0, :4, 0].tolist() == [1, 1, 1, 1]
