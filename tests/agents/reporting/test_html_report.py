"""The page about a run."""

import subprocess
import sys

import pytest
import torch

from agents.evaluation.accuracy import Evaluation, evaluate
from agents.reporting.contact_sheet import before_and_after, contact_sheet, panels
from agents.reporting.html_report import RunRecord, draw_curves, measure_name, write_report
from agents.reporting.metrics import METRICS
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant

pytestmark = pytest.mark.slow


def evaluation(reward, text="a thought", kind=None):
    metadata = {} if kind is None else {"kind": kind}
    prompts = [Prompt("a red circle", metadata) for _ in reward]
    images = [torch.zeros(1, 3, 24, 24) for _ in reward]
    return Evaluation(prompts, [[text]] * len(reward), images, torch.tensor(reward), {})


def record(before, after, **changes):
    values = {
        "description": {"algorithm": "UniGRPO", "scenario": "edit", "reward": "shapes"},
        "changed_settings": {"env.variant": ("text_to_image", "edit")},
        "summary": {"seed": 0, "episodes": 64},
        "rows": [],
        "curve": [],
        "before": before,
        "after": after,
    }
    return RunRecord(**(values | changes))


def page(tmp_path, *arguments, **changes):
    path = tmp_path / "report.html"
    write_report(path, record(*arguments, **changes), samples=3)
    return path.read_text()


def rows(count):
    return [{"iteration": number + 1.0} | dict.fromkeys(METRICS, 0.5) for number in range(count)]


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_every_scenario_has_a_report(small_bagel, name, tmp_path):
    variant = make_variant(name, text_budget=5, image_steps=2)
    found = evaluate(small_bagel, variant, variant.task.prompts("test", 6, 0))
    text = page(tmp_path, found, found)
    images = 0
    for index in (0, 1, 2):
        images += sum(panel.image is not None for panel in panels(found, index))
    assert text.count("data:image/png;base64,") == 2 * images
    if name == "dialogue":
        assert found.prompts[0].turns[0] in text
    sheets = (contact_sheet(found), before_and_after(found, found, 3))
    assert min(*sheets[0].size, *sheets[1].size) > 200


def test_report_names_what_was_run(tmp_path):
    text = page(tmp_path, evaluation([0.0, 1.0]), evaluation([1.0, 1.0]))
    assert "Held-out accuracy 0.500 → 1.000" in text
    for word in ("UniGRPO", "edit", "shapes", "env.variant", "text_to_image"):
        assert word in text


def test_report_says_when_no_setting_differs(tmp_path):
    text = page(tmp_path, evaluation([1.0]), evaluation([1.0]), changed_settings={})
    assert "<p>None.</p>" in text


def test_empty_settings_are_shown_as_empty(tmp_path):
    changed = {"output.wandb": (None, "project"), "env.reward": ("shapes", "")}
    text = page(tmp_path, evaluation([1.0]), evaluation([1.0]), changed_settings=changed)
    assert text.count("(empty)") == 2


def test_words_of_the_model_are_escaped(tmp_path):
    wild = evaluation([1.0], "<script>alert(1)</script>")
    text = page(tmp_path, wild, wild)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_correct_episodes_are_marked(tmp_path):
    text = page(tmp_path, evaluation([0.0]), evaluation([1.0]))
    assert text.count('class="single correct"') == 1
    assert text.count('class="single wrong"') == 1


def test_kinds_of_prompt_have_a_table(tmp_path):
    text = page(tmp_path, evaluation([0.0], kind="counting"), evaluation([1.0], kind="counting"))
    assert "By kind of prompt" in text
    assert "<td>counting</td>" in text
    without = page(tmp_path, evaluation([0.0]), evaluation([1.0]))
    assert "By kind of prompt" not in without


def test_measure_is_accuracy_for_zeros_and_ones():
    assert measure_name(evaluation([0.0, 1.0]), evaluation([1.0])) == "accuracy"
    assert measure_name(evaluation([0.0, torch.nan])) == "accuracy"
    assert measure_name(evaluation([1.0]), evaluation([0.3])) == "reward"


def test_report_of_another_reward_says_reward(tmp_path):
    text = page(tmp_path, evaluation([0.2]), evaluation([0.4]), rows=rows(2), curve=[(0, 0.2)])
    assert "Held-out reward 0.200 → 0.400" in text
    assert "accuracy" not in text


def test_page_is_self_contained(tmp_path):
    text = page(tmp_path, evaluation([1.0]), evaluation([1.0]), rows=rows(3), curve=[(0, 0.5)])
    assert "<svg" in text
    # The names of XML namespaces are not fetched.
    for name in ("www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"):
        text = text.replace(f"http://{name}", "").replace(f"https://{name}", "")
    assert "http" not in text


def test_curves_are_svg():
    assert draw_curves(rows(3), [(0, 0.5), (3, 0.7)]).startswith("<svg")


@pytest.mark.slow
def test_imports_are_lazy():
    """What draws or logs is imported when it is used; pyplot, which is global, never."""
    code = (
        "import sys, agents.reporting.html_report as report, agents.reporting.loggers\n"
        "for name in ('matplotlib', 'tensorboard', 'torch.utils.tensorboard', 'wandb'):\n"
        "    assert name not in sys.modules, name\n"
        "report.draw_curves([], [(0, 0.5)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
