"""A trainer is a class: what a user's own may add to one that is there, carried over a resume as if unbroken."""

import torch
from trainer_checks import assert_equal_runs, scored, stop_in_step

from visalign.advantages.group import group_advantages
from visalign.data.prompts import iteration_groups
from visalign.trainers.flow_grpo import Config, FlowGRPO
from visalign.training.loop import learning
from visalign.training.loop.trainer import launch, train
from visalign.training.loop.training_loop import open_training
from visalign.training.run.checkpoint import load_checkpoint


class Ranked(FlowGRPO):
    """Ranks in place of rewards; an old policy, taken over slowly, that the new one is compared with."""

    name = "ranked"

    def advantages(self, scores):
        return group_advantages(scores.total.argsort().argsort().double(), scores.group_ids).float()

    def update(self, step, shares):
        own = self.state.policy.tensors()
        old = self.state.tensors.setdefault("old_policy", {k: v.clone() for k, v in own.items()})
        with self.state.policy.swapped(old):
            batch = shares[0][0].trajectory
            moved = self.generator.predict(batch.latents[0], 0, batch.prompts, batch.seeds)
        values = super().update(step, shares)
        for name, value in old.items():
            value.lerp_(own[name], 0.5)
        return values | {"old_velocity": moved.norm().item()}


def test_named_groups_of_tensors_are_saved_and_resumed_like_the_average(options, tmp_path, monkeypatch):
    cfg = Config(**{**options, "steps": 3, "run_dir": str(tmp_path / "unbroken")})
    unbroken = train(Ranked, cfg)
    saved = load_checkpoint(unbroken / "checkpoints" / "step-3")[0]
    assert any((saved["old_policy"][k] - value).abs().max() > 0 for k, value in saved["trained"].items())
    with monkeypatch.context() as patch:
        stop_in_step(patch, Ranked, 1)
        folder = train(Ranked, Config(**{**options, "steps": 3, "run_dir": str(tmp_path / "run")}))
    train(Ranked, Config(**{**options, "steps": 3, "run_dir": str(folder), "resume": str(folder)}))
    assert_equal_runs(unbroken, folder, 3)


def test_every_named_reference_predicts_with_its_own_weights_and_no_gradient(options, tmp_path):
    cfg = Config(**{**options, "run_dir": str(tmp_path / "run")})
    with open_training(cfg, Ranked.plan(cfg), cfg.prompts_per_step) as loop:
        trainer = Ranked(loop)
        groups = iteration_groups(loop.plan.prompts, 0, cfg.prompts_per_step, cfg.group_size, cfg.seed)
        submitted, _ = scored(trainer, trainer.sample(0, groups))
        batch, policy = submitted.batches[0].trajectory, loop.state.policy
        other = {name: value + 0.05 for name, value in policy.tensors().items()}
        seen = {}

        def loss(i, prediction, others):
            seen[i] = others
            return (prediction - others["base"]).flatten(1).square().mean(1), {}

        references = {"base": policy.reference, "old": lambda: policy.swapped(other)}
        states = {0: batch.latents[0]}
        learning.add_gradients(trainer.generator, batch.prompts, batch.seeds, states, loss, 1.0, references)
        with torch.no_grad(), policy.swapped(other):
            wanted = trainer.generator.predict(batch.latents[0], 0, batch.prompts, batch.seeds)
        assert torch.equal(seen[0]["old"], wanted) and not torch.equal(seen[0]["old"], seen[0]["base"])
        assert not any(value.requires_grad for value in seen[0].values())


def test_a_group_named_as_a_file_of_the_checkpoint_is_refused(options, tmp_path, capsys):
    class Clash(Ranked):
        def iteration(self, step):
            self.state.tensors["ema"] = {}
            return super().iteration(step)

    try:
        launch(Clash, [f"--{k}={v}" for k, v in {**options, "run_dir": tmp_path / "run"}.items()])
    except SystemExit as stopped:
        assert stopped.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("ranked: tensors: got a group 'ema', expected none of")
