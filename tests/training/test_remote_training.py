"""A training whose reward is on a server: the same run as with the reward here; it waits for it, or ends clearly."""

import threading
import time

import pytest
import torch
from live_server import LiveServer

from visalign.rewards import RewardError, as_reward
from visalign.serving.server import make_app
from visalign.trainers.flow_grpo import Config, main
from visalign.training.run.checkpoint import checkpoints, load_checkpoint
from visalign.training.run.folder import read_metrics


class Light:
    """Brightness, that calls `at` before its n-th batch where it was told to."""

    name, differentiable, kind, range, needs = "light", False, "pointwise", (0.0, 1.0), ()

    def __init__(self) -> None:
        self.calls, self.at = 0, {}

    def __call__(self, images, prompts, context=None):
        self.calls += 1
        self.at.pop(self.calls, lambda: None)()
        return images.flatten(1).mean(1)


def served(reward, port=0):
    return LiveServer(make_app(as_reward(reward), "light"), port)


def trained(options, folder, reward, **more):
    return main(Config(**{**options, "reward": reward, "run_dir": str(folder), **more}))


def weights(folder):
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1])[0]["trained"]


def spec(tmp_path, url, **more):
    path = tmp_path / "remote.yaml"
    options = "".join(f", {key}: {value}" for key, value in more.items())
    path.write_text(f"rewards:\n- {{name: remote, url: '{url}'{options}}}\n")
    return str(path)


def test_a_served_reward_trains_as_the_same_reward_here(options, tmp_path):
    here = trained(options, tmp_path / "here", options["reward"])
    with served(Light()) as server:
        there = trained(options, tmp_path / "there", f"remote:{server.url}")
    one, two = weights(here), weights(there)
    assert all(torch.allclose(one[k], two[k], atol=1e-7) for k in one)
    means = [[line["reward_mean"] for line in read_metrics(f / "metrics.jsonl")[1:-1]] for f in (here, there)]
    assert means[0] == pytest.approx(means[1], abs=1e-6) and len(means[0]) == 2


def test_a_server_that_comes_back_is_waited_for(options, tmp_path):
    light = Light()
    first = served(light).__enter__()
    second: list[LiveServer] = []

    def leave() -> None:
        def back() -> None:
            first.stop(brutally=True)
            time.sleep(1)
            second.append(served(light, first.port).__enter__())

        threading.Thread(target=back).start()
        time.sleep(0.3)

    light.at[4] = leave  # in the training, after the evaluation before it
    folder = trained(options, tmp_path / "run", f"remote:{first.url}")
    assert second and [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 2]
    second[0].stop()


def test_without_its_server_a_run_ends_with_one_line_and_its_last_checkpoint(options, tmp_path):
    light = Light()
    server = served(light).__enter__()
    reward = spec(tmp_path, server.url, wait=1)

    def leave() -> None:
        threading.Thread(target=server.stop, kwargs={"brutally": True}).start()
        time.sleep(0.3)

    light.at[6] = leave
    with pytest.raises(RewardError, match="remote|light"):
        trained(options, tmp_path / "run", reward, steps=8)
    assert checkpoints(tmp_path / "run" / "checkpoints")
    assert threading.active_count() < 10
