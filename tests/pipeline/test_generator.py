"""What the Generator promises beside conformance: memo, stubs, gradients, precision, seeds, errors."""

import json
import warnings

import diffusers as df
import pytest
import tiny_pipelines as tiny
import torch

from visalign.pipeline.generator import Generator, UnsupportedPipeline, to_supported_scheduler
from visalign.transitions import ode_of

PROMPTS, SEEDS = ["a red square", "two green triangles", "a red square"], [1, 2, 3]
OPTIONS = dict(height=32, width=32, max_sequence_length=16)


@pytest.fixture
def pipeline():
    return tiny.make("Stable Diffusion 3")


@pytest.fixture
def generator(pipeline):
    with Generator(pipeline, num_steps=4, guidance_scale=4.0, **OPTIONS) as made:
        yield made


def euler(generator):
    def step(step_index, latents, prediction):
        schedule = generator.schedule
        return ode_of(schedule)(schedule, step_index, latents, prediction)[0].mean

    return step


class Calls:
    """Batch sizes of a module's forwards."""

    def __init__(self, module):
        self.batches = []
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.batches.append(len(next(iter([*args, *kwargs.values()]))))


def test_each_distinct_prompt_and_negative_prompt_is_encoded_once(pipeline):
    encoder = Calls(pipeline.text_encoder)
    generator = Generator(pipeline, num_steps=2, guidance_scale=4.0, calibrate=False, **OPTIONS)
    for _ in range(2):
        generator.noise(PROMPTS, SEEDS)
        generator.noise(PROMPTS[::-1], SEEDS)
    assert encoder.batches == [1, 1, 1]  # two prompts, one empty negative prompt
    generator.noise(["a red square"], [0], negative_prompt="dark")
    assert encoder.batches == [1] * 5  # a new negative prompt, beside a first prompt
    generator.clear_prompts()
    generator.noise(["a red square"], [0])
    assert len(encoder.batches) == 7


def test_prompts_of_unequal_length_are_padded_as_the_pipeline_pads_them():
    family = tiny.FAMILIES["Qwen-Image"]
    pipeline = tiny.make("Qwen-Image")
    encode, prompts = pipeline.encode_prompt, ["a", "two green triangles on white", "a blue circle"]
    stock = encode(prompts)
    generator = Generator(pipeline, num_steps=2, **family.options)
    encoder = Calls(pipeline.text_encoder)
    ours = pipeline.encode_prompt(prompts)
    torch.testing.assert_close(ours, stock)
    count = len(encoder.batches)
    torch.testing.assert_close(pipeline.encode_prompt(prompts[1:]), encode(prompts[1:]))
    assert len(encoder.batches) == count + 1  # the stock call alone
    generator.close()


def test_a_changed_embedding_list_does_not_change_the_memo():
    pipeline = tiny.make("Z-Image")
    Generator(pipeline, num_steps=2, **tiny.FAMILIES["Z-Image"].options)
    first, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    first.clear()
    assert len(pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[0]) == 3


def test_released_text_encoders_leave_remembered_prompts_usable(generator, pipeline):
    expected = generator.noise(PROMPTS, SEEDS)
    generator.release_text_encoders()
    assert pipeline.text_encoder_3 is None
    assert torch.equal(generator.noise(PROMPTS, SEEDS), expected)
    with pytest.raises(ValueError, match="prompts: got .*unseen.* released"):
        generator.noise(["unseen"], [0])
    generator.close()
    assert pipeline.text_encoder_3 is not None


def test_noise_depends_on_a_samples_own_seed_alone(generator):
    batch = generator.noise(PROMPTS, SEEDS)
    assert torch.equal(generator.noise(PROMPTS[1:2], SEEDS[1:2]), batch[1:2])
    assert not torch.equal(batch[0], batch[2])  # same prompt, another seed
    assert batch.dtype == torch.float32
    own = torch.randn(1, *batch.shape[1:], generator=torch.Generator().manual_seed(2))
    assert torch.equal(batch[1:2], own)


def test_encoders_under_training_are_asked_anew_in_every_call_and_get_a_gradient():
    pipeline = tiny.make("Stable Diffusion 1.5")
    encoder = Calls(pipeline.text_encoder)
    generator = Generator(pipeline, num_steps=2, guidance_scale=4.0, calibrate=False, height=32, width=32)
    latents = generator.noise(PROMPTS, SEEDS)
    generator.encode_anew()
    weight = next(p for n, p in pipeline.text_encoder.named_parameters() if n.endswith("q_proj.weight"))
    encoder.batches.clear()
    first = generator.predict(latents, 0, PROMPTS, SEEDS)
    assert encoder.batches == [1, 1, 1]  # two prompts and the negative one, however often they stand there
    first.square().sum().backward()
    assert weight.grad.norm() > 0
    with torch.no_grad():
        weight += 1.0
        second = generator.predict(latents, 0, PROMPTS, SEEDS)
        assert (second - first).abs().max() > 1e-3 and not second.requires_grad
        assert not generator.noise(PROMPTS, SEEDS).requires_grad and not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0].requires_grad
    with pytest.raises(ValueError, match="release_text_encoders: got text encoders under training"):
        generator.release_text_encoders()


