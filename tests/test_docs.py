"""The pages of the documentation: their code runs, their links and commands are right."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agents.cli import COMMANDS, main
from agents.config.loading import GROUPS, check_names, group_options, load_config, settings
from agents.experiments.paper_page import MEANINGS
from agents.experiments.paper_tables import EXPERIMENTS
from agents.training.pretraining import STAGES

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
PAGES_WITH_CODE = (
    "README.md", "docs/variants.md", "docs/extending.md", "docs/bagel.md", "docs/family.md"
)  # fmt: skip
TINY_RELEASE = {
    "/path/to/BAGEL-7B-MoT": str(ROOT / "tests" / "data" / "bagel_release"),
    "height=512, width=512": "height=96, width=64",
}
"""A folder in the layout of the release, in place of the reader's own."""
WIDTH = 100


def split_page(page):
    """The prose of a page with one line each, and its code blocks as (language, code)."""
    prose = []
    blocks = []
    language = None
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("```"):
            if language is None:
                language = line.removeprefix("```")
                blocks.append((language, []))
            else:
                language = None
        elif language is None:
            prose.append(line)
        else:
            blocks[-1][1].append(line)
    assert language is None, f"{page}: a code block is open at the end"
    return prose, [(language, "\n".join(lines) + "\n") for language, lines in blocks]


def python_blocks(page):
    """The Python blocks of a page, in order."""
    return [code for language, code in split_page(page)[1] if language == "python"]


def code_spans(page):
    """Everything between single backticks, with a space for each line break."""
    prose, _ = split_page(page)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(prose))]


def commands(page):
    """Every `unigrpo ...` of a page, in a block or in a sentence, as a list of words."""
    lines = code_spans(page)
    for language, code in split_page(page)[1]:
        if not language:
            lines += code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if line.startswith("unigrpo ") else []
        # "unigrpo train | evaluate" is a list of commands, and "unigrpo" alone is the program.
        if len(words) > 1 and words[1] in COMMANDS:
            found.append(words[1:])
    return found


