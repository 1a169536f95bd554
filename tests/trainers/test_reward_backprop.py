"""The trainer with a reward's gradient: its gradients on the shipped model, what each option changes, whole runs."""

import ast
import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import diffusers as df
import pytest
import tiny_pipelines as tiny
import torch
import trainer_checks
from accelerate import Accelerator
from PIL import Image

from visalign.data.pictures import PictureFolder
from visalign.data.prompts import iteration_groups
from visalign.pipeline.encoding import Encoder
from visalign.pipeline.generator import Generator
from visalign.rewards import make_reward
from visalign.rewards.base import as_reward, reward_factory
from visalign.sampling.backprop import checkpointed, truncated_rollout
from visalign.trainers import reward_backprop
from visalign.trainers.reward_backprop import Config, RewardBackprop, main
from visalign.training.before import options, preflight
from visalign.training.before.config import parse_config
from visalign.training.loop import setup
from visalign.training.loop import training_loop as loop
from visalign.training.loop.scoring import Scorer
from visalign.training.loop.training_loop import TrainingLoop
from visalign.training.policy import scaled_change
from visalign.training.reward_gradient import options as backprop_options
from visalign.training.reward_gradient import parts as backprop_parts
from visalign.training.reward_gradient.parts import UpdateLog, batches
from visalign.training.run import outcome
from visalign.training.run.folder import Run, read_metrics
from visalign.transitions import ode_of
from visalign.worlds.shapes.pictures import DrawnPictures

REWARDS = """
def bright(images, prompts):
    return images.flatten(1).mean(1) + 0.1 * images.flatten(1).std(1)
def liar(images, prompts):
    return images.detach().flatten(1).mean(1)
def silent(images, prompts):
    return images.flatten(1).mean(1)
def crowd(images, prompts):
    return images.flatten(1).mean(1) - images.mean()
crowd.kind = "groupwise"
crowd.differentiable = True
bright.differentiable = liar.differentiable = True
"""
CYCLE = dict(data="shapes", component="transformer", reward="controlnet_cycle")
METHODS = {
    "draft": {},
    "draft_lv": {},
    "alignprop": {},
    "refl": {},
    "srpo": {},
    "instructvideo": dict(data="shapes"),
    "controlnet": dict(time_span=(0, 1000), **CYCLE),
    "ctrl_u": dict(time_span=(0, 1000), ramp_steps=0, **CYCLE),
}


@pytest.fixture(scope="module")
def base(world_files):
    """Options of a run that takes seconds."""
    (world_files / "gradient_rewards.py").write_text(REWARDS)
    files = dict(prompts=str(world_files / "train.txt"), eval_prompts=str(world_files / "test.txt"))
    sizes = dict(steps=2, num_steps=4, prompts_per_step=2, batch_size=2, eval_count=2, lora_rank=4, levels_per_step=4)
    return {**files, **sizes, "monitor": "off"}


@pytest.fixture(scope="module")
def bright(world_files):
    return f"{world_files / 'gradient_rewards.py'}:bright"


class Bench:
    """One built model with a moved LoRA, and trainers with different options over it."""

    def __init__(self, given, folder):
        self.cfg = Config(**given)
        self.accelerator = Accelerator()
        self.plan = preflight.make_plan(self.cfg, "reward_backprop")
        self.state = setup.build(self.cfg, self.plan, self.accelerator)
        self.run = Run(folder, main=True, total=2)
        generator = torch.Generator().manual_seed(0)
        for p in self.state.policy.trained.values():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
        self.fresh = {k: v.clone() for k, v in self.state.policy.tensors().items()}
        self.known = {}

    def trainer(self, **changes) -> RewardBackprop:
        cfg = replace(self.cfg, **changes)
        scorer = Scorer(make_reward(cfg.reward), torch.device("cpu"))
        pictures = DrawnPictures() if cfg.data else None
        state, plan = replace(self.state, scorer=scorer), replace(self.plan, pictures=pictures)
        return RewardBackprop(TrainingLoop(cfg, plan, self.accelerator, state, self.run))

    def groups(self, trainer, step=0):
        cfg = trainer.cfg
        return iteration_groups(self.plan.prompts, step, cfg.prompts_per_step, cfg.group_size, cfg.seed)

    def gradient(self, step=0, groups=None, trainer=None, **changes):
        """The flat gradient of one update, which is not made, and what it would log."""
        trainer = trainer or self.trainer(**changes)
        kept = []

        def keep(_accelerator, _step):
            kept.extend(
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in self.state.policy.trained.values()
            )
            self.state.optimizer.zero_grad(set_to_none=True)
            return 0.0

        trainer.state.apply_gradients = keep
        groups = self.groups(trainer, step) if groups is None else groups
        values, log, _ = trainer.update(step, groups)
        return torch.cat(kept), values, log

    def remembered(self, **changes):
        """The gradient, taken once for each set of changes."""
        key = json.dumps(changes)
        if key not in self.known:
            self.known[key] = self.gradient(**changes)[0]
        return self.known[key]