def test_guidance_one_costs_one_forward_per_step_and_guidance_doubles_the_batch(pipeline):
    for scale, batch in ((1.0, 3), (4.0, 6)):
        with Generator(pipeline, num_steps=4, guidance_scale=scale, **OPTIONS) as generator:
            generator.noise(PROMPTS, SEEDS)
            denoiser = Calls(generator.denoiser)
            with torch.no_grad():
                generator.denoise(PROMPTS, SEEDS, euler(generator), decode=True)
        assert denoiser.batches == [batch] * 4


def test_stubbed_steps_cost_no_denoiser_forward(generator):
    latents = generator.noise(PROMPTS, SEEDS)
    forwards = []
    real = type(generator.denoiser).forward
    generator.denoiser.forward = lambda *a, **k: forwards.append(1) or real(generator.denoiser, *a, **k)
    with torch.no_grad():
        generator.noise(PROMPTS[:2], SEEDS[:2])
        generator.decode(latents, PROMPTS)
        assert not forwards
        generator.predict(latents, 3, PROMPTS)
        generator.denoise(PROMPTS, SEEDS, euler(generator), latents=latents, start=1, stop=3, decode=True)
    assert len(forwards) == 3
    assert "forward" in vars(generator.denoiser)  # one of our own survives the stubs


def test_a_stretch_begins_and_ends_where_told(generator):
    states = {}

    def recording(step_index, latents, prediction):
        states[step_index] = latents
        return euler(generator)(step_index, latents, prediction)

    with torch.no_grad():
        final, images = generator.denoise(PROMPTS, SEEDS, recording, decode=True)
        middle = generator.denoise(PROMPTS, SEEDS, euler(generator), latents=states[1], start=1, stop=3)
        last = generator.denoise(PROMPTS, SEEDS, euler(generator), latents=states[0])
        assert torch.equal(generator.decode(final, PROMPTS), images)
        assert generator.denoise(PROMPTS, SEEDS, euler(generator), latents=final, start=2, stop=2) is final
    assert torch.equal(middle, states[3])
    assert torch.equal(last, final)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "FLUX.2"])  # with and without a usable `latents` argument
def test_teacher_forcing_repeats_the_rollouts_predictions_with_backward_inside_a_step(name):
    generator = Generator(tiny.make(name), num_steps=4, **tiny.FAMILIES[name].options)
    seen = {}

    def recording(step_index, latents, prediction):
        seen[step_index] = (latents, prediction)
        return latents - 0.1 * prediction.sin()

    with torch.no_grad():
        generator.denoise(PROMPTS[:2], SEEDS[:2], recording)
    for steps in ([0, 1, 3], [2], [0]):
        visited = []

        def training(step_index, latents, prediction, visited=visited):
            assert torch.equal(latents, seen[step_index][0])
            assert torch.equal(prediction, seen[step_index][1])
            prediction.square().mean().backward()
            visited.append(step_index)

        generator.denoiser.zero_grad()
        generator.denoise(PROMPTS[:2], SEEDS[:2], training, latents={i: seen[i][0] for i in steps})
        assert visited == steps
        assert sum(p.grad.abs().sum() for p in generator.denoiser.parameters() if p.grad is not None) > 0


def test_other_latents_than_the_seeds_enter_the_first_step_of_any_pipeline():
    for name in ("Stable Diffusion 3", "FLUX.2"):
        generator = Generator(tiny.make(name), num_steps=2, **tiny.FAMILIES[name].options)
        noise = generator.noise(PROMPTS[:1], [1])
        with torch.no_grad():
            kept = generator.predict(noise.flip(1), 0, PROMPTS[:1], seeds=[1])
            other = generator.predict(noise, 0, PROMPTS[:1], seeds=[1])
            same = generator.predict(noise.flip(1), 0, PROMPTS[:1], seeds=[99])
        assert not torch.equal(kept, other)
        assert torch.equal(kept, same)


def test_gradients_reach_the_latents_of_predict_and_of_decode(generator):
    for step in (0, 2):
        latents = generator.noise(PROMPTS, SEEDS).requires_grad_()
        generator.predict(latents, step, PROMPTS).square().mean().backward()
        assert latents.grad.abs().sum() > 0
    latents = (0.1 * generator.noise(PROMPTS, SEEDS)).requires_grad_()
    (gradient,) = torch.autograd.grad(generator.decode(latents, PROMPTS).sum(), latents)
    nudge = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        up, down = (generator.decode(latents + s * 1e-3 * nudge, PROMPTS).double().sum() for s in (1, -1))
    torch.testing.assert_close((gradient * nudge).sum().double(), (up - down) / 2e-3, rtol=0.02, atol=0.01)


