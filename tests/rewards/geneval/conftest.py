"""A tiny detector with random weights."""

import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)


def save_detector(folder, classes):
    """A Mask2Former of 10 queries in a folder."""
    backbone = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        num_labels=classes,
    )
    torch.manual_seed(0)
    size = {"shortest_edge": 64, "longest_edge": 96}
    for part in (
        Mask2FormerImageProcessorPil(size=size),
        Mask2FormerForUniversalSegmentation(config),
    ):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_detector(tmp_path_factory):
    """The folder of a detector of COCO's 80 classes, which is sure of nothing."""
    return save_detector(tmp_path_factory.mktemp("detector"), 80)


@pytest.fixture(scope="session")
def detector_of_three_classes(tmp_path_factory):
    """The folder of a detector of other classes."""
    return save_detector(tmp_path_factory.mktemp("three"), 3)