@pytest.fixture(scope="module")
def bench(base, bright, tmp_path_factory):
    bench = Bench({**base, "reward": bright}, tmp_path_factory.mktemp("bench"))
    yield bench
    bench.run.close()


def close(one, other, tolerance=1e-4):
    return (one - other).norm() <= tolerance * max(one.norm(), other.norm())


# Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_gradient_that_does_not_depend_on_batches_or_processes(bench, method):
    changes = dict(method=method, **METHODS[method])
    changes |= dict(levels_per_step=2) if changes.get("data") else {}  # it would be refused without effect
    whole, values, log = bench.gradient(**changes)
    assert whole.norm() > 0 and whole.isfinite().all() and values["scored"] == 2
    assert sum(len(images) for images, _ in log.images) == 2
    again, _, _ = bench.gradient(**{**changes, "batch_size": 1})
    assert close(again, whole, 1e-3)
    groups = bench.groups(bench.trainer(**changes))
    halves = [bench.gradient(groups=groups[k::2], **changes)[0] for k in (0, 1)]  # as two processes share them
    assert close(halves[0] + halves[1], whole, 1e-3)


def test_draft_over_all_steps_is_the_slope_of_the_reward_along_any_direction(bench):
    trainer = bench.trainer(grad_steps=4)
    gradient, values, _ = bench.gradient(trainer=trainer)
    direction = gradient / gradient.norm()
    ends = []
    for sign in (1, -1):
        moved = torch.cat([p.flatten() for p in bench.fresh.values()]) + sign * 2e-4 * direction
        parts = moved.split([p.numel() for p in bench.fresh.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(bench.fresh.items(), parts)}
        with bench.state.policy.swapped(named):
            ends.append(bench.gradient(trainer=trainer)[1]["reward_mean"])
    assert (ends[0] - ends[1]) / 4e-4 == pytest.approx(-float(gradient.norm()), rel=0.03), "the loss falls, it rises"


def test_only_the_policy_gets_gradients_and_only_the_last_calls_have_one(bench):
    seen = []
    hook = bench.state.policy.module.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    trainer = bench.trainer(grad_steps=2, reward="clip_match")
    for batch in batches(trainer.cfg, trainer.generator, None, None, bench.groups(trainer)):
        trainer.learn_by_reward(0, batch, UpdateLog(), 1.0)
    hook.remove()
    assert seen == [False, False, True, True] + [False] * 4, "the last four are stubs, on the way to the decoder"
    pipeline, reward = trainer.generator.pipeline, trainer.state.scorer.reward
    own = {id(p) for p in bench.state.policy.trained.values()}
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)] + [reward._clip.encoder.model]
    assert all(p.grad is None for m in modules for p in m.parameters() if id(p) not in own)
    assert any(p.grad is not None for p in bench.state.policy.trained.values())
    bench.state.optimizer.zero_grad(set_to_none=True)


def saved_bytes(function):
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return sum(size for size, _ in seen.values()), out


