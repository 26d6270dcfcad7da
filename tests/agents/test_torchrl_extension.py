"""Whether the compiled part of TorchRL loads with the pinned versions."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer

REASON = (
    "no release of TorchRL has a compiled part for torch 2.13: that of 0.14 is built for torch "
    "2.14, those before for older ones; nothing in this project needs it"
)
BUILT_FOR_ANOTHER = torch.__version__.startswith("2.13.")


@pytest.mark.xfail(BUILT_FOR_ANOTHER, strict=True, raises=RuntimeError, reason=REASON)
def test_prioritised_replay_works():
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=0.7, beta=0.5, storage=LazyTensorStorage(8), batch_size=4
    )
    buffer.extend(TensorDict({"index": torch.arange(8), "td_error": torch.ones(8)}, [8]))
    assert buffer.sample().batch_size == (4,)
