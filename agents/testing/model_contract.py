"""The promises of every model, see `ModelContract`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agents.models.base import UnifiedModel
from agents.models.registry import MODEL_CLASSES, load_model
from agents.testing.inputs import (
    LENGTHS,
    Inputs,
    all_equal,
    gradients_of,
    outputs_of,
    reached_weights,
    trainable_weights,
    weighted_sum,
)


class ModelContract:
    """What every model promises. Override `make_model`.

    Attributes:
        tolerance: the largest difference between two ways to compute one number in float32.
        bfloat16_tolerance: the largest difference of outputs in bfloat16 to those in float32, as a
            part of their norm.
    """

    tolerance: float = 2e-5
    bfloat16_tolerance: float = 0.05

    def make_model(self) -> UnifiedModel[Any]:
        """Return the model to test, always with the same weights.

        Raises:
            NotImplementedError: this method was not overridden.
        """
        raise NotImplementedError("return the model to test")

    def test_sizes_and_dtypes(self) -> None:
        """`vocab_size` and `latent_shape` are those of the outputs, of float32 weights here."""
        model = self.make_model()
        inputs = Inputs(model)
        context = model.empty_context(3)
        assert context.batch_size == 3
        logits, context = model.append_text(context, inputs.ids(3, 4))
        assert logits.shape == (3, 4, model.vocab_size)
        assert logits.dtype == torch.float32
        assert context.batch_size == 3
        x = inputs.latent(3)
        velocity = model.predict_velocity(context, x, inputs.times(3))
        assert velocity.shape == x.shape
        assert velocity.dtype == torch.float32

    def test_cache_is_training_forward(self) -> None:
        """Token by token without gradient gives what one call with gradient gives."""
        model = self.make_model()
        inputs = Inputs(model)
        ids = inputs.ids(2, 5)
        x = inputs.latent(2)
        t = inputs.times(2)
        with torch.enable_grad():
            # [2, 5, V]
            expected, context = model.append_text(model.empty_context(2), ids)
            expected_velocity = model.predict_velocity(context, x, t)
        with torch.no_grad():
            context = model.empty_context(2)
            for position in range(ids.shape[1]):
                logits, context = model.append_text(context, ids[:, position : position + 1])
                self._assert_close(logits[:, 0], expected[:, position])
            self._assert_close(model.predict_velocity(context, x, t), expected_velocity)

    def test_hidden_states_give_the_logits(self) -> None:
        """`compute_logits` makes the logits of `append_text` of what `append_hidden` gives."""
        model = self.make_model()
        inputs = Inputs(model)
        ids, mask = inputs.ragged()
        more = inputs.ids(len(ids), 2)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                expected, context = model.append_text(model.empty_context(len(ids)), ids, mask)
                expected_later, _ = model.append_text(context, more)
                hidden, context = model.append_hidden(model.empty_context(len(ids)), ids, mask)
                later, _ = model.append_text(context, more)
                # Some of the states, in another shape.
                self._assert_close(model.compute_logits(hidden[mask]), expected[mask])
                self._assert_close(later, expected_later)

    def test_ragged_rows_are_independent(self) -> None:
        """A row of a ragged batch gives what it gives alone, and so does text after it."""
        model = self.make_model()
        inputs = Inputs(model)
        ids, mask = inputs.ragged()
        more = inputs.ids(len(ids), 2)
        x = inputs.latent(len(ids))
        t = inputs.times(len(ids))
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                logits, context = model.append_text(model.empty_context(len(ids)), ids, mask)
                velocity = model.predict_velocity(context, x, t)
                later, _ = model.append_text(context, more)
                for row, length in enumerate(LENGTHS):
                    # A slice keeps the axis of the rows.
                    one = slice(row, row + 1)
                    alone, own = model.append_text(model.empty_context(1), ids[one, :length])
                    self._assert_close(alone[0], logits[row, :length])
                    own_velocity = model.predict_velocity(own, x[one], t[one])
                    self._assert_close(own_velocity[0], velocity[row])
                    alone, _ = model.append_text(own, more[one])
                    self._assert_close(alone[0], later[row])

    def test_padding_leaves_no_trace(self) -> None:
        """Other padding tokens, or a call of padding alone, change nothing."""
        model = self.make_model()
        inputs = Inputs(model)
        ids, mask = inputs.ragged()
        more = inputs.ids(len(ids), 2)
        # The same tokens, but others where the mask is False.
        other = torch.where(mask, ids, (ids + 1) % model.vocab_size)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                logits, context = model.append_text(model.empty_context(len(ids)), ids, mask)
                expected, _ = model.append_text(context, more)
                same, context = model.append_text(model.empty_context(len(ids)), other, mask)
                self._assert_close(same[mask], logits[mask])
                _, context = model.append_text(context, more, torch.zeros_like(more).bool())
                found, _ = model.append_text(context, more)
                self._assert_close(found, expected)

    def test_select_takes_rows(self) -> None:
        """`select` takes rows in any order, with repeats, and leaves the old context whole."""
        rows = torch.tensor([2, 0, 2, 1])
        self._check_rows(rows, lambda context, rows: context.select(rows))

    def test_repeat_interleave_repeats_rows(self) -> None:
        """`repeat_interleave` gives row 0, row 0, ..., row 1, row 1, ..."""
        rows = torch.arange(3).repeat_interleave(2)
        self._check_rows(rows, lambda context, _: context.repeat_interleave(2))

    def test_detach_cuts_the_gradient(self) -> None:
        """After `detach` the gradient is that of a context which was read without gradient."""
        model = self.make_model()
        inputs = Inputs(model)
        ids = inputs.ids(2, 3)
        more = inputs.ids(2, 2)
        with torch.no_grad():
            expected_logits, without = model.append_text(model.empty_context(2), ids)
        logits, context = model.append_text(model.empty_context(2), ids)
        self._assert_close(logits, expected_logits)
        expected = gradients_of(model, weighted_sum(model.append_text(without, more)[0]))
        found = gradients_of(model, weighted_sum(model.append_text(context.detach(), more)[0]))
        self._assert_same_gradients(found, expected)

    def test_velocity_leaves_the_context(self) -> None:
        """`predict_velocity` does not change the context, so its result can be computed again."""
        model = self.make_model()
        inputs = Inputs(model)
        ids = inputs.ids(2, 3)
        more = inputs.ids(2, 2)
        x = inputs.latent(2)
        t = inputs.times(2)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                _, context = model.append_text(model.empty_context(2), ids)
                expected, _ = model.append_text(context, more)
                _, context = model.append_text(model.empty_context(2), ids)
                velocity = model.predict_velocity(context, x, t)
                assert torch.equal(model.predict_velocity(context, x, t), velocity)
                found, _ = model.append_text(context, more)
            self._assert_close(found, expected)

    def test_reserve_changes_nothing(self) -> None:
        """A context for which room was made holds the same, also when more is read than fits."""
        model = self.make_model()
        inputs = Inputs(model)
        ids, mask = inputs.ragged()
        more = inputs.ids(len(ids), 3)
        x = inputs.latent(len(ids))
        t = inputs.times(len(ids))
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                results = []
                for tokens, images in ((0, 0), (1, 0), (3, 2)):
                    _, context = model.append_text(model.empty_context(len(ids)), ids, mask)
                    model.reserve(context, tokens, images)
                    velocity = model.predict_velocity(context, x, t)
                    later, _ = model.append_text(context, more)
                    results.append((velocity, later))
                for velocity, later in results[1:]:
                    self._assert_close(velocity, results[0][0])
                    self._assert_close(later, results[0][1])

    def test_checkpointing_changes_nothing(self) -> None:
        """With `checkpointing` outputs and gradients are the same."""
        model = self.make_model()
        logits, velocity = outputs_of(model)
        expected = gradients_of(model, weighted_sum(logits) + weighted_sum(velocity))
        model.checkpointing = True
        same_logits, same_velocity = outputs_of(model)
        self._assert_close(same_logits, logits)
        self._assert_close(same_velocity, velocity)
        found = gradients_of(model, weighted_sum(same_logits) + weighted_sum(same_velocity))
        self._assert_same_gradients(found, expected)

    def test_bfloat16_is_close(self) -> None:
        """With weights in bfloat16 outputs are finite and close, and velocities in float32."""
        model = self.make_model()
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            model.cast_weights(dtype)
            logits, velocity = outputs_of(model)
            assert velocity.dtype == torch.float32
            results.append((logits, velocity))
        for expected, found in zip(*results, strict=True):
            assert torch.isfinite(found).all()
            difference = (found.float() - expected).norm() / expected.norm()
            assert difference <= self.bfloat16_tolerance, f"{difference:.3f} of its norm away"

    def test_experts_list_all_parameters(self) -> None:
        """Every trainable parameter is in one of the two lists, once."""
        model = self.make_model()
        lists = model.parameters_by_expert()
        assert set(lists) == {"text", "image"}, f"expected 'text' and 'image', got {sorted(lists)}"
        listed = [id(weight) for weights in lists.values() for weight in weights]
        assert len(listed) == len(set(listed)), "a parameter is listed twice"
        trainable = trainable_weights(model)
        missing = [name for name, weight in trainable.items() if id(weight) not in listed]
        assert not missing, f"parameters_by_expert lists these in neither list: {missing}"
        foreign = set(listed) - {id(weight) for weight in trainable.values()}
        assert not foreign, f"{len(foreign)} listed parameters are not trainable or not the model's"

    def test_gradient_reaches_listed_parameters(self) -> None:
        """Text and velocity give gradient to listed parameters alone, each to its own expert."""
        model = self.make_model()
        inputs = Inputs(model)
        lists = model.parameters_by_expert()
        listed = {id(weight) for weights in lists.values() for weight in weights}
        weights = dict(model.named_parameters())
        for expert in ("text", "image"):
            output, context = model.append_text(model.empty_context(2), inputs.ids(2, 3))
            if expert == "image":
                output = model.predict_velocity(context, inputs.latent(2), inputs.times(2))
            reached = reached_weights(model, output)
            unlisted = [name for name in reached if id(weights[name]) not in listed]
            assert not unlisted, f"a gradient reaches parameters in neither list: {unlisted}"
            own = {id(weight) for weight in lists[expert]}
            reached_own = [name for name in reached if id(weights[name]) in own]
            # A model may have no weight of its own for one of the experts.
            assert reached_own or not own, f"no gradient reaches the {expert!r} expert"

    def test_save_and_load(self) -> None:
        """`load_model` gives back what `save_pretrained` wrote."""
        model = self.make_model()
        name = type(model).__name__
        assert name in MODEL_CLASSES, f"register the class first: `register_model_class({name})`"
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_model(str(model.save_pretrained(folder)))
        assert type(loaded) is type(model)
        assert loaded.config == model.config
        state = model.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, state[key]), key

    def test_frozen_copy_is_independent(self) -> None:
        """A frozen copy computes the same, needs no gradient and does not follow the model."""
        model = self.make_model()
        ids = Inputs(model).ids(2, 3)
        copied = model.frozen_copy()
        assert not any(weight.requires_grad for weight in copied.parameters())
        with torch.no_grad():
            expected, _ = model.append_text(model.empty_context(2), ids)
            # The original changes after the copy was made.
            for weight in model.parameters():
                weight.fill_(0.5)
            found, _ = copied.append_text(copied.empty_context(2), ids)
        self._assert_close(found, expected)

    def test_image_mask_leaves_other_rows(self) -> None:
        """Rows outside the mask of `append_image` stay as if there was no image."""
        model = self.make_model()
        if not model.reads_images:
            return
        inputs = Inputs(model)
        ids = inputs.ids(2, 3)
        more = inputs.ids(2, 2)
        latent = inputs.latent(2)
        mask = torch.tensor([True, False], device=inputs.device)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                _, context = model.append_text(model.empty_context(2), ids)
                context = model.append_image(context, latent, mask=mask)
                found, _ = model.append_text(context, more)
                _, alone = model.append_text(model.empty_context(1), ids[:1])
                alone = model.append_image(alone, latent[:1])
                expected, _ = model.append_text(alone, more[:1])
                self._assert_close(found[0], expected[0])
                # Row 1 has read no image.
                _, alone = model.append_text(model.empty_context(1), ids[1:])
                expected, _ = model.append_text(alone, more[1:])
                self._assert_close(found[1], expected[0])

    def test_image_without_gradient(self) -> None:
        """`with_grad=False` changes no number, and the image's own part has no gradient."""
        model = self.make_model()
        if not model.reads_images:
            return
        inputs = Inputs(model)
        ids = inputs.ids(2, 3)
        more = inputs.ids(2, 2)
        latent = inputs.latent(2)
        _, context = model.append_text(model.empty_context(2), ids)
        without_image, _ = model.append_text(context, more)
        expected, _ = model.append_text(model.append_image(context, latent), more)
        cut = model.append_image(context, latent, with_grad=False)
        found, _ = model.append_text(cut, more)
        self._assert_close(found, expected)
        # Only the two texts may have a gradient, so it reaches what it reaches without an image.
        allowed = reached_weights(model, without_image)
        more_than_text = reached_weights(model, found) - allowed
        assert not more_than_text, f"a gradient reaches the image's part: {sorted(more_than_text)}"

    def test_text_before_an_image_keeps_its_gradient(self) -> None:
        """`with_grad=False` leaves the gradient of what was in the context before."""
        model = self.make_model()
        if not model.reads_images:
            return
        inputs = Inputs(model)
        ids = inputs.ids(2, 3)
        more = inputs.ids(2, 2)
        latent = inputs.latent(2)

        def _text_gradients(detach: bool, image: bool) -> dict[str, Tensor]:
            _, context = model.append_text(model.empty_context(2), ids)
            if detach:
                context = context.detach()
            if image:
                context = model.append_image(context, latent, with_grad=False)
            return gradients_of(model, weighted_sum(model.append_text(context, more)[0]))

        # A context may carry no gradient at all, as that of `ToyModel`: then none can be lost.
        cut = _text_gradients(detach=True, image=False)
        kept = _text_gradients(detach=False, image=False)
        if all_equal(cut, kept):
            return
        cut = _text_gradients(detach=True, image=True)
        kept = _text_gradients(detach=False, image=True)
        assert not all_equal(cut, kept), "the text before the image has lost its gradient"

    def _check_rows(self, rows: Tensor, change: Callable[[Any, Tensor], Any]) -> None:
        """Compare a context that `change` made with the rows that it should hold."""
        model = self.make_model()
        inputs = Inputs(model)
        rows = rows.to(inputs.device)
        ids, mask = inputs.ragged()
        more = inputs.ids(len(ids), 2)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                _, context = model.append_text(model.empty_context(len(ids)), ids, mask)
                changed = change(context, rows)
                assert changed.batch_size == len(rows)
                found, _ = model.append_text(changed, more[rows])
                expected, _ = model.append_text(context, more)
            self._assert_close(found, expected[rows])

    def _assert_close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=self.tolerance, rtol=0)

    def _assert_same_gradients(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            # Gradients add up over positions, so they may differ more than outputs.
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)