def test_refl_scores_the_last_quarter_and_cuts_are_functions_of_seed_and_iteration(bench, monkeypatch):
    cuts = {}

    def no_rollout(*_, cut, **__):
        cuts[method].append(cut)
        return SimpleNamespace(result=None, states={})

    monkeypatch.setattr(reward_backprop, "truncated_rollout", no_rollout)
    for method in ("refl", "alignprop"):
        trainer = bench.trainer(method=method)
        trainer.cfg, cuts[method] = replace(trainer.cfg, num_steps=40), []
        for start in (0, 3):  # the samples of two processes
            batch = backprop_parts.Batch(torch.arange(1), ["a"], [start], [start], 0, {})
            for step in range(100):
                assert len(list(trainer.estimates(step, batch))) == 1
        assert cuts[method][:100] == cuts[method][100:]
    assert (min(cuts["refl"]), max(cuts["refl"])) == (30, 39)
    assert min(cuts["alignprop"]) < 4 and max(cuts["alignprop"]) > 35


def test_memory_with_one_step_of_gradient_is_flat_in_the_number_of_steps():
    kept = {}
    pipeline = tiny.make("Stable Diffusion 3")
    for steps in (5, 20, 50):
        with Generator(pipeline, num_steps=steps, calibrate=False, height=32, width=32, max_sequence_length=8) as g:
            call = (g, ["a red circle"], [0], ode_of(g.schedule))
            kept[steps] = saved_bytes(lambda call=call, n=steps: truncated_rollout(*call, n - 1))[0]
            two = saved_bytes(lambda call=call, n=steps: truncated_rollout(*call, n - 2))[0]
            refl = saved_bytes(lambda call=call, n=steps: truncated_rollout(*call, n - 2, jump=True))[0]
            assert refl <= 1.05 * kept[steps]
        assert two > 1.5 * kept[steps]
    assert max(kept.values()) <= 1.05 * min(kept.values())


def test_recomputing_changes_no_gradient_and_saves_memory(bench):
    plain, _, _ = bench.gradient(grad_steps=2)
    for option in ("checkpoint_calls", "decode_checkpointing", "decode_slicing", "decode_tiling"):
        other, _, _ = bench.gradient(grad_steps=2, **{option: True})
        assert close(plain, other, 1e-4), option
    vae = bench.state.generator.pipeline.vae
    vae.disable_slicing()
    vae.disable_tiling()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes, gradients = [], []
    for calls in ([], [(vae, "_decode")]):
        with checkpointed(*calls):
            size, images = saved_bytes(lambda: bench.state.generator.decode(latents, ["a", "b"]))
        sizes.append(size)
        gradients.append(torch.autograd.grad(images.square().sum(), latents)[0])
    assert sizes[1] < 0.2 * sizes[0]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    swapped = latents.detach().flip(0).requires_grad_()
    (other,) = torch.autograd.grad(bench.state.generator.decode(swapped, ["b", "a"]).square().sum(), swapped)
    torch.testing.assert_close(other.flip(0), gradients[0], rtol=1e-3, atol=1e-5)


def test_the_clamp_of_the_decoder_lets_no_gradient_through_outside(bench, monkeypatch):
    generator = bench.state.generator
    monkeypatch.setattr(generator.pipeline.vae, "decode", lambda z, return_dict=False: (z[:, :3],))
    latents = torch.zeros(1, 4, 16, 16)
    latents[0, 0, 0, 0], latents[0, 0, 0, 1] = 50.0, -50.0
    latents.requires_grad_()
    images = generator.decode(latents, ["a"])
    (gradient,) = torch.autograd.grad(images.mean(), latents)
    assert gradient[0, 0, 0, 0] == 0 == gradient[0, 0, 0, 1] and gradient[0, 0, 1, 1] > 0
    step = torch.zeros_like(latents)
    step[0, 1, 3, 3] = 0.01
    with torch.no_grad():
        ends = [generator.decode(latents + s * step, ["a"]).double().mean() for s in (1, -1)]
    assert (ends[0] - ends[1]).item() / 0.02 == pytest.approx(gradient[0, 1, 3, 3].item(), rel=0.05)


def test_a_prediction_at_another_steps_timestep_is_that_steps(bench):
    generator = bench.state.generator
    x = generator.noise(["a red circle"], [0])
    with torch.no_grad():
        wanted = generator.predict(x, 2, ["a red circle"])
        found = generator.predict(x, 0, ["a red circle"], timestep=generator.schedule.times[2])
    torch.testing.assert_close(found, wanted)
    assert generator.level_at(generator.schedule.times[2]) == pytest.approx(generator.schedule.levels[2])
    with pytest.raises(ValueError, match="timestep: got 2000"):
        generator.level_at(2000)


