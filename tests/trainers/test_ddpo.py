"""The DDPO trainer on tiny random models: its losses against naive ones, what each option changes, whole runs."""

import ast
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from accelerate import Accelerator
from trainer_checks import scored

from visalign.data.prompts import iteration_groups
from visalign.objectives.rebel import rebel_loss
from visalign.pipeline.generator import Generator
from visalign.sampling.rollout import step_log_prob
from visalign.trainers import ddpo, flow_grpo
from visalign.trainers.ddpo import DDPO, Config, main
from visalign.training.before import doctor, options, preflight
from visalign.training.before.config import parse_config
from visalign.training.loop import setup
from visalign.training.loop.training_loop import TrainingLoop
from visalign.training.run import outcome
from visalign.training.run.folder import Run

FAMILIES = {"sd": "Stable Diffusion 1.5", "lcm": "LCM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, family in FAMILIES.items():
        tiny.make(family).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def given(folders, world_files):
    """Options of a run of two steps of two prompts, two images each, that takes a second."""
    return dict(
        prompts=str(world_files / "train.txt"),
        eval_prompts=str(world_files / "test.txt"),
        reward=f"{world_files / 'reward.py'}:brightness",
        model=str(folders / "sd"),
        judges="",
        height=32,
        width=32,
        guidance_scale=4.0,
        num_steps=3,
        timestep_fraction=1.0,
        steps=2,
        prompts_per_step=2,
        group_size=2,
        batch_size=4,
        eval_count=2,
        lora_rank=2,
        lora_targets=["attention"],
    )


class Bench:
    """A built model, and trainers with different options over it."""

    def __init__(self, folder, **options):
        self.cfg, self.accelerator = Config(**options), Accelerator()
        self.plan = preflight.make_plan(self.cfg, "ddpo")
        self.state = setup.build(self.cfg, self.plan, self.accelerator)
        self.run = Run(folder, main=True, total=2)
        self.fresh = {k: v.clone() for k, v in self.state.policy.tensors().items()}
        self._sampled = None

    def trainer(self, **changes) -> DDPO:
        self.state.extra = {}
        return DDPO(TrainingLoop(replace(self.cfg, **changes), self.plan, self.accelerator, self.state, self.run))

    def sampled(self, trainer, step=0):
        cfg = trainer.cfg
        groups = iteration_groups(self.plan.prompts, step, cfg.prompts_per_step, cfg.group_size, cfg.seed)
        submitted, scores = scored(trainer, trainer.sample(groups))
        advantages, values = trainer.advantages(scores, groups)
        (batches,) = scores.assign([submitted], advantages)
        return batches, values

    def recorded(self):
        """One batch of the unmoved policy, with made-up advantages; sampled once."""
        if self._sampled is None:
            self._sampled = self.sampled(self.trainer())[0]
        (batch,) = self._sampled
        return replace(batch, advantages=torch.tensor([1.0, -0.5, 0.25, -2.0]))

    def move(self, size=0.02):
        generator = torch.Generator().manual_seed(0)
        for p in self.state.policy.trained.values():
            p.data += size * torch.randn(p.shape, generator=generator)

    def flat_gradient(self):
        parameters = self.state.policy.trained.values()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.state.optimizer.zero_grad(set_to_none=True)
        return flat

    def gradient(self, trainer, batch, steps=None, scale=1.0):
        sums = trainer.backward(batch, batch.trajectory.steps if steps is None else steps, scale)
        return self.flat_gradient(), sums

    def log_ratios(self, trainer, trajectory):
        """(N, steps) with their whole graph, by one `predict` a step."""
        columns = []
        for i in trajectory.steps:
            latents = trajectory.latents[i]
            prediction = self.state.generator.predict(latents, i, trajectory.prompts, trajectory.seeds)
            log_prob = step_log_prob(trajectory, i, prediction, trainer.transition)
            columns.append(log_prob - trajectory.log_probs[i])
        return torch.stack(columns, dim=1)

    def reset(self):
        self.state.policy.load(self.fresh)
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.optimizer.state.clear()


@pytest.fixture(scope="module")
def benches(given, folders, tmp_path_factory):
    """sd and lcm train their denoiser, text and both their text encoder, both also the denoiser."""
    made = {}

    def bench(name):
        if name not in made:
            model = folders / ("lcm" if name in ("lcm", "both") else "sd")
            policy = name if name in ("text", "both") else "denoiser"
            changes = dict(model=str(model), policy=policy)
            made[name] = Bench(tmp_path_factory.mktemp(name), **{**given, **changes})
        made[name].reset()
        return made[name]

    yield bench
    for made_bench in reversed(made.values()):  # each gives back the signal handlers that it found
        made_bench.run.close()


# The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "lcm", "text", "both"])
def test_before_the_first_update_every_ratio_is_exactly_1_and_the_loss_is_minus_the_advantage(benches, name):
    bench = benches(name)
    bench.move()
    trainer = bench.trainer()
    (batch,), _ = bench.sampled(trainer)
    steps, seen = trainer.steps_to_train(0, batch.trajectory.steps), []
    assert steps == ([0, 1] if name in ("lcm", "both") else [0, 1, 2]), "a consistency model's last step has no noise"

    def look(i, _latents, prediction):
        assert prediction.requires_grad
        loss, stats = trainer.loss(batch.trajectory, i, prediction, batch.advantages, None, None)
        assert torch.equal(loss, -batch.advantages)
        assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0
        seen.append(i)

    for states in trainer.calls(batch.trajectory, steps):
        bench.state.generator.denoise(batch.trajectory.prompts, batch.trajectory.seeds, look, latents=states)
    assert seen == steps


@pytest.mark.parametrize("name", ["lcm", "text"])
def test_the_gradient_is_that_of_the_clipped_loss_of_all_steps_at_once(benches, name):
    bench = benches(name)
    batch, trainer = bench.recorded(), bench.trainer(clip_range=1e-4)
    bench.move()
    ours, sums = bench.gradient(trainer, batch)
    ratio = bench.log_ratios(trainer, batch.trajectory).exp()
    advantages = batch.advantages[:, None]
    naive = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 1e-4, 1 + 1e-4))
    naive.sum().backward()
    wanted = bench.flat_gradient()
    assert wanted.norm() > 0 and 0 < sums["clip_fraction"] < sums["count"]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["lcm", "text"])