def test_gradients_stop_at_grad_steps_but_pass_along_the_latents(generator):
    parameter = next(generator.denoiser.parameters())
    latents = generator.noise(PROMPTS, SEEDS)
    images = []
    for grad_steps in (set(), {1}, None):
        final, image = generator.denoise(
            PROMPTS, SEEDS, euler(generator), latents=latents, decode=True, grad_steps=grad_steps
        )
        images.append(image)
        assert image.requires_grad == (grad_steps != set())
        assert final.requires_grad == (grad_steps != set())
    assert torch.equal(images[0], images[1])
    gradients = [torch.autograd.grad(image.sum(), parameter)[0] for image in images[1:]]
    assert all(g.abs().sum() > 0 for g in gradients) and not torch.equal(*gradients)


def test_a_bf16_model_keeps_float32_latents():
    pipeline = tiny.make("Stable Diffusion 3").to(torch.bfloat16)
    generator = Generator(pipeline, num_steps=4, guidance_scale=4.0, **OPTIONS)
    given, seen = {}, {}

    def step(step_index, latents, prediction):
        assert latents.dtype == prediction.dtype == torch.float32
        seen[step_index] = latents
        given[step_index + 1] = latents + 1e-5 * torch.ones_like(latents) - 0.1 * prediction
        return given[step_index + 1]

    denoiser = []
    generator.denoiser.register_forward_pre_hook(
        lambda m, a, k: denoiser.append(k["hidden_states"].dtype), with_kwargs=True
    )
    with torch.no_grad():
        final, images = generator.denoise(PROMPTS, SEEDS, step, decode=True)
    assert all(torch.equal(seen[i], given[i]) for i in (1, 2, 3)) and torch.equal(final, given[4])
    assert not torch.equal(seen[2], seen[2].bfloat16().float())
    assert set(denoiser) == {torch.bfloat16} and images.dtype == torch.float32
    state = seen[2].requires_grad_()
    generator.predict(state, 2, PROMPTS).square().mean().backward()
    assert state.grad.dtype == torch.float32 and state.grad.abs().sum() > 0


def test_a_negative_prompt_is_a_string_or_one_per_prompt(generator):
    latents = generator.noise(PROMPTS, SEEDS)
    with torch.no_grad():
        one, many, empty = (
            generator.predict(latents, 1, PROMPTS, negative_prompt=negative)
            for negative in ("dark", ["dark", "dark", "dark"], "")
        )
    assert torch.equal(one, many) and not torch.equal(one, empty)
    with pytest.raises(ValueError, match="negative_prompt: got 2 strings, expected one, or 3"):
        generator.predict(latents, 1, PROMPTS, negative_prompt=["a", "b"])


def test_close_gives_back_a_stock_pipeline(pipeline):
    scheduler, config = pipeline.scheduler, dict(pipeline.config)
    with Generator(pipeline, num_steps=2, **OPTIONS) as generator:
        assert isinstance(pipeline.scheduler, df.FlowMatchEulerDiscreteScheduler)
        with_it = pipeline(**generator.arguments(PROMPTS, SEEDS))[0]
        without = pipeline(**generator.arguments(PROMPTS, SEEDS))[0]
    assert pipeline.scheduler is scheduler and dict(pipeline.config) == config
    assert "encode_prompt" not in vars(pipeline)
    assert (
        tiny.distance(pipeline(**generator.arguments(PROMPTS, SEEDS))[0], with_it) <= 1e-5
    )  # prompts encoded together
    assert torch.equal(with_it, without)


def test_an_error_in_a_step_leaves_the_generator_usable_and_random_state_alone(generator):
    generator.noise(PROMPTS, SEEDS)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        generator.denoise(PROMPTS, SEEDS, lambda i, x, v: 1 / 0)
    with pytest.raises(ValueError, match="step_fn: got NoneType at step 0"):
        generator.denoise(PROMPTS, SEEDS, lambda i, x, v: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert generator.predict(generator.noise(PROMPTS, SEEDS), 0, PROMPTS).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.noise("a", [1]), "prompts: got 'a'"),
        (lambda g: g.noise([], []), "prompts: got"),
        (lambda g: g.noise(PROMPTS, [1]), "seeds: got 1 seeds, expected a list of 3"),
        (lambda g: g.noise(PROMPTS, SEEDS, heigth=3), "call_kwargs: got 'heigth'.*did you mean 'height'"),
        (lambda g: g.noise(PROMPTS, SEEDS, generator=3), "call_kwargs: got 'generator'"),
        (lambda g: g.predict(torch.zeros(3, 4, 16, 16), 4, PROMPTS), "step_index: got 4, expected 0 .. 3"),
        (lambda g: g.predict(torch.zeros(2, 4, 16, 16), 1, PROMPTS), "latents: got 2 at step 1, expected 3"),
        (lambda g: g.denoise(PROMPTS, SEEDS, None, start=2), "latents: got None, expected the state at step 2"),
        (lambda g: g.denoise(PROMPTS, SEEDS, None, stop=9), "start, stop: got 0, 9"),
    ],
)
def test_bad_arguments_are_named(generator, call, message):
    with pytest.raises(ValueError, match=message):
        call(generator)