# Options ---------------------------------------------------------------------------------------------------------

TWO = dict(grad_steps=2)
OPTIONS = [
    ({}, dict(grad_steps=2)),
    ({}, dict(seed=1)),
    ({}, dict(group_size=2)),
    ({}, dict(reward_weight=0.5)),
    ({}, dict(objective="target", threshold=0.0)),
    (dict(reward="clip"), dict(worst_case=5.0)),
    ({}, dict(augment=2)),
    (dict(augment=1), dict(augment_crop=0.5)),
    (dict(augment=1), dict(augment_noise=0.3)),
    (dict(reward="clip_match"), dict(positive="Blue", negative="Red")),
    (dict(reward="clip_match", augment=4), dict(augment_flip=True)),
    ({}, dict(anchor_weight=1.0)),
    (dict(anchor_weight=1.0, prompts_per_step=4), dict(levels_per_step=1)),
    ({}, dict(start_decay=0.1)),
    ({}, dict(data="shapes", data_weight=1.0)),
    (dict(data="shapes", data_weight=1.0), dict(min_snr=0.1)),
    ({}, dict(sampler="flow_sde")),
    (TWO, dict(sampler="cps")),
    (dict(sampler="flow_sde"), dict(eta=0.2)),
    (dict(sampler="flow_sde"), dict(kl_weight=0.1)),
    (dict(method="draft_lv"), dict(noises=1)),
    (dict(method="refl"), dict(jump_span=(0, 1))),
    (dict(method="alignprop", cut="fixed"), dict(cut="gaussian", seed=2)),
    (dict(method="srpo"), dict(align_span=(0.5, 0.3))),
    (dict(method="srpo"), dict(data="shapes")),
    (dict(method="instructvideo", data="shapes"), dict(strength=1.0)),
    (dict(method="instructvideo", data="shapes"), dict(noise_offset=2.0)),
    (dict(method="ctrl_u", **METHODS["ctrl_u"]), dict(doubt_weight=100.0)),
    (dict(method="ctrl_u", **METHODS["ctrl_u"], reward_weight=100.0), dict(ramp_steps=100)),
    (dict(method="controlnet", **METHODS["controlnet"], reward_weight=100.0), dict(time_span=(0, 1))),
]


@pytest.mark.parametrize("given, changes", OPTIONS, ids=lambda c: "-".join(map(str, c)) or "default")
def test_each_option_changes_the_gradient(bench, given, changes):
    reward = {} if "reward" in given or given.get("method") != "srpo" else dict(reward="clip_match")
    one = bench.remembered(**{**reward, **given})
    other, _, _ = bench.gradient(**{**reward, **given, **changes})
    assert other.isfinite().all() and (other - one).norm() > 1e-4 * one.norm()


def test_a_hinge_that_is_met_has_no_gradient(bench):
    assert bench.gradient(objective="hinge", threshold=-1.0)[0].abs().max() == 0
    assert close(bench.gradient(objective="hinge", threshold=9.0)[0], bench.gradient()[0])


def test_a_normalised_mix_does_not_mind_the_scale_of_a_reward(bench, bright):
    one = bench.gradient(reward=f"{bright}:1+clip:1", reward_mix="plain")[0]
    trainer = bench.trainer(reward=f"{bright}:1+clip:1", reward_mix="normalised")
    mixed = bench.gradient(trainer=trainer)[0]
    member = trainer.reward.reward.members[0].reward
    function, member._function = member._function, lambda images, prompts: 1000 * function(images, prompts)
    assert close(bench.gradient(trainer=trainer)[0], mixed) and not close(one, mixed, 0.1)
    member._function = function


def test_outside_the_time_mask_only_the_denoising_loss_is_left(bench):
    given = {**METHODS["controlnet"], "method": "controlnet", "prompts_per_step": 4}
    masked, values, log = bench.gradient(**{**given, "time_span": (0, 1), "reward_weight": 100.0})
    assert values["scored"] == 0 and not log.images and values["data_loss"] > 0
    assert close(masked, bench.gradient(**{**given, "reward_weight": 0.0})[0]) and masked.norm() > 0
    ramped = bench.gradient(**{**given, "method": "ctrl_u", "doubt_weight": 0.0, "ramp_steps": 9})[0]
    assert close(ramped, masked, 0.05), "both passes' mean, a thousandth apart"


