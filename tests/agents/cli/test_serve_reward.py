"""`unigrpo serve-reward`, and training on what it serves."""

import csv
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

import rewards.service.server
from agents.cli import main
from rewards import WeightedReward

FOLDER = str(Path(__file__).parents[2] / "rewards" / "service")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

from reward_server import RewardServer

SMALL = [
    "trainer.iterations=1",
    "trainer.groups=2",
    "trainer.group_size=4",
    "env.image_steps=6",
    "env.text_budget=12",
    "evaluation.prompts=2",
    "output.tensorboard=false",
    "output.samples_every=0",
]
TIMES = {"seconds", "cpu_seconds", "episodes_per_second"}


@pytest.fixture
def served(monkeypatch):
    """The servers that were started in this test, without their listening."""
    found = []
    monkeypatch.setattr(
        rewards.service.server, "serve", lambda app, host, port: found.append((app, host, port))
    )
    return found


@pytest.fixture
def serve_in_child():
    """Start `unigrpo serve-reward` as a process, and stop it after the test."""
    children = []

    def start(*words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "agents.cli", "serve-reward", *words, "--port", str(port)]
        children.append(subprocess.Popen(command))
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not is_up(url):
            assert children[-1].poll() is None, "the server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return url

    yield start
    for child in children:
        child.kill()
        child.wait()


def is_up(url):
    try:
        return httpx2.get(f"{url}/health", trust_env=False, verify=False).status_code == 200
    except httpx2.TransportError:
        return False


def metrics(folder):
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_training_on_a_server_is_training_here(serve_in_child, tmp_path):
    reward = "shapes + crispness"
    here = tmp_path / "here"
    there = tmp_path / "there"
    url = serve_in_child(reward)
    assert main(["train", *SMALL, f"env.reward='{reward}'", f"output.folder={here}"]) == 0
    remote = ["env.reward=remote", f"env.reward_options.remote.url={url}"]
    # Two requests for a rollout, and images as they are.
    remote += ["env.reward_options.remote.batch=5", "env.reward_options.remote.exact=true"]
    assert main(["train", *SMALL, *remote, f"output.folder={there}"]) == 0
    (row,) = metrics(here)
    assert float(row["frac_groups_with_signal"]) == 1
    assert metrics(there) == [row]
    weights = "model/model.safetensors"
    assert (there / weights).read_bytes() == (here / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_a_run_stops_with_the_text_of_the_server(tmp_path, capsys):
    calls = []

    def often(episodes):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise RuntimeError("CUDA out of memory")
        return [float(len(text)) for text in episodes.texts]

    with RewardServer({"sum": WeightedReward(often)}) as server:
        remote = ["env.reward=remote", f"env.reward_options.remote.url={server.url}"]
        # Each episode is one request, and has one try.
        remote += ["env.reward_options.remote.batch=1"]
        remote += ["env.reward_options.remote.limits={tries: 1}"]
        words = [*SMALL, *remote, "trainer.max_unscored=0.2", f"output.folder={tmp_path / 'run'}"]
        assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert "of 8 episodes could not be scored" in error
    assert "x remote: HTTP 500; the first: HTTP 500: RuntimeError: CUDA out of memory" in error


def test_what_is_served(served, capsys, monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "secret\n")
    words = ["0.5 * shapes + far(use='brevity')", "--host", "0.0.0.0", "--port", "9"]
    assert main(["serve-reward", *words, "--token-env", "SCORER_TOKEN"]) == 0
    ((_, host, port),) = served
    assert (host, port) == ("0.0.0.0", 9)
    out = capsys.readouterr().out
    assert "rewards: sum, shapes, far" in out
    assert "secret" not in out


def test_what_is_missing_shows_before_the_server_starts(served):
    with pytest.raises(Exception, match="connection") as caught:
        main(["serve-reward", "remote(url='http://127.0.0.1:1')"])
    assert caught.value.__notes__ == ["raised while reward 'remote' was prepared"]
    assert not served


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shape"], "unknown reward 'shape'; did you mean 'shapes'"),
        (["shapes", "--host", "0.0.0.0"], "expected --token-env beside --host 0.0.0.0"),
        (["shapes", "--token-env", "NO_SUCH"], "environment variable NO_SUCH, got none"),
        (["shapes", "--import", "no_such_module"], "no_such_module"),
    ],
)
def test_errors_of_the_user(served, capsys, words, message):
    assert main(["serve-reward", *words]) == 2
    assert message in capsys.readouterr().err
    assert not served


@pytest.mark.parametrize("words", [[], ["shapes", "--port", "x"], ["shapes", "--queue", "0"]])
def test_words_that_are_no_options(served, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(["serve-reward", *words])
    assert stopped.value.code == 2
    assert "usage: unigrpo serve-reward" in capsys.readouterr().err
