"""How an episode advances by one token or one denoising step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from unigrpo_env.mdp.rules import Phase, Role, Rules
from unigrpo_env.mdp.state import EpisodeState


@dataclass(frozen=True)
class ActingRows:
    """The rows that act in a step, as int64 indices.

    Attributes:
        text: rows that write a token.
        image: rows that take a denoising step.
    """

    text: Tensor
    image: Tensor


def split_by_phase(state: EpisodeState, active: Tensor) -> ActingRows:
    """Split the `active` rows (`[N]` bool) by what they wait for.

    Args:
        state: N episodes.
        active: which of them act.

    Raises:
        ValueError: no such mask, or an active row that has ended.
    """
    expected = state.phase.shape
    if active.shape != expected or active.dtype != torch.bool:
        raise ValueError(
            f"expected active of shape {list(expected)} and dtype bool, "
            f"got {list(active.shape)} and {active.dtype}"
        )
    acting = int(active.count_nonzero())
    # [rows] int64 indices, like `image` below.
    text = (active & (state.phase == Phase.TEXT)).nonzero()[:, 0]
    # Often all rows are in one phase. Then the second search is not needed.
    image = text[:0]
    if len(text) < acting:
        image = (active & (state.phase == Phase.IMAGE)).nonzero()[:, 0]
    if len(text) + len(image) != acting:
        ended = (active & (state.phase == Phase.DONE)).nonzero()[:, 0].tolist()
        # A large batch would fill the screen.
        shown = str(ended)
        if len(ended) > 8:
            shown = f"{ended[:8]} and {len(ended) - 8} more"
        raise ValueError(
            f"episodes {shown} have ended or not begun; reset them, leave them out with the "
            "`active` mask, or make the env with inactive='ignore'"
        )
    return ActingRows(text, image)


Reply = Callable[[Tensor], None]
"""Called with the rows (int64) that have drawn an image and may go on, to set their `turns`."""
View = Callable[[Tensor], Tensor]
"""Finished latents `[n, L, C]` to what a vision encoder sees, `[n, 3, height, width]` uint8."""


def transition(
    state: EpisodeState,
    rules: Rules,
    token: Tensor,
    next_latent: Tensor,
    acting: ActingRows,
    reply: Reply | None = None,
    view: View | None = None,
) -> Tensor:
    """Advance every acting row by one step, in place; the action must fit (`check_action`).

    Text: the token is appended. An opening token, or the last of the budget, opens the image; where
    no image is left it ends the episode. Image: the latent becomes `next_latent`, and t moves to
    the next grid point. At t = 0 the image is drawn, and the episode ends or goes on with text.

    Args:
        state: N episodes.
        rules: what they may do.
        token: `[N]` int64, read where a row is in the text phase.
        next_latent: `[N, L, C]` float32, read where a row is in the image phase.
        acting: which rows act; the others stay as they are.
        reply: sets what the env writes after an image, before the rows that drew one go on.
        view: shows a drawn image to a vision encoder; None for a model without one.

    Returns:
        The rows that ended in this step, int64 indices, rising.
    """
    ended = acting.text[:0]
    if len(acting.text):
        ended = _append_token(state, rules, token.index_select(0, acting.text), acting.text)
    if len(acting.image):
        drawn = _take_step(state, rules, next_latent, acting.image)
        if len(drawn):
            finished = _after_image(state, rules, drawn, reply, view)
            ended = torch.cat([ended, finished]).sort().values
    # A row ends at one place, whichever phase it was in.
    if len(ended):
        state.phase[ended] = Phase.DONE
        state.legal_tokens[state.on_device(ended)] = state.on_device(rules.idle_tokens())
    return ended


def _append_token(state: EpisodeState, rules: Rules, token: Tensor, rows: Tensor) -> Tensor:
    """Append a token to each of `rows` (`token` has one each); returns those that it ended."""
    position = state.num_tokens.index_select(0, rows)
    sampled = state.sampled.index_select(0, rows).add_(1)
    state.tokens[rows, position] = token
    state.num_tokens.index_copy_(0, rows, position + 1)
    state.sampled.index_copy_(0, rows, sampled)
    drawn = state.images_drawn.index_select(0, rows)
    # `closes`, `spent`, `ends` and `in_last_text` are masks of `rows`: [rows] bool.
    closes = token == rules.open_image_id
    may_have_last_text = rules.rounds > rules.image_budget
    if may_have_last_text:
        # In a last text that `end_id` closes, an opening token is not legal and does nothing.
        closes &= rules.may_close(drawn)
    spent = (sampled >= rules.text_budget) & ~closes
    ended = rows[:0]
    if rules.end_id is not None:
        # An `end_id` that is not legal is appended and does nothing else.
        ends = (token == rules.end_id) & rules.may_end(drawn)
        ended = rows[ends]
        closes &= ~ends
        spent &= ~ends
    if may_have_last_text:
        # No image follows the last text, so whatever closes it ends the episode.
        in_last_text = drawn >= rules.image_budget
        closed = rows[in_last_text & (closes | spent)]
        ended = torch.cat([ended, closed]).sort().values
        closes &= ~in_last_text
        spent &= ~in_last_text
    if spent.any():
        # The env itself writes the token that opens the image; `max_tokens` has room for it.
        forced = rows[spent]
        state.tokens[forced, position[spent] + 1] = rules.open_image_id
        state.num_tokens[forced] += 1
        closes |= spent
    if closes.any():
        state.open_image(rows[closes], rules)
    return ended


def _take_step(state: EpisodeState, rules: Rules, next_latent: Tensor, rows: Tensor) -> Tensor:
    """Make the action the latent of each of `rows`; returns those whose image is drawn."""
    # Where every row draws, one copy is faster than an indexed write.
    if len(rows) == len(next_latent):
        state.latent.copy_(next_latent)
    else:
        place = state.on_device(rows)
        state.latent[place] = next_latent[place].to(state.latent.dtype)
    step = state.step.index_select(0, rows).add_(1)
    state.step.index_copy_(0, rows, step)
    drawn = rows[step == rules.image_steps]
    if len(drawn):
        state.images_drawn[drawn] += 1
    return drawn


def _after_image(
    state: EpisodeState, rules: Rules, drawn: Tensor, reply: Reply | None, view: View | None
) -> Tensor:
    """Let the rows that drew an image go on with text; returns those that end instead."""
    if rules.rounds == 1:
        return drawn
    goes_on = state.images_drawn[drawn] < rules.rounds
    if rules.turn_budget and goes_on.any():
        if reply is not None:
            reply(drawn[goes_on])
        # A user without a turn ends the episode. The clamp keeps the index of finished rows, which
        # have no turn to come, inside `turn_lengths`.
        number = (state.images_drawn[drawn] - 1).clamp(max=rules.rounds - 2)
        goes_on &= state.turn_lengths[drawn, number] > 0
    if goes_on.any():
        _continue(state, rules, drawn[goes_on], view)
    return drawn[~goes_on]


def _continue(state: EpisodeState, rules: Rules, rows: Tensor, view: View | None) -> None:
    """Put the drawn image of `rows` into the stream, write the turn, and open the next round."""
    # [rows] int64 each: the number of the image just drawn, its slot behind the sources, and where
    # the next token goes.
    number = state.images_drawn[rows] - 1
    slot = rules.source_images + number
    position = state.num_tokens[rows]
    place = state.on_device(rows)
    device_slot = state.on_device(slot)
    latents = state.latent[place]
    state.images[place, device_slot] = latents
    if view is not None:
        state.pixels[place, device_slot] = view(latents)
    state.image_positions[rows, slot] = position
    state.tokens[rows, position] = cast(int, rules.image_id)
    position = position + 1
    lengths = state.turn_lengths[rows, number]
    slots = torch.arange(rules.turn_slots)
    # [rows, turn_slots] bool: turns differ in length, so they are written token by token.
    is_written = slots < lengths[:, None]
    row, column = is_written.nonzero(as_tuple=True)
    written = rows[row], position[row] + column
    state.tokens[written] = state.turns[rows, number][is_written]
    if rules.turn_budget:
        # The user's words; behind them stands what opens the next thought.
        is_user = column < lengths[row] - rules.opening_length
        state.roles[written] = torch.where(is_user, int(Role.USER), int(Role.MODEL))
    position = position + lengths
    state.num_tokens[rows] = position
    state.round_starts[rows, number + 1] = position
    state.sampled[rows] = 0
    state.phase[rows] = Phase.TEXT
    # [rounds, vocab_size]
    legal = rules.legal_by_round()
    state.legal_tokens[place] = state.on_device(legal[number + 1])
    # Without a thought the next image opens at once.
    if rules.text_budget == 0:
        state.open_image(rows, rules)