def test_staying_close_costs_nothing_at_the_start(bench):
    zero = {name: torch.zeros_like(v) if ".lora_B." in name else v for name, v in bench.fresh.items()}
    with bench.state.policy.swapped(zero):
        for given in (dict(anchor_weight=1.0), dict(kl_weight=1.0, sampler="flow_sde"), dict(start_decay=1.0)):
            flat, values, _ = bench.gradient(reward_weight=0.0, **given)
            assert flat.abs().max() < 1e-9 and values.get("kl", 0) == 0 == values.get("anchor", 0)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bench):
    trainer = bench.trainer()
    before = {k: v.clone() for k, v in bench.state.policy.tensors().items()}

    def nothing(images, prompts):
        return images.flatten(1).sum(1) * torch.nan

    nothing.differentiable = True
    trainer.reward = replace(trainer.reward, reward=as_reward(nothing))
    values, log, _ = trainer.update(0, bench.groups(trainer))
    assert trainer.state.skipped == 1 and values["skipped_updates"] == 1 and not log.images
    assert all(torch.equal(v, before[k]) for k, v in bench.state.policy.tensors().items())


def test_the_change_of_the_weights_can_be_scaled_away(bench):
    generator, policy = bench.state.generator, bench.state.policy
    with torch.no_grad():
        x = generator.noise(["a red circle"], [0])
        with policy.reference():
            wanted = generator.predict(x, 1, ["a red circle"])
        outputs = {}
        for scale in (0.0, 0.5, 1.0):
            with policy.swapped(scaled_change(policy, policy.tensors(), scale)):
                outputs[scale] = generator.predict(x, 1, ["a red circle"])
    assert torch.equal(outputs[0.0], wanted)
    assert 0 < (outputs[0.5] - wanted).norm() < (outputs[1.0] - wanted).norm()


# What is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, monkeypatch, capsys, tmp_path):
    """Run the command line where it must fail before loading; returns the line."""

    def run(**changes):
        given = {**base, "run_dir": str(tmp_path / "run"), **changes}
        argv = [f"--{k}={v}" for k, v in given.items() if v is not None]
        error = trainer_checks.refused(reward_backprop, argv, monkeypatch, capsys)
        assert not (tmp_path / "run").exists()
        return error

    return run


def test_a_reward_without_gradient_is_refused_with_the_trainers_that_can_use_it(refused, bench, world_files):
    for reward in ("gold", "clip:0.5+jpeg_compressibility:0.5"):
        error = refused(reward=reward)
        assert "which has no gradient, expected a differentiable one; it can be used by" in error
        assert "flow_grpo" in error and "reward_backprop," not in error
    assert "set NAME.differentiable = True" in refused(reward=f"{world_files / 'gradient_rewards.py'}:silent")
    with pytest.raises(ValueError, match=r"rewards: got a result of .* without grad_fn"):
        bench.gradient(reward=f"{world_files / 'gradient_rewards.py'}:liar")


