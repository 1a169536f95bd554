"""What is trained: LoRA or all weights, the reference, the average, and the export."""

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from visalign.pipeline.generator import Generator
from visalign.training.policy import CONDITIONING, Average, Policy, check_lora_fits, load_lora

PROMPTS, SEEDS = ["a red square", "blue circle, two green triangles"], [1, 2]
OPTIONS = dict(height=32, width=32, max_sequence_length=16)


def make_policy(rank=4, alpha=12.0, dtype=torch.float32, **options):
    pipeline = tiny.make("Stable Diffusion 3").to(dtype)
    generator = Generator(pipeline, num_steps=3, guidance_scale=4.0, **OPTIONS)
    generator.noise(PROMPTS, SEEDS)
    return Policy(generator, rank, alpha, **options)


def predict(policy, step=1):
    generator = policy.generator
    latents = generator.noise(PROMPTS, SEEDS)
    return generator.predict(latents, step, PROMPTS, SEEDS)


def move(policy, size=0.1):
    generator = torch.Generator().manual_seed(0)
    for p in policy.trained.values():
        p.data += size * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_base_model_and_afterwards_the_policy_is_itself_again(rank):
    policy = make_policy(rank)
    base = predict(make_policy(0)).detach()
    assert torch.equal(predict(policy).detach(), base), "a fresh policy is the base model"
    move(policy)
    moved, own = predict(policy).detach(), {k: v.clone() for k, v in policy.tensors().items()}
    assert not torch.equal(moved, base)
    with policy.reference():
        reference = predict(policy)
        assert not reference.requires_grad and torch.equal(reference, base)
    assert torch.equal(predict(policy).detach(), moved)
    assert all(
        torch.equal(v, own[k]) and p.requires_grad
        for (k, v), p in zip(policy.tensors().items(), policy.trained.values())
    )
    predict(policy).sum().backward()
    assert all(p.grad is not None for p in policy.trained.values())


def test_only_the_adapter_is_trained_and_it_comes_from_its_seed():
    policy = make_policy(seed=3)
    trained = {n for n, p in policy.module.named_parameters() if p.requires_grad}
    assert trained == set(policy.trained) and all(".lora_" in n for n in trained)
    assert not any(p.requires_grad for p in policy.generator.pipeline.vae.parameters())
    torch.manual_seed(77)
    same, other = make_policy(seed=3), make_policy(seed=4)
    state = torch.get_rng_state()
    make_policy(seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    assert all(torch.equal(policy.trained[k], same.trained[k]) for k in trained)
    assert any(not torch.equal(policy.trained[k], other.trained[k]) for k in trained)


def test_targets_choose_the_layers_and_unknown_ones_are_refused():
    default, everything = make_policy(), make_policy(lora_targets=["all-linear"])
    assert set(make_policy(lora_targets=["attention"]).trained) < set(everything.trained) == set(default.trained)
    only = make_policy(lora_targets=["to_q"])
    assert only.trained and all(".to_q." in n for n in only.trained)
    with pytest.raises(ValueError, match="lora_targets: got 'to_z', which this model lacks, expected attention"):
        make_policy(lora_targets=["to_q", "to_z"])


def test_groups_of_targets_can_be_joined():
    def layers(*targets):
        return {n.partition(".lora_")[0] for n in make_policy(lora_targets=list(targets)).trained}

    conditioning = layers("conditioning")
    assert {n.rpartition(".")[2] for n in conditioning} == {"linear", "linear_1", "linear_2"}
    assert {n.split(".")[0] for n in conditioning} == {"time_text_embed", "transformer_blocks", "norm_out"}
    assert not conditioning & layers("attention")
    assert layers("attention", "conditioning", "context_embedder") == (
        layers("attention") | conditioning | {"context_embedder"}
    )


@pytest.mark.parametrize(
    ("layer", "conditions"),
    [
        ("time_text_embed.timestep_embedder.linear_1", True),
        ("single_transformer_blocks.3.norm.linear", True),
        ("double_stream_modulation_img.linear", True),
        ("transformer_blocks.0.img_mod.1", True),
        ("layers.2.adaLN_modulation.0", True),
        ("down_blocks.0.resnets.1.time_emb_proj", True),
        ("transformer_blocks.0.attn.to_q", False),
        ("transformer_blocks.0.ff.net.0.proj", False),
        ("context_embedder", False),
    ],
)
def test_layers_of_known_models_are_told_apart(layer, conditions):
    assert bool(CONDITIONING.search(layer)) is conditions


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_and_averaged_is_float32_whatever_the_model(rank):
    policy = make_policy(rank, dtype=torch.bfloat16)
    average = Average(policy, 0.999)
    assert {p.dtype for p in policy.trained.values()} == {torch.float32} == {v.dtype for v in average.values.values()}
    predict(policy).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.trained.values())
    before = {k: v.clone() for k, v in average.values.items()}
    for p in policy.trained.values():
        p.data += 1e-5  # bfloat16 would lose most of this
    average.update()
    drift = torch.cat([(v - before[k]).flatten() for k, v in average.values.items()])
    assert drift.mean() == pytest.approx(0.9 * 1e-5, rel=1e-2)


