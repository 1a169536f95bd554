"""What someone adds without touching the house: a file of their own, named on the command line, refused at the door."""

import json

import pytest

import visalign
from visalign.commands import cli
from visalign.locations import load_location
from visalign.names import unknown_name
from visalign.search.methods import METHODS, find_method
from visalign.trainers import TRAINERS, load_trainer, trainer_for
from visalign.training.run.folder import read_metrics
from visalign.transitions import make_transition

OWN = '''
"""A transition, advantages, a search and a trainer of someone's own."""

from dataclasses import dataclass

from visalign.trainers.flow_grpo import FlowGRPO
from visalign.transitions import FlowSDE

calls = []


@dataclass(frozen=True)
class Quiet:
    """Flow-GRPO's SDE with half the noise."""

    eta: float = 0.7
    name = "quiet"
    stochastic = True

    def std(self, schedule, step_index):
        return FlowSDE(self.eta / 2).std(schedule, step_index)

    def __call__(self, schedule, step_index, latents, prediction):
        calls.append(step_index)
        return FlowSDE(self.eta / 2)(schedule, step_index, latents, prediction)


class Silent:
    def __init__(self, eta):
        pass


def ranks(rewards, group_ids):
    calls.append("ranks")
    return rewards.argsort().argsort().double() - (len(rewards) - 1) / 2


def two_draws(chain, *, tries: int = 2):
    """Independent draws, twice."""
    for k in range(tries):
        chain.result(chain.finish(chain.initial([k]), 0, [k]), [k])
        yield chain.event(None, f"draw {k}")


class Ranked(FlowGRPO):
    """GRPO by ranks."""

    name = "ranked"

    def advantages(self, scores):
        return ranks(scores.total, scores.group_ids).float()


class Unfinished:
    name = "unfinished"


number = 3
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    return file


def train(options, folder, *more):
    argv = [f"--{k}={v}" for k, v in {**options, "steps": 1, "run_dir": folder}.items()]
    cli.main(["train", *more, *argv])
    return read_metrics(folder / "metrics.jsonl")


def test_a_transition_and_advantages_of_ones_own_train(own, options, tmp_path):
    plain = train(options, tmp_path / "plain")
    calls = load_location("calls", f"{own}:calls")
    calls.clear()
    mine = train(options, tmp_path / "mine", f"--sampler={own}:Quiet", f"--advantages={own}:ranks")
    assert calls.count("ranks") == 1 and {0, 1, 2, 3} <= set(calls)
    assert mine[1]["reward_mean"] != plain[1]["reward_mean"]
    assert mine[1]["advantage_abs_mean"] == pytest.approx(1.0), "ranks of four less their mean"


def test_a_trainer_of_ones_own_is_the_command(own, options, tmp_path):
    metrics = train(options, tmp_path / "run", f"{own}:Ranked")
    assert metrics[1]["advantage_abs_mean"] == pytest.approx(1.0)


def test_a_search_of_ones_own_searches(own, tmp_path):
    argv = ["generate", "a red circle", "--search", f"{own}:two_draws", "--reward", "clip", "--budget", "9"]
    cli.main([*argv, "--steps", "2", "--option", "tries=3", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "search.json").read_text())["searches"][0]
    assert record["ledger"]["nfe"] == 6 and record["best"]["entity"] in range(3)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--sampler", "none.py:Quiet"], "sampler: got 'none.py:Quiet', but there is no file 'none.py'"),
        (["train", "--sampler", "{own}:Quite"], "got 'Quite', expected one of"),
        (["train", "--sampler", "flow_sd"], "did you mean 'flow_sde'?"),
        (["train", "--sampler", "{own}:Silent"], "which lacks 'stochastic', expected a Transition"),
        (["train", "--sampler", "{own}:number"], "could not call"),
        (["train", "vgpo", "--sampler", "{own}:Quite"], "got 'Quite', expected one of"),
        (["train", "tree_grpo", "--sampler", "{own}:Quite"], "got 'Quite', expected one of"),
        (["train", "reward_backprop", "--sampler", "{own}:Quite"], "got 'Quite', expected one of"),
        (["train", "--advantages", "{own}:rank"], "did you mean 'ranks'?"),
        (["train", "--advantages", "rank"], "advantages: got 'rank', expected 'group'"),
        (["train", "--advantages", "{own}:number"], "a int, expected a function"),
        (["train", "--advantages", "{own}:ranks", "--advantage_std", "group"], "advantage_std: got 'group' with"),
        (["train", "{own}:Ranke"], "visalign train: attribute of"),
        (["train", "{own}:Unfinished"], "which is no subclass of visalign.training.loop.trainer.Trainer"),
        (["generate", "x", "--reward", "clip", "--search", "{own}:two"], "did you mean 'two_draws'?"),
        (["generate", "x", "--reward", "clip", "--search", "{own}:number"], "expected a function of a chain"),
        (["generate", "x", "--reward", "clip", "--search", "dts_sta"], "did you mean 'dts-star'?"),
        (["eval", "--contestant", "a=shapes-flow,search=dts_sta,budget=9", "--reward", "clip"], "mean 'dts-star'?"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_it_is_told_before_a_model_loads(own, argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("visalign.pipeline.generator.Generator.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main([part.format(own=own) for part in argv])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1, error


def test_names_of_searches_and_trainers_take_dashes_and_underscores():
    assert find_method("dts_star") is METHODS["dts-star"] and find_method("best-of-n") is METHODS["best-of-n"]
    assert load_trainer("flow-grpo") is load_trainer("flow_grpo")
    assert type(make_transition("flow_sde")).__name__ == "FlowSDE"


@pytest.mark.parametrize("name", TRAINERS)
def test_the_table_says_of_a_trainer_what_its_class_says(name):
    trainer, entry = load_trainer(name), TRAINERS[name]
    assert trainer.name == name and trainer.__name__ == entry.name
    assert trainer.kinds is None or trainer.kinds == entry.kinds


def test_each_kind_of_model_has_one_first_trainer():
    kinds = [kind for entry in TRAINERS.values() for kind in entry.default_for]
    assert sorted(kinds) == ["consistency", "diffusion", "flow"]
    assert all(kind in TRAINERS[trainer_for(kind)].kinds for kind in kinds)


def test_the_public_face_is_what_it_says_and_costs_nothing_to_import():
    assert (
        dir(visalign)
        == sorted(visalign.__all__)
        == sorted(["Generator", "__version__", "make_reward", "rollout", "score", "search"])
    )
    assert all(getattr(visalign, name) is not None for name in visalign.__all__)
    assert visalign.search.run and visalign.rollout.__name__ == "rollout"
    with pytest.raises(AttributeError, match="has no attribute 'generater'"):
        visalign.generater  # noqa: B018
    assert "did you mean 'score'" in str(unknown_name("name", "scor", visalign.__all__))


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"visalign {visalign.__version__}\n"
