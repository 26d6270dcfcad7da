"""Tiny models of transformers in folders, with random weights."""

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizerFast,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

SIDE = 32
"""The height and width of the images that the tiny models see."""

LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**LAYERS, "image_size": SIDE, "patch_size": 8}


def character_tokenizer(length):
    """A tokenizer of CLIP's class whose words are spelt."""
    vocabulary = {}
    for ending in ("", "</w>"):
        for code in range(33, 127):
            vocabulary[chr(code) + ending] = len(vocabulary)
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[mark] = len(vocabulary)
    return CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=length)


def text_settings(tokenizer, length):
    # With an end of 2, transformers would take the state of the largest token instead.
    return {
        **LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of a CLIP model of 32 x 32 pixels and 77 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = character_tokenizer(77)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    config = CLIPConfig(
        text_config=text_settings(tokenizer, 77), vision_config=VISION, projection_dim=24
    )
    torch.manual_seed(0)
    for part in (tokenizer, processor, CLIPModel(config)):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory):
    """The folder of a SigLIP model of 32 x 32 pixels and 64 tokens."""
    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = character_tokenizer(64)
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    text = {**text_settings(tokenizer, 64), "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    # A new model has 0 here.
    torch.nn.init.constant_(model.logit_bias, -1.5)
    for part in (tokenizer, processor, model):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory):
    """The folder of a DINOv2 model that sees 28 x 28 pixels from the middle of 32 x 32."""
    folder = tmp_path_factory.mktemp("dino")
    settings = {**LAYERS, "image_size": 28, "patch_size": 7}
    processor = BitImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": 28, "width": 28}
    )
    torch.manual_seed(0)
    for part in (processor, Dinov2Model(Dinov2Config(**settings))):
        part.save_pretrained(folder)
    return str(folder)