def test_rebels_gradient_is_that_of_its_loss_over_the_sums_of_all_steps(benches, name):
    bench = benches(name)
    batch, trainer = bench.recorded(), bench.trainer(objective="rebel", rebel_scale=3.0)
    bench.move(0.1)
    steps = batch.trajectory.steps
    ours, sums = bench.gradient(trainer, batch, scale=1 / (4 * len(steps)))  # as in an update of these 4 samples
    ratios = bench.log_ratios(trainer, batch.trajectory).sum(1)
    loss = rebel_loss(ratios, batch.advantages, 3.0)
    loss.mean().backward()
    wanted = bench.flat_gradient()
    assert ratios.abs().max() > 1e-3
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(sums["rebel_loss"] / sums["count"], loss.mean().detach(), rtol=1e-4, atol=1e-6)
    unscored = replace(batch, valid=torch.tensor([True, False, True, True]))
    dropped, _ = bench.gradient(trainer, unscored, scale=1 / (4 * len(steps)))
    rebel_loss(bench.log_ratios(trainer, batch.trajectory).sum(1), batch.advantages, 3.0)[1].div(2).backward()
    wanted = bench.flat_gradient()
    torch.testing.assert_close(dropped, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_order_of_steps_does_not_change_the_sum_and_samples_without_signal_are_left_out(benches):
    bench = benches("sd")
    batch, trainer = bench.recorded(), bench.trainer(clip_range=1.0)
    bench.move()
    whole, _ = bench.gradient(trainer, batch)
    parts = sum(bench.gradient(trainer, batch, [i])[0] for i in (2, 0, 1))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    fewer = replace(batch, advantages=batch.advantages * torch.tensor([1.0, 0.0, 1.0, 0.0]))
    masked, sums = bench.gradient(trainer, fewer)
    kept = replace(batch, trajectory=batch.trajectory.take([0, 2]), advantages=batch.advantages[[0, 2]])
    torch.testing.assert_close(masked, bench.gradient(trainer, kept)[0], rtol=1e-5, atol=0)
    assert sums["count"] == 2 * 3
    assert trainer.backward(replace(batch, advantages=torch.zeros(4)), [0], 1.0) == {}


@pytest.mark.parametrize("objective", ["ppo", "rebel"])
def test_an_update_raises_the_likelihood_of_what_was_better(benches, objective):
    bench = benches("sd")
    trainer = bench.trainer(objective=objective, statistics="group", learning_rate=1e-3)
    batches, _ = bench.sampled(trainer)
    values = trainer.update(0, [batches])
    assert values["grad_norm"] > 0 and values["ratio_mean"] == 1
    with torch.no_grad():
        gain = bench.log_ratios(trainer, batches[0].trajectory).sum(1) * batches[0].advantages
    assert gain.sum() > 0


def test_the_kl_alone_has_a_gradient_and_is_zero_for_a_fresh_lora_on_text_encoders_too(benches):
    for name in ("lcm", "text"):
        bench = benches(name)
        trainer, batch = bench.trainer(kl_weight=1.0), replace(bench.recorded(), advantages=torch.zeros(4))
        flat, sums = bench.gradient(trainer, batch)
        assert sums["kl"] == 0 and flat.abs().max() == 0
        bench.move()
        flat, sums = bench.gradient(trainer, batch)
        assert sums["kl"] > 0 and flat.norm() > 0


# TexForce --------------------------------------------------------------------------------------------------------


def test_only_the_text_encoder_gets_a_gradient_and_every_call_encodes_anew(benches):
    bench = benches("text")
    policy, generator = bench.state.policy, bench.state.generator
    assert policy.texts == ["text_encoder"] and all(n.startswith("text_encoder.") for n in policy.trained)
    trainer, batch = bench.trainer(), bench.recorded()
    trainer.backward(batch, [0, 1], 1.0)
    assert all(p.grad is None for p in generator.denoiser.parameters())
    assert any(p.grad is not None and p.grad.norm() > 0 for p in policy.trained.values())
    bench.state.optimizer.zero_grad(set_to_none=True)
    call = (generator.noise(["a red circle"], [1]), 1, ["a red circle"], [1])
    with torch.no_grad():
        before = generator.predict(*call)
        bench.move(0.2)
        moved = generator.predict(*call)
        with policy.reference():
            assert torch.equal(generator.predict(*call), before), "the base again, adapter off"
        assert torch.equal(generator.predict(*call), moved) and not torch.equal(moved, before)
        assert not generator.predict(*call).requires_grad
    bench.reset()
    assert torch.equal(generator.predict(*call).detach(), before)


def test_a_fresh_lora_draws_what_the_base_draws(benches, given):
    trainers = [benches(name).trainer() for name in ("sd", "text")]
    finals = [benches(n).sampled(t)[0][0].trajectory.final for n, t in zip(("sd", "text"), trainers)]
    assert torch.equal(*finals)


# Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(clip_range=1e-9),
        dict(objective="rebel"),
        dict(objective="rebel", rebel_scale=5.0),
        dict(kl_weight=5.0),
    ],
    ids=str,
)
def test_each_option_of_the_objective_changes_the_gradient(benches, changes):
    bench = benches("lcm")
    batch = bench.recorded()
    bench.move(0.1)
    scale = None if changes.get("rebel_scale") else dict(clip_range=1.0)
    base, _ = bench.gradient(bench.trainer(**(scale or dict(objective="rebel"))), batch)
    other, _ = bench.gradient(bench.trainer(**changes), batch)
    assert other.isfinite().all() and (other - base).norm() > 1e-3 * base.norm()


