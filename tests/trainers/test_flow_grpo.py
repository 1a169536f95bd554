"""The Flow-GRPO trainer: its loss on the shipped model, what each option changes, and two processes as one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from trainer_checks import scored

from visalign.advantages.group import group_advantages
from visalign.data.prompts import iteration_groups
from visalign.rewards import CombinedReward, Member, RewardOutput, as_reward, make_reward
from visalign.rewards.combine import Combine
from visalign.trainers import flow_grpo
from visalign.trainers.flow_grpo import Config, FlowGRPO, main
from visalign.training.before import preflight
from visalign.training.loop import setup
from visalign.training.loop.learning import rows_with_signal
from visalign.training.loop.scoring import Scorer
from visalign.training.loop.training_loop import TrainingLoop
from visalign.training.run import outcome
from visalign.training.run.checkpoint import load_checkpoint
from visalign.training.run.folder import Run, read_metrics


class Bench:
    """One built model, and trainers with different options over it."""

    def __init__(self, options, folder):
        self.cfg = Config(**options)
        self.accelerator = Accelerator()
        self.plan = preflight.make_plan(self.cfg)
        self.state = setup.build(self.cfg, self.plan, self.accelerator)
        self.run = Run(folder, main=True, total=2)
        self._recorded = []
        self.fresh = {k: v.clone() for k, v in self.state.policy.tensors().items()}

    def trainer(self, reward=None, threads=0, **changes) -> FlowGRPO:
        parts = replace(self.state, scorer=Scorer(reward, torch.device("cpu"), threads)) if reward else self.state
        return FlowGRPO(TrainingLoop(replace(self.cfg, **changes), self.plan, self.accelerator, parts, self.run))

    def sampled(self, trainer, step=0):
        cfg = trainer.cfg
        groups = iteration_groups(
            self.plan.prompts, step, cfg.prompts_per_step, cfg.group_size, cfg.seed, cfg.same_latents
        )
        submitted, scores = scored(trainer, trainer.sample(step, groups))
        (batches,) = scores.assign([submitted], trainer.advantages(scores))
        return batches, scores

    def recorded(self):
        """Fresh copies of the batches of an unmoved policy, with means; sampled once."""
        if not self._recorded:
            self._recorded, _ = self.sampled(self.trainer(ratio="guard"))
        return [replace(b, advantages=b.advantages.clone()) for b in self._recorded]

    def move(self, size=0.02, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for p in self.state.policy.trained.values():
            p.data += size * torch.randn(p.shape, generator=generator)

    def reset(self):
        self.state.policy.load(self.fresh)
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.optimizer.state.clear()

    def walk(self, batch, look, steps):
        trajectory, states = batch.trajectory, {i: batch.trajectory.latents[i] for i in steps}
        self.state.generator.denoise(trajectory.prompts, trajectory.seeds, look, latents=states)

    def gradient(self, trainer, batches, step=0):
        """The flat gradient of one pass over the batches, and the sums to log."""
        sums = {}
        for batch in batches:
            for name, value in trainer.backward(
                batch, trainer.steps_to_train(step, batch.trajectory.steps), 1.0
            ).items():
                sums[name] = sums.get(name, 0) + value
        parameters = self.state.policy.trained.values()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.state.optimizer.zero_grad(set_to_none=True)
        return flat, sums


@pytest.fixture(scope="module")
def bench(options, tmp_path_factory):
    bench = Bench({**options, "group_size": 3, "timestep_fraction": 1.0}, tmp_path_factory.mktemp("bench"))
    yield bench
    bench.run.close()


@pytest.fixture(autouse=True)
def as_built(request):
    yield
    if "bench" in request.fixturenames:
        request.getfixturevalue("bench").reset()


# The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8)])
@pytest.mark.parametrize("moved", [False, True])
def test_before_the_first_update_every_ratio_is_exactly_1_and_the_loss_is_minus_the_advantage(
    bench, sampler, eta, moved
):
    if moved:
        bench.move()
    for ratio in ("plain", "unscaled", "guard"):
        trainer = bench.trainer(sampler=sampler, eta=eta, ratio=ratio)
        (batch, *_), _ = bench.sampled(trainer)
        steps, seen = trainer.steps_to_train(0, batch.trajectory.steps), []
        assert steps == list(range(4 if sampler != "cps" else 3))

        def look(i, _latents, prediction, trainer=trainer, batch=batch, seen=seen):
            assert prediction.requires_grad
            loss, stats = trainer.loss(batch.trajectory, i, prediction, batch.advantages, None)
            assert torch.equal(loss, -batch.advantages)
            assert stats["ratio_mean"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0
            seen.append(i)

        bench.walk(batch, look, steps)
        assert seen == steps


def test_the_update_raises_the_likelihood_of_what_was_better(bench):
    trainer = bench.trainer(clip_range=10.0)
    batches, scores = bench.sampled(trainer)
    assert sum(len(b.group_ids) for b in batches) == 6 and scores.values()["zero_std_groups"] == 0
    assert abs(sum(b.advantages.sum().item() for b in batches)) < 1e-4
    trainer.update(0, [batches])
    gain = []

    def look(i, _latents, prediction, batch):
        log_prob = flow_grpo.recompute(batch.trajectory, i, prediction, trainer.transition).log_prob(
            batch.trajectory.next_latents[i]
        )
        gain.append(((log_prob - batch.trajectory.log_probs[i]) * batch.advantages).sum())

    with torch.no_grad():
        for batch in batches:
            bench.walk(batch, lambda *a, b=batch: look(*a, b), batch.trajectory.steps)
    assert sum(gain) > 0


def test_the_kl_alone_has_a_gradient_and_is_zero_for_a_fresh_lora(bench):
    trainer = bench.trainer(kl_weight=1.0)
    batches = bench.recorded()
    for batch in batches:
        batch.advantages.zero_()
    flat, sums = bench.gradient(trainer, batches)
    assert sums["kl"] == 0 and flat.abs().max() == 0  # a minimum
    bench.move()
    flat, sums = bench.gradient(trainer, batches)
    assert sums["kl"] > 0 and flat.norm() > 0
    none, _ = bench.gradient(bench.trainer(), batches)
    assert none.norm() == 0


def test_skipping_samples_without_signal_does_not_change_the_gradient(bench):
    batches = bench.recorded()
    bench.move()
    for batch in batches:
        batch.advantages[batch.group_ids == 0] = 0.0
    batches[-1].advantages[-1] = 0.0
    forwards = []
    hook = bench.state.policy.module.register_forward_pre_hook(
        lambda _m, args, kwargs: forwards.append(1), with_kwargs=True
    )
    whole, sums = bench.gradient(bench.trainer(skip_zero_advantages=False), batches)
    all_forwards = len(forwards)
    skipped, fewer = bench.gradient(bench.trainer(skip_zero_advantages=True), batches)
    hook.remove()
    assert whole.norm() > 0
    torch.testing.assert_close(skipped, whole, rtol=0, atol=1e-6 * float(whole.abs().max()) + 1e-9)
    assert len(forwards) - all_forwards < all_forwards and fewer["count"] < sums["count"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(ratio="unscaled"),
        dict(ratio="guard"),
        dict(step_weight="tempflow"),
        dict(step_weight="inverse_dt"),
        dict(clip_range=1e-9),
        dict(kl_weight=0.5),
        dict(timestep_fraction=0.5),
        dict(timestep_fraction=0.5, timestep_choice="random", seed=2),
    ],
    ids=str,
)
def test_each_option_of_the_objective_changes_the_gradient(bench, changes):
    batches = bench.recorded()
    bench.move()
    base, _ = bench.gradient(bench.trainer(clip_range=1.0), batches)
    other, _ = bench.gradient(bench.trainer(**{"clip_range": 1.0, **changes}), batches)
    assert other.isfinite().all() and (other - base).norm() > 1e-3 * base.norm()


def test_the_kinds_of_kl_differ(bench):
    batches = bench.recorded()
    bench.move()
    gradients = {}
    for kind in ("gaussian", "flow_grpo", "x", "v"):
        for batch in batches:
            batch.advantages.zero_()
        gradients[kind], sums = bench.gradient(bench.trainer(kl_weight=1.0, kl_type=kind), batches)
        assert sums["kl"] > 0 and gradients[kind].norm() > 0
    names = list(gradients)
    for a, b in zip(names, names[1:] + names[:1]):
        assert (gradients[a] - gradients[b]).norm() > 0.1 * min(gradients[a].norm(), gradients[b].norm())


def test_random_choice_of_trained_steps_changes_from_step_to_step_and_repeats(bench):
    trainer = bench.trainer(timestep_fraction=0.5, timestep_choice="random")
    chosen = [trainer.steps_to_train(k, [0, 1, 2, 3]) for k in range(12)]
    assert chosen == [trainer.steps_to_train(k, [0, 1, 2, 3]) for k in range(12)]
    assert all(len(c) == 2 and c == sorted(c) for c in chosen) and len({tuple(c) for c in chosen}) > 1
    assert bench.trainer(timestep_fraction=0.5).steps_to_train(5, [0, 1, 2, 3]) == [0, 1]


def test_advantages_by_the_group_or_over_all(bench):
    _, scores = bench.sampled(bench.trainer())
    scores = replace(scores, total=scores.total * torch.where(scores.group_ids == 0, 100.0, 1.0))
    results = {}
    for std, clip in (("global", 5.0), ("group", 5.0), ("group", 0.5)):
        results[std, clip] = bench.trainer(advantage_std=std, max_advantage=clip).advantages(scores)
    assert (results["global", 5.0] - results["group", 5.0]).abs().max() > 0.1
    assert results["group", 0.5].abs().max() == 0.5 < results["group", 5.0].abs().max()


def test_a_combination_that_needs_all_samples_gets_them_and_failures_get_no_advantage(bench):
    """Members' scores of all batches are combined at once, however the batches were cut."""
    reward = make_reward({"rewards": ["jpeg_compressibility", "gold"], "combine": "correlation"})
    results = []
    for size in (2, 6):
        trainer = bench.trainer(reward, batch_size=size)
        batches, scores = bench.sampled(trainer)
        assert len(batches) == 6 // size and {"reward_gold", "reward_jpeg_compressibility"} <= set(scores.values())
        results.append(torch.cat([b.advantages for b in batches]))
        wanted = reward.combine(scores.shaped, torch.cat([b.group_ids for b in batches])).float()
        torch.testing.assert_close(results[-1], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    failed = replace(scores, valid=torch.tensor([False] + [True] * 5))
    advantages = trainer.advantages(failed)
    assert failed.values()["failed_scores"] == 1
    assert advantages[0] == 0 and torch.equal(advantages[1:], results[-1][1:])


def test_combined_scores_become_advantages_in_their_groups_and_are_combined_once(bench, monkeypatch):
    reward, asked, whole = (
        make_reward({"rewards": ["jpeg_compressibility", "gold"], "combine": "min"}),
        [],
        Scorer.combine,
    )
    monkeypatch.setattr(Scorer, "combine", lambda self, *given: asked.append(given) or whole(self, *given))
    trainer = bench.trainer(reward, batch_size=2)
    batches, scores = bench.sampled(trainer)
    assert len(asked) == 1
    values, lowest = scores.values(), scores.shaped.amin(0).float()
    wanted = group_advantages(lowest, torch.cat([b.group_ids for b in batches]), std="global")
    torch.testing.assert_close(torch.cat([b.advantages for b in batches]), wanted, atol=1e-4, rtol=0)
    assert values["reward_mean"] == pytest.approx(lowest.mean().item(), abs=1e-5)


def test_a_failing_reward_takes_the_samples_advantage_only_if_it_counts(bench):
    def fails_on_the_first(images):
        return RewardOutput(images.flatten(1).std(1), valid=torch.arange(len(images)) > 0)

    for weight, gates, valid in ((0.0, {}, True), (0.0, {"picky": -1.0}, False), (1.0, {}, False)):
        members = [Member("jpeg", 1.0, make_reward("jpeg_compressibility"))]
        members.append(Member("picky", weight, as_reward(fails_on_the_first, "picky")))
        combine = Combine("gated", {"gates": gates}) if gates else Combine()
        trainer = bench.trainer(CombinedReward(members, combine), batch_size=6)
        (batch,), scores = bench.sampled(trainer)
        assert (scores.values()["failed_scores"] == 0) == (batch.advantages[0] != 0) == valid
        assert batch.advantages[1:].all()


def test_a_groupwise_reward_sees_whole_groups_whatever_the_batch_size(bench):
    class Best:
        """1 for the brightest of its group, 0 for the others."""

        name, kind, differentiable, range, needs = "best", "groupwise", False, (0.0, 1.0), ()

        def __call__(self, images, prompts, context=None):
            light, ids = images.flatten(1).mean(1), context["group_ids"]
            return torch.stack([(light[i] == light[ids == ids[i]].max()).float() for i in range(len(light))])

    trainer = bench.trainer(Best(), batch_size=2)  # groups of three
    _, scores = bench.sampled(trainer)
    rewards, ids = scores.total, scores.group_ids
    assert [float(rewards[ids == k].sum()) for k in (0, 1)] == [1.0, 1.0]


def test_scoring_in_threads_changes_nothing(bench):
    results = []
    for threads in (0, 2):
        trainer = bench.trainer(make_reward("jpeg_compressibility+gold"), threads, batch_size=2)
        batches, scores = bench.sampled(trainer)
        results.append((torch.cat([b.advantages for b in batches]), scores.values()["reward_mean"]))
        trainer.scorer.close()
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


# Sampling --------------------------------------------------------------------------------------------------------


def final(bench, **changes):
    batches, _ = bench.sampled(bench.trainer(**changes))
    return torch.cat([b.trajectory.final for b in batches]), batches[0].trajectory


@pytest.mark.parametrize(
    "changes, steps",
    [
        (dict(eta=0.3), [0, 1, 2, 3]),
        (dict(sampler="dance_sde"), [0, 1, 2, 3]),
        (dict(sampler="cps"), [0, 1, 2]),
        (dict(window="random", window_size=2, window_span=(0, 2)), [0, 1]),
        (dict(window="early"), [1, 2]),
        (dict(window="mix_random", window_size=1), None),
        (dict(window="progressive", window_size=1, window_iterations=2), [0]),
        (dict(window="decay", window_size=1), [0]),
        (dict(window="exp_decay", window_size=1), [0]),
        (dict(seed=1), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_each_option_of_sampling_changes_the_samples(bench, changes, steps):
    base, _ = final(bench)
    other, trajectory = final(bench, **changes)
    assert (other - base).abs().max() > 1e-2
    assert steps is None or trajectory.steps == steps
    assert set(trajectory.log_probs) == set(trajectory.steps)


def test_what_follows_the_window_can_be_solved_otherwise(bench):
    window = dict(window="progressive", window_size=1, window_iterations=1)
    base, _ = final(bench, **window)
    for changes in (dict(solver="dpm2m"), dict(post_ratio=0.5), dict(solver="dpm2m", post_ratio=0.5)):
        other, trajectory = final(bench, **window, **changes)
        assert (other - base).abs().max() > 1e-4 and trajectory.steps == [0]
    batches, _ = bench.sampled(bench.trainer(**window), step=1)
    assert batches[0].trajectory.steps == [1]


def test_after_the_early_window_a_second_order_solver_takes_about_half_of_the_steps(bench):
    early, _ = final(bench, window="early", window_size=1)
    same, _ = final(bench, window="early", window_size=1, solver="dpm2m", post_ratio=0.5)
    plain, _ = final(bench, window="early", window_size=1, solver="ode", post_ratio=1.0)
    assert torch.equal(early, same) and (early - plain).abs().max() > 1e-4
    trainer = bench.trainer(window="early", timestep_fraction=None)
    assert trainer.steps_to_train(0, [1, 2]) == [1, 2]
    assert bench.trainer(window="all", timestep_fraction=None).steps_to_train(0, [0, 1, 2, 3]) == [0, 1, 2]


def test_a_group_can_share_its_first_noise(bench):
    _, apart = final(bench)
    _, shared = final(bench, same_latents=True)
    assert not torch.equal(apart.latents[0][0], apart.latents[0][1])
    assert torch.equal(shared.latents[0][0], shared.latents[0][1])
    assert not torch.equal(shared.next_latents[0][0], shared.next_latents[0][1])


def test_samples_do_not_depend_on_the_size_of_batches(bench):
    one, _ = final(bench, batch_size=6)
    for size in (1, 4):
        other, _ = final(bench, batch_size=size)
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


# Updates ---------------------------------------------------------------------------------------------------------


def test_inner_epochs_and_updates_per_step_make_that_many_updates(bench):
    for changes, count in ((dict(), 1), (dict(updates_per_step=2), 2), (dict(inner_epochs=2, updates_per_step=2), 4)):
        trainer = bench.trainer(**changes)
        bench.reset()
        batches = bench.recorded()
        shares = [[b] for b in batches] if count > 1 else [batches]
        before, bench.state.average.updates = bench.state.average.updates, 0
        values = trainer.update(0, shares)
        assert bench.state.average.updates == count
        assert (values["ratio_mean"] == 1) == (count == 1)
        bench.state.average.updates = before


def test_the_gradient_norm_is_clipped(bench):
    trainer = bench.trainer()
    batches = bench.recorded()
    norms = {}
    for limit in (0.0, 1e-6):
        bench.reset()
        bench.state.max_grad_norm = limit
        norms[limit] = trainer.update(0, [batches])["grad_norm"]
        state = next(iter(bench.state.optimizer.state.values()))
        total = sum(float(s["exp_avg"].norm()) ** 2 for s in bench.state.optimizer.state.values()) ** 0.5 / 0.1
        assert state["step"] == 1 and total == pytest.approx(min(norms[limit], limit or 1e9), rel=1e-3)
    bench.state.max_grad_norm = 1.0
    assert norms[0.0] > 1e-6 and norms[1e-6] == pytest.approx(norms[0.0]), "reported before clipping"


# Whole runs ------------------------------------------------------------------------------------------------------


def test_all_weights_can_be_trained_resumed_and_loaded_elsewhere(options, tmp_path):
    from diffusers import SD3Transformer2DModel

    full = {**options, "lora_rank": 0, "kl_weight": 0.1, "run_dir": str(tmp_path / "run")}
    folder = main(Config(**full, gradient_checkpointing=True))
    whole = load_checkpoint(folder / "checkpoints" / "step-2")[0]
    model = SD3Transformer2DModel.from_pretrained(folder / "weights")
    stock = SD3Transformer2DModel.from_pretrained(Path(preflight.resolve_model("shapes-flow")) / "transformer")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[k], v) for k, v in whole["ema"].items())
    assert any(not torch.equal(loaded[k], p.float()) for k, p in stock.named_parameters())
    checkpoints = folder / "checkpoints"
    main(Config(**full, resume=str(checkpoints / "step-1")))
    again = load_checkpoint(checkpoints / "step-2")[0]
    torch.testing.assert_close(again["trained"], whole["trained"], rtol=0, atol=1e-6)  # one recomputes, one does not
    metrics = read_metrics(folder / "metrics.jsonl")
    assert metrics[1]["kl"] == 0 < metrics[2]["kl"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_encoders_can_be_released_and_blocks_compiled(options, tmp_path, monkeypatch):
    """Compiled for real: the same predictions and gradients as without, within rounding, by code of the compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    cfg = Config(**options)
    with torch.no_grad():
        plain = setup.build(cfg, preflight.make_plan(cfg), Accelerator())
        other = replace(cfg, release_text_encoders=True, compile=True, attention="sdpa")
        parts = setup.build(other, preflight.make_plan(other), Accelerator())
        assert parts.attention == "sdpa"
        assert parts.generator.pipeline.text_encoder is None
        prompts = ["a red circle", "a blue star"]  # one of each set
        latents = plain.generator.noise(prompts, [1, 2])
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    results = []
    for state in (plain, parts):
        prediction = state.generator.predict(latents, 1, prompts)
        prediction.square().mean().backward()
        flat = torch.cat([p.grad.flatten() for _, p in sorted(state.policy.trained.items())])
        results.append((prediction.detach(), flat))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > made, "nothing was compiled"
    assert list((tmp_path / "inductor").rglob("*.cpp")), "the compiler wrote no code"
    for name, mine, compiled in zip(("prediction", "gradient"), *results):
        torch.testing.assert_close(compiled, mine, rtol=0, atol=1e-4 * float(mine.abs().max()), msg=name)
    with pytest.raises(ValueError, match="attention: got 'flash', which needs a GPU"):
        setup.build(replace(cfg, attention="flash"), preflight.make_plan(cfg), Accelerator())


def copy_of(trajectory):
    return replace(trajectory.take(range(len(trajectory))), whole=None, rows=None, gaps=[])


@pytest.mark.parametrize("ratio", ["plain", "unscaled", "guard"])
def test_until_the_first_update_ratios_are_1_whatever_rounding_did_to_the_record(bench, ratio):
    """Noise on the recorded log-probabilities and means stands for bf16's, far beyond the clip range."""
    trainer = bench.trainer(ratio=ratio, inner_epochs=2, kl_weight=0.0)
    clean, noisy = bench.recorded(), bench.recorded()
    clean, noisy = ([replace(b, trajectory=copy_of(b.trajectory)) for b in batches] for batches in (clean, noisy))
    for batch in noisy:
        for record in (batch.trajectory.log_probs, batch.trajectory.means):
            for step in record:
                record[step] += 0.01 * (1 + torch.rand_like(record[step]))
    results = []
    for batches in (clean, noisy):
        bench.reset()
        values = trainer.update(0, [batches])
        results.append((values, {k: v.clone() for k, v in bench.state.policy.tensors().items()}))
        assert not any(batch.trajectory.fresh for batch in batches)
    assert results[0][0]["log_prob_rounding"] < 1e-6 < 0.01 < results[1][0]["log_prob_rounding"] < 0.021
    for name, value in results[0][1].items():  # both passes: the second compares with what the first recorded anew
        torch.testing.assert_close(results[1][1][name], value, rtol=0, atol=1e-7)


def test_samples_without_signal_stay_where_leaving_them_out_would_change_the_others(bench):
    (batch, *_) = bench.recorded()
    advantages = torch.zeros(len(batch.trajectory))
    advantages[1] = 1.0
    every = list(range(len(advantages)))
    trajectory = copy_of(batch.trajectory)
    assert rows_with_signal(trajectory, advantages, exact=True) == [1]
    assert rows_with_signal(trajectory, advantages, exact=False) == every
    assert rows_with_signal(trajectory, 0 * advantages, exact=False) == []
    trajectory.fresh = True
    assert rows_with_signal(trajectory, advantages, exact=False) == [1]
    trajectory.fresh, trajectory.gaps = False, [torch.zeros(())]  # recorded anew by an earlier pass, of this row alone
    assert rows_with_signal(trajectory, advantages, exact=False) == [1]


def test_rounding_beyond_a_tenth_of_the_clip_range_is_said_once(bench, capsys):
    bench.run.said_rounding = False
    for rounding, said in ((0.9e-5, False), (1.1e-5, True), (1.0, False)):
        outcome.say_rounding(bench.run, bench.trainer(clip_range=1e-4).cfg, {"log_prob_rounding": rounding})
        assert ("differ by up to" in capsys.readouterr().err) == said
