"""The hacking watch in a training: it stops or rolls back where told to, and leaves a finished run behind."""

import json

import pytest

from visalign.trainers.flow_grpo import Config, main
from visalign.training.run.checkpoint import load_checkpoint
from visalign.training.run.folder import read_metrics
from visalign.training.watch.hacking import Finding
from visalign.training.watch.monitor import Monitor


@pytest.fixture
def alarm_at_2(monkeypatch):
    """The monitor as it is, with an alarm added at step 2."""
    observe = Monitor.observe

    def observed(self, step, numbers):
        found = observe(self, step, numbers)
        if step == 2:
            self.raised["drift_saturation"] = step
            found.append(Finding("drift_saturation", step, "alarm", "the pictures turned garish", 2.0, 1.0))
        return found

    monkeypatch.setattr(Monitor, "observe", observed)


@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_an_alarm_is_told_and_the_run_does_what_it_was_told_to(alarm_at_2, options, tmp_path, capsys, action):
    more = dict(steps=4, eval_every=1, eval_during=2, keep=1, monitor=action, run_dir=str(tmp_path / "run"))
    folder = main(Config(**{**options, **more}))
    metrics = read_metrics(folder / "metrics.jsonl")
    told = [line for line in metrics if line.get("findings")]
    assert [line["step"] for line in told] == [2] and told[0]["findings"] == ["alarm: the pictures turned garish"]
    assert "step 2: alarm: the pictures turned garish" in capsys.readouterr().err
    assert {"monitor_diversity_vendi", "monitor_saturation", "monitor_watched_gold_strict"} <= set(told[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["findings"] == ["drift_saturation"] and (folder / "lora").is_dir()
    assert "the pictures turned garish" in (folder / "report.html").read_text()
    last = max(line["step"] for line in metrics if "reward_mean" in line)
    assert last == (4 if action == "warn" else 2)
    assert summary["images_sampled"] == 4 * last
    best = next(line for line in metrics if line["step"] == 1)["eval_gold_strict"]
    second = next(line for line in metrics if line["step"] == 2)["eval_gold_strict"]
    if action == "rollback" and best >= second:
        assert metrics[-1]["step"] == 1


def test_what_the_watch_remembers_is_in_the_checkpoint(options, tmp_path):
    folder = main(Config(**{**options, "run_dir": str(tmp_path / "run")}))
    state = load_checkpoint(folder / "checkpoints" / "step-2")[1]["monitor"]
    assert state["series"]["reward"]["steps"] == [1, 2]
    off = main(Config(**{**options, "monitor": "off", "run_dir": str(tmp_path / "off")}))
    assert load_checkpoint(off / "checkpoints" / "step-2")[1]["monitor"] is None
    assert not any("monitor_saturation" in line for line in read_metrics(off / "metrics.jsonl"))


def test_rolling_back_needs_evaluations_to_find_the_best_step_by(options):
    with pytest.raises(ValueError, match="^monitor: got 'rollback' with eval_every 0"):
        Config(**{**options, "monitor": "rollback"})