def options_with_value(words):
    """The words after each option: {"--rows": ["unigrpo", "edit"]}."""
    found = {}
    values = []
    for word in words:
        if word.startswith("-"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


def is_placeholder(word):
    """Whether a value stands for something that the reader chooses: X, NAME, `...`."""
    value = word.partition("=")[2]
    return value.isupper() or value == "..."


def anchors(page):
    """The anchors that GitHub makes of the headings of a page."""
    prose, _ = split_page(page)
    headings = [line.lstrip("#").strip() for line in prose if line.startswith("#")]
    found = set()
    for heading in headings:
        text = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(text.replace(" ", "-"))
    return found


def run_python(*arguments, folder=ROOT):
    """Run Python on `arguments` and return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_block_runs(tmp_path):
    """Each block is a file of its own; where there is a contract, pytest finds it fulfilled."""
    scripts = []
    contracts = []
    for page in PAGES_WITH_CODE:
        blocks = python_blocks(page)
        assert blocks, page
        for number, code in enumerate(blocks):
            for text, replacement in TINY_RELEASE.items():
                code = code.replace(text, replacement)
            path = tmp_path / f"{Path(page).stem.lower()}_{number}.py"
            path.write_text(code)
            if "VariantContract" in code:
                contracts.append(path.name)
            else:
                scripts.append(path.name)
    # One process for all, because each would import torch anew; every file has its own names.
    run_python("-c", f"import runpy; [runpy.run_path(path) for path in {scripts}]", folder=tmp_path)
    # As users call it: with none of the options of this repository.
    printed = run_python("-m", "pytest", "-q", "-rp", *contracts, folder=tmp_path)
    for name in contracts:
        assert f"PASSED {name}::" in printed, "a file without tests would be no error"


@pytest.mark.slow
def test_tutorial_is_known_everywhere(tmp_path):
    """The command line, Gymnasium and the vector env know the scenario of the tutorial."""
    (tmp_path / "repaint.py").write_text(python_blocks("docs/variants.md")[0])
    words = ["evaluate", "--import", "repaint", "env.variant=repaint", "evaluation.prompts=2"]
    words += ["evaluation.image_steps=2", "trainer.threads=1"]
    code = f"""
import sys
from agents.cli import main

assert main({words}) == 0
assert "repaint" in sys.modules, "the command line has imported it"

import gymnasium
import repaint
import unigrpo_env
from unigrpo_env.vector_env import InterleavedGenVectorEnv

gymnasium.make("unigrpo/TextToImage-v0", variant="repaint").reset(seed=0)
InterleavedGenVectorEnv("repaint", 4).reset(seed=0)
"""
    run_python("-c", code, folder=tmp_path)


def test_tutorial_is_short():
    assert len(python_blocks("docs/variants.md")[0].splitlines()) <= 40


def test_pages_have_commands():
    assert len(commands("README.md")) > 10
    assert ["train", "env=edit"] in commands("docs/variants.md")


@pytest.mark.parametrize("page", PAGES)
def test_settings_and_groups_exist(page):
    for command, *words in commands(page):
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        if command not in ("train", "evaluate", "benchmark"):
            assert not overrides, f"{page}: {command} takes no settings: {overrides}"
        check_names(overrides)
        for override in overrides:
            key, _, value = override.partition("=")
            if key in GROUPS and not is_placeholder(override):
                assert set(value.split(",")) <= set(group_options(key)), f"{page}: {override}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_sentences_exist(page):
    sections = {name.split(".")[0] for name, _ in settings()}
    for span in code_spans(page):
        name = re.match(r"([a-z_]+)(?:\.[a-z_0-9]+)+(?==|$)", span)
        # Without a value, `env.step` and `model.processor` are attributes in Python.
        is_setting = name and name[1] in sections and ("=" in span or name[1] not in GROUPS[1:])
        if is_setting and not span.endswith(".py"):
            check_names([span if "=" in span else f"{span}=x"])
        option = re.fullmatch(r"([a-z]+)=([a-z_]+)", span)
        if option and option[1] in GROUPS:
            assert option[2] in group_options(option[1]), f"{page}: {span}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_compose(page):
    """The values have the right types and are in their bounds."""
    for command, *words in commands(page):
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        # A sweep has several values for one setting.
        if command in ("train", "evaluate", "benchmark") and "--multirun" not in words:
            load_config([word for word in overrides if not is_placeholder(word)])


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page, capsys):
    for command, *words in commands(page):
        options = options_with_value(words)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out))
        assert set(options) <= {*known, "--help"}, f"{page}: unigrpo {command}"
        rows = {experiment.key for experiment in EXPERIMENTS}
        assert set(options.get("--rows", ())) <= rows, page
        assert set(options.get("--stages", ())) <= {*STAGES}, page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose, _ = split_page(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / page
        if name:
            path = path.parent / name
        assert path.exists(), f"{page}: no such file: {target}"
        if anchor:
            linked = path.resolve().relative_to(ROOT.resolve()).as_posix()
            assert anchor in anchors(linked), f"{page}: no such heading: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    rooms = "agents|docs|examples|rewards|tests|unigrpo_env"
    for span in code_spans(page):
        if re.fullmatch(rf"(?:{rooms})/[\w./]*", span):
            assert (ROOT / span).exists(), f"{page}: no such file: {span}"


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_wrapped(page):
    prose, _ = split_page(page)
    long = [line for line in prose if len(line) > WIDTH and not line.startswith("|")]
    assert not long, f"{page}: over {WIDTH} columns: {long}"


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_python_blocks_are_narrow(page):
    lines = "\n".join(python_blocks(page)).splitlines()
    assert max(len(line) for line in lines) <= WIDTH


def test_page_of_tables_has_the_names_of_today():
    """The numbers are of long runs; the words around them are those of `unigrpo tables`."""
    page = " ".join((ROOT / "docs/tables.md").read_text().split())
    for name, meaning in MEANINGS.items():
        assert f"* *{name}*: {meaning}." in page
    for experiment in EXPERIMENTS:
        if experiment.study in ("table", "penalty", "guidance"):
            assert f"| {experiment.title} |" in page
