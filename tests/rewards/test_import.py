"""What `import rewards` brings with it."""

import subprocess
import sys

import pytest

HEAVY = {"diffusers", "matplotlib", "tensordict", "torchrl", "transformers"}


@pytest.mark.slow
def test_importing_rewards_is_light():
    code = "import sys, rewards; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not HEAVY & set(result.stdout.split())
