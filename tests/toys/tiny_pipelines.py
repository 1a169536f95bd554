"""Tiny, randomly initialised pipelines of many families, built from configs alone: nothing is downloaded.

`FAMILIES` maps a family's name to its `Family`: how to build it, and how to call it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as df
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from visalign.pipeline.calls import to_images
from visalign.pipeline.conformance import recorded
from visalign.pipeline.generator import Generator, to_supported_scheduler
from visalign.transitions import ode_of

PROMPTS = ["a red square", "blue circle, two green triangles"]
_TEXT = [
    "a red square above a blue circle, two green triangles on a white background, nothing, blurry, ugly and dark",
    "system user assistant Describe the key features of the input image (color, shape, size, texture, objects)",
]
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "<|im_end|>{% endfor %}"
)
_SPECIAL = [
    "<pad>", "<s>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


def tokenizer(max_length: int = 32, chat: bool = False, side: str = "right") -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE trained on two sentences; without `chat` it adds <s> and </s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_TEXT, trainer)
    if not chat:
        ends = [("<s>", 1), ("</s>", 3)]
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=max_length,
        padding_side=side,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    made.chat_template = _CHAT
    return made


def clip_text(projection: bool = True) -> torch.nn.Module:
    config = tf.CLIPTextConfig(
        vocab_size=400, hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config)


def t5(kind: str = "T5") -> torch.nn.Module:
    config = getattr(tf, f"{kind}Config")(vocab_size=400, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return getattr(tf, f"{kind}EncoderModel")(config)


def language_model(kind: str, layers: int = 2) -> torch.nn.Module:
    config = getattr(tf, f"{kind}Config")(
        vocab_size=400, hidden_size=32, intermediate_size=37, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    return getattr(tf, f"{kind}Model")(config)


def qwen_vl() -> torch.nn.Module:
    text = dict(
        vocab_size=400, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=14,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    ids = dict(vision_start_token_id=6, vision_end_token_id=7, image_token_id=8, video_token_id=9)
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def vae(channels: int = 4, **options: Any) -> torch.nn.Module:
    return df.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=channels, sample_size=32, **options,
    )  # fmt: skip


def video_vae(kind: str = "AutoencoderKLWan", **options: Any) -> torch.nn.Module:
    return getattr(df, kind)(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[0.9] * 4, **options,
    )  # fmt: skip


def unet(**options: Any) -> torch.nn.Module:
    defaults = dict(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    return df.UNet2DConditionModel(**{**defaults, **options})


def _flow(**options: Any) -> Any:
    return df.FlowMatchEulerDiscreteScheduler(**options)


# Gentler than the real ones: an untrained network does not predict the noise in its input, so dividing by a square
# root of alpha_bar near 0.01 would blow latents, and with them the rounding of either formula, up a hundredfold.
_BETAS = dict(beta_start=0.0001, beta_end=0.002, beta_schedule="scaled_linear")
_SHIFTING = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def sd15() -> Any:
    return df.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(False), tokenizer=tokenizer(), unet=unet(), safety_checker=None,
        scheduler=df.DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def lcm() -> Any:
    return df.LatentConsistencyModelPipeline(
        vae=vae(), text_encoder=clip_text(False), tokenizer=tokenizer(), unet=unet(time_cond_proj_dim=32),
        scheduler=df.LCMScheduler(**_BETAS, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return df.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_text(False), text_encoder_2=clip_text(), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=network, scheduler=df.EulerDiscreteScheduler(**_BETAS, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def sd3(hidden: int = 32, layers: int = 2) -> Any:
    transformer = df.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=hidden // 4,
        num_attention_heads=4, caption_projection_dim=hidden, joint_attention_dim=32, pooled_projection_dim=64,
    )  # fmt: skip
    return df.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_flow(shift=3.0), vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_text(), text_encoder_2=clip_text(), text_encoder_3=t5(), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux(kind: str = "FluxPipeline", guidance_embeds: bool = True) -> Any:
    transformer = df.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return getattr(df, kind)(
        scheduler=_flow(**_SHIFTING), vae=vae(shift_factor=0.1, scaling_factor=0.9), text_encoder=clip_text(False),
        tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(), transformer=transformer,
    )  # fmt: skip


def flux2() -> Any:
    transformer = df.Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    autoencoder = df.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2,
    )  # fmt: skip
    return df.Flux2Pipeline(
        scheduler=_flow(**_SHIFTING), vae=autoencoder, text_encoder=language_model("Mistral", layers=3),
        tokenizer=tokenizer(512, chat=True, side="left"), transformer=transformer,
    )  # fmt: skip


def qwen_image(edit: bool = False) -> Any:
    transformer = df.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    words = tokenizer(2048, chat=True)
    parts = dict(
        transformer=transformer, vae=video_vae("AutoencoderKLQwenImage"), scheduler=_flow(**_SHIFTING),
        text_encoder=qwen_vl(), tokenizer=words,
    )  # fmt: skip
    if not edit:
        return df.QwenImagePipeline(**parts)
    size = dict(shortest_edge=28 * 28, longest_edge=56 * 56)
    processor = tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(size=size), tokenizer=words, video_processor=tf.Qwen2VLVideoProcessor()
    )
    return df.QwenImageEditPipeline(**parts, processor=processor)


def z_image() -> Any:
    transformer = df.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return df.ZImagePipeline(
        scheduler=_flow(shift=3.0), vae=vae(shift_factor=0.1, scaling_factor=0.9), tokenizer=tokenizer(chat=True),
        text_encoder=language_model("Qwen3"), transformer=transformer,
    )  # fmt: skip


def sana() -> Any:
    transformer = df.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=16,
    )  # fmt: skip
    autoencoder = df.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41,
    )  # fmt: skip
    return df.SanaPipeline(
        tokenizer=tokenizer(), text_encoder=language_model("Gemma2"), vae=autoencoder, transformer=transformer,
        scheduler=df.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    )  # fmt: skip


def pixart_sigma() -> Any:
    transformer = df.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        cross_attention_dim=16, caption_channels=32, sample_size=16, use_additional_conditions=False,
    )  # fmt: skip
    return df.PixArtSigmaPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae(), transformer=transformer,
        scheduler=df.DPMSolverMultistepScheduler(**_BETAS),
    )  # fmt: skip


def lumina2() -> Any:
    transformer = df.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(8, 4, 4),
        axes_lens=(128, 32, 32), cap_feat_dim=32,
    )  # fmt: skip
    return df.Lumina2Pipeline(
        transformer=transformer, scheduler=_flow(shift=6.0), vae=vae(shift_factor=0.1, scaling_factor=0.9),
        text_encoder=language_model("Gemma2"), tokenizer=tokenizer(64),
    )  # fmt: skip


def chroma() -> Any:
    transformer = df.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return df.ChromaPipeline(
        scheduler=_flow(**_SHIFTING), vae=vae(shift_factor=0.1, scaling_factor=0.9), text_encoder=t5(),
        tokenizer=tokenizer(), transformer=transformer,
    )  # fmt: skip


def wan() -> Any:
    transformer = df.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return df.WanPipeline(
        tokenizer=tokenizer(), text_encoder=t5("UMT5"), vae=video_vae(), transformer=transformer,
        scheduler=df.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


def _picture() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


@dataclass(frozen=True)
class Family:
    """One pipeline class: how to build it, and the arguments of its calls."""

    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)  # of the Generator
    inputs: Callable[[int], dict[str, Any]] = lambda count: {}  # of each call with this many prompts
    note: str = ""


_SMALL = dict(height=32, width=32)
_GUIDED = dict(guidance_scale=4.0, negative_prompt="blurry", **_SMALL)
FAMILIES: dict[str, Family] = {
    "Stable Diffusion 1.5": Family(sd15, _GUIDED),
    "SDXL": Family(sdxl, _GUIDED, note="Euler becomes DDIM"),
    "Stable Diffusion 3": Family(sd3, _GUIDED | dict(max_sequence_length=16)),
    "FLUX.1": Family(flux, _SMALL | dict(max_sequence_length=16, guidance_scale=3.5)),
    "FLUX.2": Family(
        flux2, _SMALL | dict(max_sequence_length=64, guidance_scale=4.0, text_encoder_out_layers=(1, 2, 3))
    ),
    "Qwen-Image": Family(qwen_image, _SMALL | dict(negative_prompt="blurry", true_cfg_scale=4.0)),
    "Z-Image": Family(z_image, _GUIDED | dict(max_sequence_length=32)),
    "Sana": Family(
        sana,
        _GUIDED | dict(max_sequence_length=16, complex_human_instruction=None, use_resolution_binning=False),
        note="DPM-Solver++ becomes flow Euler",
    ),
    "PixArt-Sigma": Family(
        pixart_sigma,
        _GUIDED | dict(max_sequence_length=16, use_resolution_binning=False),
        note="DPM-Solver++ becomes DDIM",
    ),
    "Lumina 2": Family(lumina2, _GUIDED | dict(max_sequence_length=64)),
    "Chroma": Family(chroma, _GUIDED | dict(max_sequence_length=16)),
    "LCM": Family(lcm, _SMALL | dict(guidance_scale=8.0), note="its step draws noise: no ODE to compare"),
    "Wan (video)": Family(
        wan,
        dict(
            height=16,
            width=16,
            num_frames=5,
            max_sequence_length=16,
            guidance_scale=4.0,
            negative_prompt="blurry",
        ),
        note="UniPC becomes flow Euler",
    ),
    "FLUX Kontext (image=)": Family(
        lambda: flux("FluxKontextPipeline"),
        _SMALL | dict(max_sequence_length=16, guidance_scale=3.5, max_area=32 * 32, _auto_resize=False),
        lambda count: dict(image=_picture()),
    ),
    "Qwen-Image-Edit (image=)": Family(
        lambda: qwen_image(edit=True),
        _SMALL | dict(negative_prompt="blurry", true_cfg_scale=4.0),
        lambda count: dict(image=[_picture()] * count),
        note="condition image scaled to 64 px, not 1024, in this table",
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """The family's pipeline with weights from this seed, large enough to matter (many layers start at zero)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[name].build()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                _fill(component.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _fill(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            output = 0.2 if name == "proj_out.weight" else 1.0  # velocities of a real one's size, so that 1e-5 is small
            parameter.normal_(std=output * parameter[0].numel() ** -0.5)
        elif "bias" in name:
            parameter.normal_(std=0.02)