MISTAKES = [
    (dict(noises=2), "noises: got 2 with method 'draft', expected None"),
    (dict(method="refl", grad_steps=2), "grad_steps: got 2 with method 'refl'"),
    (dict(grad_steps=5), "grad_steps: got 5, expected within [1, 4]"),
    (dict(method="controlnet"), "data: got None for method 'controlnet'"),
    (dict(data="shapes"), "data: got 'shapes' with method 'draft' and data_weight 0"),
    (
        dict(method="instructvideo", data="none", prompts="shapes", eval_prompts=None),
        "data: got 'none', expected 'shapes' or a folder",
    ),
    (dict(method="instructvideo", data="folder"), "prompts: got"),
    (dict(method="instructvideo", data="folder", prompts="shapes"), "whose captions are the prompts"),
    (dict(method="instructvideo", data="shapes", strength=0), "strength: got 0"),
    (dict(method="instructvideo", data="shapes", strength=0.5, grad_steps=3), "grad_steps: got 3, expected at most 2"),
    (dict(objective="hinge"), "threshold: got None for 'hinge'"),
    (dict(threshold=1.0), "threshold: got 1.0 for 'reward'"),
    (dict(kl_weight=1), "kl_weight: got 1.0"),
    (dict(eta=0.5), "eta: got 0.5"),
    (dict(min_snr=5), "min_snr: got 5.0"),
    (dict(augment_crop=0.5), "augment_crop: got 0.5"),
    (dict(positive="x"), "positive: got 'x'"),
    (dict(early_stop=2), "early_stop: got 2"),
    (dict(lora_scale=2), "lora_scale: got 2.0, expected within [0, 1]"),
    (dict(method="srpo", align_span="[0.999,0.5]"), "high, low: got 0.999"),
    (dict(method="ctrl_u", data="shapes"), "reward: got 'clip_match' for ctrl_u"),
    (dict(method="rg_lcm", data="shapes", guidance_span="[0.5,2]"), "guidance_span: got"),
    (dict(method="rg_lcm", data="shapes", sampler="ddim"), "sampler: got 'ddim'"),
    (dict(reward_mix="normalised", objective="hinge", threshold=1), "reward_mix: got 'normalised'"),
    (dict(levels_per_step=2), "levels_per_step: got 2"),
    (dict(group_size=0), "group_size: got 0"),
    (dict(anchor_weight=-1), "anchor_weight: got -1"),
    (dict(score_threads=2), "score_threads: got 2"),
]