def test_half_precision_full_training_predicts_what_the_half_precision_model_does():
    base = make_policy(4, dtype=torch.bfloat16)
    full = make_policy(0, dtype=torch.bfloat16)
    with torch.no_grad():
        stock, ours = predict(base), predict(full)
    assert (ours - stock).abs().max() < 0.03 * stock.abs().max()
    with full.reference():
        assert torch.equal(predict(full), ours)


def test_the_average_follows_its_schedule():
    policy = make_policy()
    average = Average(policy, 0.3)
    name = next(iter(policy.trained))
    expected = policy.trained[name].detach().clone().double()
    for n in range(5):
        policy.trained[name].data += 1.0
        average.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * policy.trained[name].detach().double()
    torch.testing.assert_close(average.values[name].double(), expected, rtol=0, atol=1e-5)


def test_swapped_weights_act_and_the_own_ones_come_back_bit_for_bit_even_after_an_error():
    policy = make_policy()
    own, plain = {k: v.clone() for k, v in policy.tensors().items()}, predict(policy).detach()
    other = {k: v + 0.1 for k, v in own.items()}
    with pytest.raises(RuntimeError, match="inside"), policy.swapped(other):
        assert not torch.equal(predict(policy).detach(), plain)
        raise RuntimeError("inside")
    assert all(torch.equal(v, own[k]) for k, v in policy.tensors().items())
    assert torch.equal(predict(policy).detach(), plain)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient():
    gradients, calls = [], []
    for on in (False, True):
        policy = make_policy(gradient_checkpointing=on)
        move(policy)
        seen = []
        policy.module.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        predict(policy).square().sum().backward()
        gradients.append([p.grad for p in policy.trained.values()])
        calls.append(len(seen))
    assert calls[1] == 2 * calls[0] > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_lora_loads_in_plain_diffusers_and_predicts_the_same(tmp_path, dtype):
    targets = None if dtype == torch.float32 else ["attention"]  # modulations moved so far drown in bf16's rounding
    policy = make_policy(rank=4, alpha=12.0, dtype=dtype, lora_targets=targets)  # a scale of 3
    move(policy)
    policy.export(tmp_path / "lora")
    wanted = predict(policy).detach()
    stock = tiny.make("Stable Diffusion 3").to(dtype)
    assert isinstance(stock, StableDiffusion3Pipeline)
    stock.load_lora_weights(str(tmp_path / "lora"))
    other = Generator(stock, num_steps=3, guidance_scale=4.0, **OPTIONS)
    with torch.no_grad():
        got = other.predict(other.noise(PROMPTS, SEEDS), 1, PROMPTS, SEEDS)
        base = predict(make_policy(dtype=dtype))
    difference, size = (got - wanted).abs(), float(wanted.abs().max())
    assert difference.max() <= (1e-5 if dtype == torch.float32 else 0.05) * size
    assert difference.mean() <= (1e-6 if dtype == torch.float32 else 6e-3) * size
    assert (wanted - base).abs().mean() > 0.03 * size


