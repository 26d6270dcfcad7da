"""The contract of models, for thinkers and painters of several families."""

import copy
from functools import cache

import pytest
import tiny_parts
import torch
from tiny import FAMILIES, make_model
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from agents.models.thinker_painter.model import ThinkerPainter
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.vision import Vision
from agents.testing import ModelContract


def vision_of(thinker):
    return Vision.of(thinker.config, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


class Contract(ModelContract):
    """Gives each test a copy of its own, because to build a model takes longer."""

    def build(self):
        raise NotImplementedError

    @classmethod
    @cache
    def built(cls):
        return cls().build()

    def make_model(self):
        model = self.built()
        memo = {}
        # A copy of a model shares what is frozen, but a test may change its dtype.
        for part in model.painter.frozen:
            copy.deepcopy(part, memo)
        return copy.deepcopy(model, memo)


@pytest.mark.slow
class TestStableDiffusion3(Contract):
    """Text encoders that are no thinkers, beside a Qwen3."""

    def build(self):
        return make_model("sd3")


class TestZImage(Contract):
    """The thinker is the text encoder; conditions are lists."""

    def build(self):
        return make_model("zimage")


@pytest.mark.slow
class TestKlein(Contract):
    """An editor, which also draws without a source."""

    def build(self):
        return make_model("klein")


@pytest.mark.slow
class TestQwenImage(Contract):
    """The thinker is the text encoder, and it sees."""

    def build(self):
        pipeline, call = FAMILIES["qwen"]()
        thinker = pipeline.text_encoder
        return ThinkerPainter(
            thinker,
            Painter(pipeline, **call),
            tiny_parts.chat_tokenizer(),
            vision=vision_of(thinker),
        )


class TestThinkerThatSees(Contract):
    """A thinker of its own that sees, beside a painter that edits nothing."""

    def build(self):
        pipeline, call = FAMILIES["sd3"]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            thinker = tiny_parts.qwen25_vl()
        return ThinkerPainter(
            thinker,
            Painter(pipeline, **call),
            tiny_parts.chat_tokenizer(),
            vision=vision_of(thinker),
        )
