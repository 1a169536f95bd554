"""The digits benchmark on sets so small that all of it runs in seconds."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from visalign.worlds.digits import DigitsModel


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location(
        "digits_benchmark", Path(__file__).parents[2] / "benchmarks" / "digits.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = ["--steps", "5", "--draws", "60", "--pool", "300", "--seeds", "0", "1", "--budgets", "100", "205"]


def test_a_small_run_measures_every_method_and_is_not_run_again(digits, tmp_path, monkeypatch):
    options = [*TINY, "--tasks", "odd", "--out", str(tmp_path)]
    digits.main(options)
    found = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(found) == 2 * 2 * len(digits.METHODS) + 2
    for name, run in found.items():
        budget = int(name.split("_-_")[2])
        assert run["nfe"] <= budget and (not budget or run["nfe"] > budget - 5 or "_dts" in name), name
        assert all(math.isfinite(value) for value in run.values()), name
        assert 0 <= run["accuracy"] <= 1 and run["effective"] >= 1 and run["frechet_tilted"] >= 0
    assert {r["backwards"] > 0 for n, r in found.items() if "_guidance_" in n or "_tds_" in n or "_das_" in n} == {True}

    monkeypatch.setattr(digits, "run_one", None)  # nothing is left to run
    digits.main(options)
    table = tmp_path / "table.md"
    digits.main([*options, "--write", str(table)])
    text = table.read_text()
    assert all(f"| {method} |" in text for method in (*digits.METHODS, "floor")) and "nan" not in text
    assert table.with_suffix(".png").stat().st_size > 10_000


def test_sets_by_weights_come_nearer_to_the_tilted_law_than_the_base(digits, tmp_path):
    model = DigitsModel(8)
    referees = digits.Referees(model, 1500, 1.0, tmp_path)
    runs = {
        name: digits.run_one(model, referees, "odd", name, 2400, 0, 400) for name in ("base", "snis", "fk", "floor")
    }
    assert runs["base"]["accuracy"] < 0.7 and all(runs[name]["accuracy"] > 0.9 for name in ("snis", "fk", "floor"))
    assert runs["floor"]["frechet_tilted"] < runs["snis"]["frechet_tilted"]
    assert max(runs["snis"]["frechet_tilted"], runs["fk"]["frechet_tilted"]) < 0.5 * runs["base"]["frechet_tilted"]
    assert runs["snis"]["entropy"] == pytest.approx(math.log(5), abs=0.25)


def test_draws_follow_the_weights(digits):
    random = torch.Generator().manual_seed(0)
    latents, effective = digits.drawn(torch.arange(3.0), torch.tensor([0.2, 0.0, 0.8]).double(), 4000, random)
    assert float((latents == 2).double().mean()) == pytest.approx(0.8, abs=0.03) and not (latents == 1).any()
    assert effective == pytest.approx(1 / (0.2**2 + 0.8**2))


def test_particles_are_drawn_by_their_weights(digits):
    cloud = SimpleNamespace(latents=torch.arange(3.0), weights=torch.tensor([0.0, 0.25, 0.75]).double())

    def search(chain, particles, tilt, output, potential):
        assert (particles, tilt, output, potential) == (None, 2.0, "weighted", "rt")
        yield SimpleNamespace(state="on the way")
        yield SimpleNamespace(state=cloud)

    run = digits.particles(search, potential="rt")
    latents, effective = run(None, 2.0, 4000, torch.Generator().manual_seed(0))
    assert float(latents.mean()) == pytest.approx(1.75, abs=0.03) and effective == pytest.approx(1.6)


def test_the_best_of_every_eight_is_returned(digits):
    chain = digits.chain_of(DigitsModel(2), "digit 3", 0, 2 * 19)  # 8, 8 and 3
    latents, effective = digits.best_of_8(chain, 1.0, 300, torch.Generator().manual_seed(0))
    rewards = chain.value(torch.cat(chain.kept))
    best = {round(float(part.max()), 4) for part in rewards.split(8)}
    assert {round(r, 4) for r in chain.value(latents).tolist()} == best and effective == pytest.approx(3)


def test_a_row_of_the_table_averages_tasks_within_seeds_that_have_them_all(digits):
    def run(value):
        return {name: value for name in (*digits.COLUMNS, "seconds")}

    runs = {("digit 1", "fk", 100, 0): run(1.0), ("digit 2", "fk", 100, 0): run(3.0)}
    runs |= {("digit 1", "fk", 100, 1): run(5.0), ("digit 2", "fk", 100, 1): run(7.0)}
    runs |= {("digit 1", "fk", 100, 2): run(100.0), ("odd", "fk", 100, 0): run(9.0)}
    found = digits.by_seed(runs, "one digit")["fk", 100]["frechet_tilted"]
    assert found.tolist() == [2.0, 6.0]
    assert digits.half_width(found) == pytest.approx(student.ppf(0.975, 1) * np.std([2, 6], ddof=1) / 2**0.5)
    assert digits.by_seed(runs, "odd digits")["fk", 100]["accuracy"].tolist() == [9.0]


def test_unknown_methods_are_refused(digits, capsys):
    with pytest.raises(SystemExit):
        digits.main(["--methods", "fkk"])
    assert "invalid choice: 'fkk'" in capsys.readouterr().err
