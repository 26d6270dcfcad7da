"""The contract of models, on models that keep it and on models that break it."""

import copy
import dataclasses

import pytest
import torch

from agents.models.bagel.model import Bagel
from agents.models.toy import ToyConfig, ToyModel
from agents.testing import ModelContract

pytestmark = pytest.mark.slow


class StubProcessor:
    """Decodes the latents of the small models as images."""

    pixel_size = (16, 16)

    def decode_latents(self, latents):
        return latents[:, :24, :].reshape(-1, 3, 24, 16).sigmoid()

    def view_images(self, images):
        return (images[:, :, :16] * 255).byte()


def random_toy(cls=ToyModel):
    model = cls(ToyConfig(processor=""))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=generator)
    return model


class TestToyModel(ModelContract):
    def make_model(self):
        return random_toy()


class TestBagel(ModelContract):
    @pytest.fixture(autouse=True)
    def _model(self, small_bagel):
        self.model = _without_processor(small_bagel)

    def make_model(self):
        return copy.deepcopy(self.model)


class TestVisionBagel(ModelContract):
    @pytest.fixture(autouse=True)
    def _model(self, vision_bagel):
        self.model = _without_processor(vision_bagel)

    def make_model(self):
        model = copy.deepcopy(self.model)
        model.processor = StubProcessor()
        return model


def _without_processor(model):
    """The same weights; these tests bring their own processor."""
    own = Bagel(dataclasses.replace(model.config, processor=""))
    own.load_state_dict(model.state_dict())
    return own


class ReadsPadding(ToyModel):
    """Reads padding as if it were text."""

    def append_text(self, context, ids, mask=None):
        return super().append_text(context, ids, None)


class UnlistedWeights(ToyModel):
    """Lists one of its two tables."""

    def parameters_by_expert(self):
        return {"text": [self.words], "image": []}


class DetachedVelocity(ToyModel):
    """Gives no gradient to its image table."""

    def predict_velocity(self, context, x, t):
        return super().predict_velocity(context, x, t).detach().requires_grad_()


class WrongVocabulary(ToyModel):
    """Claims fewer tokens than it has."""

    @property
    def vocab_size(self):
        return 4


class OtherLogits(ToyModel):
    """Makes other logits of its hidden states."""

    def compute_logits(self, hidden):
        return 2 * hidden


class ForgetsOnReserve(ToyModel):
    """Loses what was read when room is made for many tokens."""

    def reserve(self, context, tokens, images):
        if tokens > 2:
            context.word.zero_()


class OtherGradient(ToyModel):
    """Gives its image table no gradient under checkpointing."""

    def predict_velocity(self, context, x, t):
        velocity = super().predict_velocity(context, x, t)
        if self.checkpointing:
            return velocity.detach()
        return velocity


class HalfVelocity(ToyModel):
    """Gives velocities in the dtype of its weights."""

    def predict_velocity(self, context, x, t):
        return super().predict_velocity(context, x, t).to(self.images.dtype)


class RoughImages(ToyModel):
    """Rounds its velocities to halves in low precision."""

    def predict_velocity(self, context, x, t):
        velocity = super().predict_velocity(context, x, t)
        if self.images.dtype == torch.bfloat16:
            return (velocity * 2).round() / 2
        return velocity


BROKEN = [
    (ReadsPadding, "test_padding_leaves_no_trace", "not close"),
    (ReadsPadding, "test_ragged_rows_are_independent", "not close"),
    (UnlistedWeights, "test_experts_list_all_parameters", r"in neither list: \['images'\]"),
    (UnlistedWeights, "test_gradient_reaches_listed_parameters", r"\['images'\]"),
    (DetachedVelocity, "test_gradient_reaches_listed_parameters", "'image' expert"),
    (WrongVocabulary, "test_sizes_and_dtypes", None),
    (OtherLogits, "test_hidden_states_give_the_logits", "not close"),
    (ForgetsOnReserve, "test_reserve_changes_nothing", "not close"),
    (OtherGradient, "test_checkpointing_changes_nothing", None),
    (HalfVelocity, "test_bfloat16_is_close", None),
    (RoughImages, "test_bfloat16_is_close", "of its norm away"),
    (ReadsPadding, "test_save_and_load", "register the class first"),
]


@pytest.mark.parametrize(("cls", "promise", "message"), BROKEN)
def test_broken_promises_are_found(cls, promise, message):
    contract = ModelContract()
    contract.make_model = lambda: random_toy(cls)
    with pytest.raises(AssertionError, match=message):
        getattr(contract, promise)()


def test_make_model_must_be_overridden():
    with pytest.raises(NotImplementedError, match="return the model"):
        ModelContract().test_sizes_and_dtypes()