@pytest.mark.parametrize("changes", [dict(eta=0.5), dict(seed=1)], ids=str)
@pytest.mark.parametrize("name", ["sd", "lcm"])
def test_each_option_of_sampling_changes_the_samples(benches, name, changes):
    bench = benches(name)
    base = bench.recorded().trajectory
    (other,), _ = bench.sampled(bench.trainer(**changes))
    assert (other.trajectory.final - base.final).abs().max() > 1e-2


def test_statistics_of_the_prompt_of_the_batch_or_of_the_group(benches):
    bench, results = benches("lcm"), {}
    for name, changes in {
        "prompt": dict(buffer_size=8, buffer_min=4),  # too few yet
        "batch": dict(statistics="batch"),
        "group": dict(statistics="group"),
        "own": dict(buffer_size=8, buffer_min=2),
        "clipped": dict(statistics="batch", max_advantage=0.5),
    }.items():
        (batch,), values = bench.sampled(bench.trainer(**changes))
        results[name] = batch.advantages
        assert values.get("own_baseline_share") == {"prompt": 0.0, "own": 1.0}.get(name)
    torch.testing.assert_close(results["prompt"], results["batch"])
    torch.testing.assert_close(results["own"], results["group"])  # the two images of each prompt, so far
    assert (results["group"] - results["batch"]).abs().max() > 0.05
    torch.testing.assert_close(results["clipped"], results["batch"].clamp(-0.5, 0.5))
    assert abs(results["batch"].sum()) < 1e-5 and results["clipped"].abs().max() == 0.5


