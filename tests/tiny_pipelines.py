"""Tiny, randomly initialised pipelines of many families, built from configs alone: nothing is downloaded."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

_TEXT = ["a red square above a blue circle", "two green triangles on a white background", "user system assistant"]


def tokenizer(max_length: int = 16, ends: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on three sentences; `ends` adds <s> and </s>."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    if ends:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=max_length
    )
    made.chat_template = template
    return made


def clip_text(projection: bool = True, hidden: int = 32):
    config = CLIPTextConfig(
        vocab_size=400, hidden_size=hidden, intermediate_size=37, projection_dim=hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def t5(hidden: int = 32):
    return T5EncoderModel(
        T5Config(vocab_size=400, d_model=hidden, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def vae(channels: int = 4, **options):
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=channels, sample_size=32, **options,
    )  # fmt: skip


def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5), text_encoder=clip_text(), text_encoder_2=clip_text(),
        text_encoder_3=t5(), tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=tokenizer(),
    )  # fmt: skip
