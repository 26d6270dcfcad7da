"""Contract tests that a model of your own inherits.

    from agents.testing import ModelContract

    class TestMyModel(ModelContract):
        def make_model(self):
            return MyModel(MyConfig())

Run with pytest; every method named `test_...` is one promise. The weights should be random: a model
whose velocity is zero everywhere passes too easily.
"""

from agents.testing.model_contract import ModelContract

__all__ = ["ModelContract"]