@pytest.mark.parametrize("changes, message", MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_one_line_before_loading(refused, changes, message):
    assert message in refused(**changes)


def test_what_only_the_model_tells_is_refused(bench, world_files):
    with pytest.raises(ValueError, match="model: got a flow model, expected a consistency one for rg_lcm"):
        bench.trainer(method="rg_lcm", data="shapes")
    with pytest.raises(ValueError, match="schedule: got kind 'flow', expected 'diffusion'"):
        bench.trainer(sampler="ddim")
    with pytest.raises(ValueError, match="kl_weight: got 1.0, but no step of"):
        bench.trainer(sampler="cps", kl_weight=1.0)
    without = SimpleNamespace(pipeline=SimpleNamespace(vae=object()), denoisers={})
    with pytest.raises(ValueError, match="decode_tiling: got True for SimpleNamespace, whose vae cannot"):
        backprop_parts.prepare_memory(replace(bench.cfg, decode_tiling=True), without)
    with pytest.raises(ValueError, match="which is groupwise, expected a pointwise one"):
        bench.trainer(reward=f"{world_files / 'gradient_rewards.py'}:crowd")


# Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, their conditions and labels, one of them a video of two frames."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for k, text in enumerate(["a red circle", "a blue star", "a green square", "a red circle"]):
        for part in ("p", "c"):
            Image.new("RGB", (48, 40), (60 * k, 200 if part == "c" else 20, 90)).save(folder / f"{part}{k}.png")
        Image.new("L", (40, 40), k).save(folder / f"l{k}.png")
        lines.append({"file_name": f"p{k}.png", "text": text, "condition": f"c{k}.png", "labels": f"l{k}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def test_a_folder_of_pictures(folder, tmp_path):
    pictures = PictureFolder(folder)
    train, held_out = pictures.captions()
    assert set(train) == {"a red circle", "a blue star"} and held_out == ["a green square"] and pictures.conditioned
    drawn = pictures.draw(["a red circle", "a blue star"], [1, 0], (32, 32))
    assert drawn.pictures.shape == drawn.conditions.shape == (2, 3, 32, 32)
    assert drawn.pictures[0, 0, 0, 0] == pytest.approx(180 / 255) and drawn.context["condition"][0].unique() == 3
    assert not torch.equal(drawn.pictures[0], pictures.draw(["a red circle"], [0], (32, 32)).pictures[0])
    for text, message in (("{", "is no JSON"), ('{"file_name": "x"}', "expected file_name and text"), ("", "got 0")):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "no.png", "text": "x"}')
    with pytest.raises(ValueError, match="names 'no.png', which does not exist"):
        PictureFolder(tmp_path)


def test_the_condition_of_drawn_shapes_is_read_back_from_them():
    drawn = DrawnPictures().draw(["a red circle", "two blue stars"], [0, 1], (64, 64))
    assert make_reward("controlnet_cycle")(drawn.pictures, ["a", "b"], drawn.context).tolist() == [0, 0]
    with pytest.raises(ValueError, match="prompts: got 'a dog' with data 'shapes', which cannot draw it"):
        DrawnPictures().check(["a red circle", "a dog"])


def test_encoding_is_undone_by_the_pipeline_or_refused(bench):
    pictures = DrawnPictures().draw(["a red circle"], [0], (64, 64)).pictures
    latents = Encoder(bench.state.generator)(pictures, ["a red circle"])
    back = bench.state.generator.decode(latents, ["a red circle"])
    assert (back - pictures).abs().mean() < 0.05
    flux = Generator(tiny.make("FLUX.1"), num_steps=2, **tiny.FAMILIES["FLUX.1"].options)
    with pytest.raises(ValueError, match="expected one that samples the vae's own latents"):
        Encoder(flux)(torch.rand(1, 3, 32, 32), ["a"])
    video = Generator(tiny.make("Wan (video)"), num_steps=2, **tiny.FAMILIES["Wan (video)"].options)
    clip = torch.rand(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert Encoder(video)(clip, ["a"]).shape == video.noise(["a"], [0]).shape


# Whole runs ------------------------------------------------------------------------------------------------------


def saved(pipeline, folder, **defaults):
    pipeline.save_pretrained(folder)
    (folder / "visalign.json").write_text(json.dumps(defaults))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny pipelines: unet, lcm (guidance embedded), its teacher, lcm of a plain unet, controlnet."""
    root = tmp_path_factory.mktemp("models")
    size = dict(height=32, width=32)
    betas = dict(beta_start=0.0001, beta_end=0.002, beta_schedule="scaled_linear")
    made = {"unet": saved(tiny.make("Stable Diffusion 1.5"), root / "unet", call_kwargs=size, guidance_scale=1.0)}
    made["lcm"] = saved(tiny.make("LCM"), root / "lcm", call_kwargs=size)
    teacher, plain = tiny.make("Stable Diffusion 1.5"), tiny.make("Stable Diffusion 1.5")
    teacher.scheduler = df.DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")
    made["teacher"] = saved(teacher, root / "teacher", call_kwargs=size)
    plain.scheduler = df.LCMScheduler(**betas, clip_sample=False)
    made["plain lcm"] = saved(plain, root / "plain", call_kwargs=size, guidance_scale=1.0)
    stock = tiny.make("Stable Diffusion 1.5")
    controlnet = df.ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(8, 8))
    with torch.no_grad():
        for p in controlnet.controlnet_mid_block.parameters():
            p.normal_(std=0.1)
    pipeline = df.StableDiffusionControlNetPipeline(
        **stock.components, controlnet=controlnet, requires_safety_checker=False
    )
    made["controlnet"] = saved(pipeline, root / "controlnet", call_kwargs=size, guidance_scale=1.0)
    return made


RUNS = [
    ("unet", dict(method="draft", grad_steps=2, sampler="ddim", eta=1.0)),
    ("unet", dict(method="refl", train_guidance=2.0)),
    ("lcm", dict(method="draft")),
    ("lcm", dict(method="rg_lcm", data="shapes", teacher="teacher", num_steps=5, huber=0.01)),
    ("plain lcm", dict(method="rg_lcm", data="shapes", num_steps=5, guidance_span=(2.0, 3.0), data_weight=0.5)),
    ("controlnet", dict(method="controlnet", data="shapes", reward="controlnet_cycle", lora_rank=0, eval_count=1)),
]


@pytest.mark.parametrize("model, given", RUNS, ids=lambda x: x if isinstance(x, str) else x["method"])
def test_other_families_train(base, bright, models, tmp_path, monkeypatch, model, given):
    trained, update = set(), RewardBackprop.update

    def watched(self, step, groups):
        out = update(self, step, groups)
        modules = [m for m in self.generator.pipeline.components.values() if isinstance(m, torch.nn.Module)]
        modules += [self.teacher.denoiser] if self.teacher else []
        assert all(p.grad is None for m in modules for p in m.parameters()), "the optimiser has freed its own"
        trained.add(next(iter(self.state.policy.modules)))
        return out

    monkeypatch.setattr(RewardBackprop, "update", watched)
    given = {"reward": bright, **given}
    if "teacher" in given:
        given["teacher"] = models[given["teacher"]]
    if model == "controlnet":
        given["time_span"] = (0, 1000)
    cfg = Config(**{**base, "steps": 1, "judges": "", "model": models[model], "run_dir": str(tmp_path / "r"), **given})
    folder = main(cfg)
    last = read_metrics(folder / "metrics.jsonl")[1]
    assert last["grad_norm"] > 0 and last["skipped_updates"] == 0 and (folder / "report.html").is_file()
    if given["method"] == "rg_lcm":
        assert last["consistency_loss"] > 0
    assert trained == {"controlnet" if model == "controlnet" else "unet"}
    if model == "controlnet":
        assert df.ControlNetModel.from_pretrained(folder / "weights") is not None


def test_distilling_without_a_reward_is_plain_distilling(base, bright, models, tmp_path):
    given = dict(method="rg_lcm", model=models["plain lcm"], data="shapes", num_steps=5, guidance_span=(2.0, 3.0))
    bench = Bench({**base, **given, "reward": bright}, tmp_path / "run")
    alone, values, _ = bench.gradient(reward_weight=0.0)
    assert torch.equal(alone, bench.gradient(reward_weight=0.0, reward="clip")[0]) and values["consistency_loss"] > 0
    assert torch.equal(2 * alone, bench.gradient(reward_weight=0.0, data_weight=2.0)[0])
    assert not close(alone, bench.gradient()[0], 0.01)
    assert bench.gradient(reward_weight=0.0, data_weight=0.0)[0].abs().max() == 0
    bench.run.close()


def test_an_early_stop_ends_at_the_best_step_and_scale_0_is_the_base(base, bright, tmp_path, monkeypatch):
    given = {
        **base,
        "reward": bright,
        "steps": 9,
        "eval_every": 1,
        "early_stop": 2,
        "lora_scale": 0.0,
        "eval_during": 2,
    }
    folder = main(Config(**given, run_dir=str(tmp_path / "run")))
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 1], "no evaluation differs, so the first stays the best"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reward_after"] == summary["reward_before"]


def test_training_raises_the_reward(base, bright, tmp_path):
    given = {**base, "reward": bright, "steps": 6, "learning_rate": 3e-3, "schedule": "constant", "ema_decay": 0.0}
    summary = json.loads((main(Config(**given, run_dir=str(tmp_path / "run"))) / "summary.json").read_text())
    assert summary["reward_after"] > summary["reward_before"] + 0.005


# Configuration ---------------------------------------------------------------------------------------------------

RECIPES = [
    p
    for p in sorted((Path(reward_backprop.__file__).parent / "recipes").glob("*.yaml"))
    if "trainers/reward_backprop.py" in p.read_text()
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    cfg = parse_config(Config, ["--config", str(recipe)], prog="reward_backprop", description="")
    assert cfg != Config(model=cfg.model) and cfg.model.count("/") == 1
    assert getattr(reward_factory(Path(cfg.reward).stem.partition("_hps")[0]), "differentiable", None) is not False


def test_there_is_a_recipe_of_every_method():
    methods = [parse_config(Config, ["--config", str(p)], prog="x", description="").method for p in RECIPES]
    assert sorted(methods) == sorted(get_args(backprop_options.Method))


def test_every_option_is_read():
    used = set()
    modules = (reward_backprop, backprop_parts, loop, options, preflight, setup, outcome)
    for module in modules:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Attribute) and "cfg" in (getattr(node.value, n, "") for n in ("id", "attr")):
                used.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):  # names given to getattr and own
                used.add(node.value)
    properties = {"positive", "negative", "data_weight"}  # read through `words` and `data_share`
    assert {f.name for f in fields(Config)} - used - properties == set()
    assert {"words", "data_share"} <= used and set(backprop_options.OWN) <= used
