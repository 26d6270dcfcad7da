"""Every scenario keeps the contract of a variant when this backbone plays it."""

import pytest
from chat_world import CASES

from unigrpo_env.testing import VariantContract

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestScenario(VariantContract):
    @pytest.fixture(autouse=True)
    def choose(self, case, tmp_path):
        self.case = case
        self.folder = tmp_path

    def make_variant(self):
        return self.case.make(self.folder)