def test_other_values_can_be_exported_and_a_lora_continues_where_it_was(tmp_path):
    policy = make_policy()
    values = {k: v + 0.25 for k, v in policy.tensors().items()}
    own = {k: v.clone() for k, v in policy.tensors().items()}
    policy.export(tmp_path, values)
    assert all(torch.equal(v, own[k]) for k, v in policy.tensors().items())
    again = make_policy(seed=9)
    load_lora(again, tmp_path)
    assert all(torch.equal(v, values[k]) for k, v in again.tensors().items())
    with pytest.raises(ValueError, match="another rank than lora_rank=8"):
        load_lora(make_policy(rank=8), tmp_path)


def test_a_lora_file_is_checked_against_a_model_folder_by_its_headers(tmp_path):
    policy = make_policy()
    policy.export(tmp_path / "lora")
    tiny.make("Stable Diffusion 3").transformer.save_pretrained(tmp_path / "model" / "transformer")
    check_lora_fits(tmp_path / "lora", tmp_path / "model", 4, 12.0)
    for rank, alpha, message in ((8, 12.0, "has rank 4"), (4, 4.0, "has alpha 12")):
        with pytest.raises(ValueError, match=message):
            check_lora_fits(tmp_path / "lora", tmp_path / "model", rank, alpha)
    tiny.sd3(hidden=64).transformer.save_pretrained(tmp_path / "wide" / "transformer")
    with pytest.raises(ValueError, match="does not fit"):
        check_lora_fits(tmp_path / "lora", tmp_path / "wide")


def test_weights_of_another_policy_are_refused():
    policy = make_policy()
    with pytest.raises(ValueError, match="made for another model"):
        policy.load(make_policy(rank=8).tensors())
    with pytest.raises(ValueError, match="made for another model"):
        policy.load({**policy.tensors(), "more": torch.ones(1)})


# Text encoders (TexForce) ----------------------------------------------------------------------------------------

PLAIN = dict(height=32, width=32)


def text_policy(family, parts, **options):
    generator = Generator(tiny.make(family), num_steps=3, guidance_scale=4.0, **PLAIN)
    generator.noise(PROMPTS, SEEDS)
    return Policy(generator, 4, 12.0, parts=parts, **options)


@pytest.mark.parametrize(
    "family, parts, kind",
    [("Stable Diffusion 1.5", "text", StableDiffusionPipeline), ("SDXL", "both", StableDiffusionXLPipeline)],
)
def test_a_lora_on_text_encoders_loads_in_plain_diffusers_and_continues(tmp_path, family, parts, kind):
    policy = text_policy(family, parts, lora_targets=["attention"])
    assert policy.texts == (["text_encoder"] if parts == "text" else ["text_encoder", "text_encoder_2"])
    assert ("unet" in policy.modules) == (parts == "both")
    base = predict(policy).detach()
    move(policy)
    policy.export(tmp_path / "lora")
    wanted = predict(policy).detach()
    stock = tiny.make(family)
    assert isinstance(stock, kind)
    stock.load_lora_weights(str(tmp_path / "lora"))
    other = Generator(stock, num_steps=3, guidance_scale=4.0, **PLAIN)
    with torch.no_grad():
        got = other.predict(other.noise(PROMPTS, SEEDS), 1, PROMPTS, SEEDS)
    size = float(wanted.abs().max())
    assert (got - wanted).abs().max() <= 1e-5 * size and (wanted - base).abs().mean() > 1e-3 * size
    again = text_policy(family, parts, lora_targets=["attention"], seed=5)
    load_lora(again, tmp_path / "lora")
    assert all(torch.equal(v, policy.trained[k]) for k, v in again.tensors().items())
    for name in policy.texts:
        tiny_encoder = getattr(tiny.make(family), name)
        tiny_encoder.save_pretrained(tmp_path / "model" / name)
    check_lora_fits(tmp_path / "lora", tmp_path / "model" if parts == "text" else tmp_path, 4, 12.0)
    with pytest.raises(ValueError, match="has rank 4, expected lora_rank, 8"):
        check_lora_fits(tmp_path / "lora", tmp_path, 8)


def test_a_pipeline_that_loads_no_lora_on_its_text_encoders_is_refused():
    generator = Generator(tiny.make("PixArt-Sigma"), num_steps=3, **tiny.FAMILIES["PixArt-Sigma"].options)
    with pytest.raises(ValueError, match="^policy: got text encoders of PixArtSigmaPipeline, which loads no LoRA"):
        Policy(generator, 4, parts="text")