def shrink_condition_images(monkeypatch: Any) -> None:
    """Qwen-Image-Edit scales its input image to a million pixels; tests make do with 64 x 64."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))


NUM_STEPS, SEEDS = 4, [3, 4]


@dataclass(frozen=True)
class Measured:
    """Largest absolute differences between a family driven by a Generator and its stock pipeline; None: no such check.

    Attributes:
        noise: the loop's first latents.
        prediction: what `predict` gives at each state of the stock run.
        trajectory: final latents of the ODE (flow Euler or DDIM) driven through `denoise`.
        decode: images of the stock run's final latents.
        batch: final latents of the second sample alone and in the batch.
        gradients: norms of the denoiser's gradient through `predict` and through `denoise(grad_steps=...)`.
        others: number of parameters outside the denoiser that got a gradient.
    """

    noise: float
    prediction: float
    trajectory: float | None
    decode: float
    batch: float
    gradients: tuple[float, float]
    others: int

    @property
    def passed(self) -> bool:
        """All differences within 1e-5, gradients at the denoiser and nowhere else."""
        differences = (self.noise, self.prediction, self.trajectory or 0.0, self.decode, self.batch)
        return max(differences) <= 1e-5 and all(0 < norm < float("inf") for norm in self.gradients) and not self.others


@functools.cache
def measure(name: str) -> Measured:
    """Drive one family and its untouched twin (only the scheduler is a supported one) from the same seeds."""
    family, stock = FAMILIES[name], make(name)
    stock.scheduler = to_supported_scheduler(stock.scheduler)
    generator = Generator(make(name), num_steps=NUM_STEPS, **family.options)
    call: Any = (PROMPTS, SEEDS)
    inputs = family.inputs(2)
    with recorded(stock.scheduler) as record:
        images = to_images(stock(**generator.arguments(*call, **inputs)))
    states, predictions, following = zip(*record)

    noise = distance(generator.noise(*call, **inputs), states[0])
    again = [generator.predict(x, i, *call, **inputs).detach() for i, x in enumerate(states)]
    prediction = max(distance(a, b) for a, b in zip(again, predictions))

    def ode(step_index: int, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        schedule = generator.schedule
        return ode_of(schedule)(schedule, step_index, latents, prediction)[0].mean

    with torch.no_grad():
        final = generator.denoise(*call, ode, **inputs)
        alone = generator.denoise(PROMPTS[1:], SEEDS[1:], ode, **family.inputs(1))
        decode = distance(generator.decode(following[-1], *call, **inputs), images)
    trajectory = None if generator.schedule.kind == "consistency" else distance(final, following[-1])
    gradients = (
        _gradient(generator, lambda: generator.predict(states[1], 1, *call, **inputs).square().mean().backward()),
        _gradient(generator, lambda: generator.denoise(*call, ode, grad_steps={2}, **inputs).mean().backward()),
    )
    own = {id(p) for module in generator.denoisers.values() for p in module.parameters()}
    modules = (m for m in generator.pipeline.components.values() if isinstance(m, torch.nn.Module))
    others = sum(p.grad is not None and id(p) not in own for m in modules for p in m.parameters())
    return Measured(noise, prediction, trajectory, decode, distance(alone, final[1:]), gradients, others)


def _gradient(generator: Generator, run: Callable[[], Any]) -> float:
    generator.denoiser.zero_grad()
    run()
    norms = [p.grad.norm() for p in generator.denoiser.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite for different shapes."""
    return (a.detach().float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")


@torch.no_grad()
def picture(name: str) -> torch.Tensor:
    """One small image or video of a family, driven along its ODE."""
    generator = Generator(make(name), num_steps=2, **FAMILIES[name].options)

    def ode(step_index: int, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        schedule = generator.schedule
        return ode_of(schedule)(schedule, step_index, latents, prediction)[0].mean

    return generator.denoise(PROMPTS[:1], [7], ode, decode=True)[1]