def test_an_unknown_option_names_the_nearest_before_anything_is_changed(pipeline):
    scheduler = pipeline.scheduler
    with pytest.raises(ValueError, match="did you mean 'negative_prompt'"):
        Generator(pipeline, negativ_prompt="dark")
    with pytest.raises(ValueError, match="num_steps: got 0"):
        Generator(pipeline, num_steps=0)
    assert pipeline.scheduler is scheduler


def test_a_folder_loads_with_its_own_defaults_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(ValueError, match="id_or_folder: got .*nowhere.* does not exist"):
        Generator.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without model_index.json"):
        Generator.from_pretrained(tmp_path)
    pipeline = tiny.make("Stable Diffusion 1.5")
    pipeline.save_pretrained(tmp_path)
    defaults = {"num_steps": 3, "guidance_scale": 1.0, "call_kwargs": {"height": 32, "width": 32}}
    (tmp_path / "visalign.json").write_text(json.dumps(defaults))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = Generator.from_pretrained(tmp_path, height=16)
    assert generator.num_steps == generator.schedule.num_steps == 3
    assert generator.noise(["a"], [0]).shape == (1, 4, 8, 16)
    (tmp_path / "visalign.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match="got 'steps', expected one of .*did you mean 'num_steps'"):
        Generator.from_pretrained(tmp_path)


def test_pipelines_that_do_not_fit_are_refused_with_the_reason():
    pipeline = tiny.make("Stable Diffusion 1.5")
    pipeline.scheduler = df.EDMEulerScheduler()
    with pytest.raises(UnsupportedPipeline, match="scheduler: got EDMEulerScheduler"):
        Generator(pipeline)
    outer = tiny.make("Stable Diffusion 1.5")
    outer.__dict__["decoder_pipe"] = pipeline
    with pytest.raises(UnsupportedPipeline, match="combined pipeline .* expected one of them"):
        Generator(outer)
    with pytest.raises(UnsupportedPipeline, match="takes no prompt"):
        Generator(df.DDPMPipeline(tiny.unet(), df.DDPMScheduler()))
    with pytest.raises(UnsupportedPipeline, match="got Linear, expected a diffusers pipeline"):
        Generator(torch.nn.Linear(1, 1))


def test_a_pipeline_whose_step_is_not_the_formula_is_refused_with_the_difference():
    pipeline = tiny.make("Stable Diffusion 3")
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda v, t, x, **k: step(-v, t, x, **k)  # a pipeline that passes minus the velocity
    with pytest.raises(UnsupportedPipeline, match="whose step 0 differs from the stock one by"):
        Generator(pipeline, num_steps=2, **OPTIONS).noise(PROMPTS, SEEDS)


def test_a_denoiser_that_remembers_earlier_steps_is_refused_with_the_difference():
    pipeline = tiny.make("Stable Diffusion 3")
    momentum = []

    def remember(module, args, output):
        momentum.append(output[0])
        return (sum(momentum),)

    pipeline.transformer.register_forward_hook(remember)
    with pytest.raises(UnsupportedPipeline, match="whose prediction at step .* differs from the stock one by"):
        Generator(pipeline, num_steps=3, **OPTIONS).noise(PROMPTS, SEEDS)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (df.EulerDiscreteScheduler(beta_end=0.01), "DDIMScheduler"),
        (df.PNDMScheduler(steps_offset=1), "DDIMScheduler"),
        (df.DDIMScheduler(clip_sample=True), "DDIMScheduler"),
        (df.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), None),
        (df.FlowMatchHeunDiscreteScheduler(shift=3.0), None),
    ],
)
def test_a_supported_scheduler_keeps_the_models_noise_levels(scheduler, expected):
    made = to_supported_scheduler(scheduler)
    assert type(made).__name__ == (expected or "FlowMatchEulerDiscreteScheduler")
    if expected:
        assert torch.equal(made.alphas_cumprod, scheduler.alphas_cumprod) and not made.config.clip_sample
    else:
        assert made.config.shift == 3.0
    assert to_supported_scheduler(made) is made