def test_a_share_of_the_steps_is_drawn_anew_in_every_iteration_or_taken_from_the_front(benches):
    trainer = benches("sd").trainer(timestep_fraction=0.5)
    chosen = [trainer.steps_to_train(k, [0, 1, 2, 3]) for k in range(12)]
    assert chosen == [trainer.steps_to_train(k, [0, 1, 2, 3]) for k in range(12)]
    assert all(len(c) == 2 and c == sorted(c) for c in chosen) and len({tuple(c) for c in chosen}) > 1
    first = benches("sd").trainer(timestep_fraction=0.5, timestep_choice="first")
    assert first.steps_to_train(5, [0, 1, 2, 3]) == [0, 1]
    assert benches("sd").trainer(timestep_fraction=0.1).steps_to_train(0, [0, 1]) in ([0], [1])


def test_samples_do_not_depend_on_the_size_of_batches(benches):
    bench = benches("lcm")
    (one,), _ = bench.sampled(bench.trainer())
    others, _ = bench.sampled(bench.trainer(batch_size=3))
    final = torch.cat([b.trajectory.final for b in others])
    torch.testing.assert_close(final, one.trajectory.final, rtol=0, atol=1e-5 * float(final.abs().max()))
    torch.testing.assert_close(torch.cat([b.advantages for b in others]), one.advantages, rtol=0, atol=1e-2)


def test_inner_epochs_and_updates_per_step_make_that_many_updates(benches):
    bench = benches("lcm")
    for changes, count in ((dict(updates_per_step=2), 2), (dict(inner_epochs=2, updates_per_step=2), 4)):
        bench.reset()
        updates, batch = bench.state.average.updates, bench.recorded()
        bench.trainer(**changes).update(0, [[batch], [batch]])
        assert bench.state.average.updates == updates + count


MISTAKES = [
    (dict(eta=0.0), "^eta: got 0.0"),
    (dict(num_steps=1), "^num_steps: got 1, expected >= 2"),
    (dict(timestep_fraction=0.0), "^timestep_fraction: got 0.0"),
    (dict(prompts_per_step=3, updates_per_step=2), "^prompts_per_step: got 3, expected a multiple"),
    (dict(group_size=0), "^group_size: got 0"),
    (dict(max_advantage=0.0), "^max_advantage: got 0.0"),
    (dict(kl_weight=-1.0), "^kl_weight: got -1.0"),
    (dict(clip_range=0.1, objective="rebel"), r"^clip_range: got 0.1 with objective 'rebel', expected none"),
    (dict(clip_range=0.0), "^clip_range: got 0.0, expected > 0"),
    (dict(rebel_scale=1.0), "^rebel_scale: got 1.0 with objective 'ppo'"),
    (dict(objective="rebel", group_size=3), "^group_size, batch_size: got 3, 4 with objective 'rebel'"),
    (dict(objective="rebel", batch_size=3), "^group_size, batch_size: got 2, 3"),
    (dict(statistics="group", group_size=1), "^group_size: got 1 with statistics 'group'"),
    (dict(statistics="batch", buffer_size=8), "^buffer_size, buffer_min: got one with statistics 'batch'"),
    (dict(buffer_size=8, buffer_min=9), "^min_count: got 9"),
    (dict(policy="text", lora_rank=0), "^lora_rank: got 0 with policy 'text'"),
    (dict(policy="both", release_text_encoders=True), "^release_text_encoders: got true with policy 'both'"),
    (dict(model="shapes-flow"), "^model: got 'shapes-flow', a flow model, .* the trainer for it is flow_grpo"),
]


@pytest.mark.parametrize("changes, message", MISTAKES, ids=str)
def test_mistakes_are_named_before_anything_is_loaded(given, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("visalign.pipeline.generator.Generator.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        main(Config(**{**given, **changes, "run_dir": str(tmp_path / "run")}))


def test_flow_grpo_names_this_trainer_when_it_refuses_a_model(options, folders, monkeypatch, tmp_path):
    monkeypatch.setattr("visalign.pipeline.generator.Generator.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for name, kind in (("sd", "diffusion"), ("lcm", "consistency")):
        cfg = flow_grpo.Config(**{**options, "model": str(folders / name), "run_dir": str(tmp_path / "run")})
        with pytest.raises(ValueError, match=f"a {kind} model, expected a flow model; the trainer for it is ddpo"):
            flow_grpo.main(cfg)


def test_every_option_is_read_by_the_trainer():
    used = set()
    for module in (
        ddpo,
        options,
        preflight,
        setup,
        outcome,
        doctor,
        sys.modules["visalign.training.loop.training_loop"],
    ):
        tree = ast.parse(Path(module.__file__).read_text())
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in CHECKS]
        skipped = {id(inner) for check in checks for inner in ast.walk(check)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner == "cfg" or owner == "self" and id(node) not in skipped:
                    used.add(node.attr)
            if isinstance(node, ast.FunctionDef) and node.name == "build":  # names given to getattr
                used |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert {f.name for f in fields(Config)} - used == set()


CHECKS = ("__post_init__", "_check_objective")
RECIPES = sorted(
    p for p in (Path(ddpo.__file__).parent / "recipes").glob("*.yaml") if "trainers/ddpo.py" in p.read_text()
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    cfg = parse_config(Config, ["--config", str(recipe)], prog="ddpo", description="x")
    assert asdict(cfg) != asdict(Config(model=cfg.model))


def test_there_are_recipes_for_the_presets():
    assert {"ddpo_sd15", "ddpo_sdxl", "rlcm_dreamshaper", "rlcm_rebel", "texforce_sd15"} <= {p.stem for p in RECIPES}


def test_pictures_are_scored_as_they_are_without_a_safety_checker(given, monkeypatch):
    load = Generator.from_pretrained

    def with_checker(*args, **kwargs):
        generator = load(*args, **kwargs)
        generator.pipeline.safety_checker = lambda *_, **__: pytest.fail("pictures are scored as they are")
        return generator

    monkeypatch.setattr(Generator, "from_pretrained", with_checker)
    cfg = Config(**given)
    parts = setup.build(cfg, preflight.make_plan(cfg, "ddpo"), Accelerator())
    assert parts.generator.pipeline.safety_checker is None
