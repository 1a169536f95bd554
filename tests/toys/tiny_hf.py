"""Random checkpoints of a few thousand weights (besides the vocabulary), in the published files' and keys' layout."""

import json
from pathlib import Path

import torch

WIDTH, EMBEDDING, SIDE, PATCH = 32, 24, 32, 8
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "red", "blue", "green", "circle", "square", "star", "two", "photo", "of", "left", "the", "very"]
LABELS = {0: "dog", 1: "aeroplane", 2: "tv"}  # of detectors
HPS_CONFIG = {  # ViT-H-14's, shrunk
    "embed_dim": EMBEDDING,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2},
}


def randomise(model: torch.nn.Module, seed: int, std: float = 0.3) -> torch.nn.Module:
    """Weights large enough that the pictures and texts of a test differ in their embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=generator) * std
        elif name.endswith("bias"):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        elif name.endswith("class_embedding"):  # which its maker draws from whatever the tests before have left
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * std
    return model.eval()


def save_processor(folder: Path, kind: str = "CLIPImageProcessor", **settings) -> None:
    """preprocessor_config.json as hub repositories have it; the oldest name a feature extractor."""
    key = "feature_extractor_type" if kind.endswith("FeatureExtractor") else "image_processor_type"
    config = {key: kind, "do_normalize": True, "do_resize": True, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(config | settings))


def clip_processor_settings(side: int = SIDE) -> dict:
    """OpenAI's, at another size and with a mean of its own, so that reading the file shows."""
    return {
        "size": side,  # older files have a number, newer ones {"shortest_edge": ...}
        "crop_size": side,
        "do_center_crop": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }


def save_hf_clip(folder: Path, seed: int = 0, eos: int = 49407):
    """A CLIPModel with OpenAI's real vocabulary. Returns the model."""
    import open_clip
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"hidden_act": "gelu"}
    config = CLIPConfig(
        text_config=shared | {"vocab_size": 49408, "eos_token_id": eos, "bos_token_id": 49406, "pad_token_id": 1},
        vision_config=shared | {"image_size": SIDE, "patch_size": PATCH},
        projection_dim=EMBEDDING,
        logit_scale_init_value=2.5,
    )
    model = randomise(CLIPModel(config), seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    names = open_clip.get_tokenizer("ViT-B-32")
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in names.encoder.items()}
    merges = sorted(names.bpe_ranks, key=names.bpe_ranks.get)
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    save_processor(folder, **clip_processor_settings())
    return model


def hf_to_open_clip(state: dict) -> dict:
    """A CLIPModel's weights under open_clip's names, with queries, keys and values in one matrix."""
    names = {
        "logit_scale": "logit_scale",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    }
    for part in ("weight", "bias"):
        names[f"text_model.final_layer_norm.{part}"] = f"ln_final.{part}"
        names[f"vision_model.pre_layrnorm.{part}"] = f"visual.ln_pre.{part}"
        names[f"vision_model.post_layernorm.{part}"] = f"visual.ln_post.{part}"
    out = {new: state[old] for old, new in names.items()}
    out["text_projection"] = state["text_projection.weight"].T
    out["visual.proj"] = state["visual_projection.weight"].T
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"self_attn.out_proj": "attn.out_proj"}
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for k in range(2):
            old, new = f"{tower}.encoder.layers.{k}", f"{prefix}.resblocks.{k}"
            for part in ("weight", "bias"):
                out |= {f"{new}.{b}.{part}": state[f"{old}.{a}.{part}"] for a, b in inner.items()}
                rows = [state[f"{old}.self_attn.{x}_proj.{part}"] for x in "qkv"]
                out[f"{new}.attn.in_proj_{part}"] = torch.cat(rows)
    return {key: value.clone().contiguous() for key, value in out.items()}


def save_bert_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate([*WORDS, *extra])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


def save_align(folder: Path, seed: int = 0):
    """An AlignModel with `kakaobrain/align-base`'s kind of image settings. Returns the model."""
    from transformers import AlignConfig, AlignModel

    text = {"vocab_size": len(WORDS), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "max_position_embeddings": 512}
    vision = {"image_size": SIDE, "hidden_dim": 24, "kernel_sizes": [3], "in_channels": [32], "out_channels": [24]}
    vision |= {"strides": [2], "num_block_repeats": [1], "expand_ratios": [1], "depthwise_padding": []}
    vision |= {"width_coefficient": 1.0, "depth_coefficient": 1.0, "num_hidden_layers": 4}
    config = AlignConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = randomise(AlignModel(config), seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_bert_tokenizer(folder)
    settings = {"size": {"height": 40, "width": 40}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 2}
    settings |= {"do_center_crop": True, "do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True}
    settings |= {"include_top": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    save_processor(folder, "EfficientNetImageProcessor", **settings)
    return model


def save_dino(folder: Path, seed: int = 0):
    """A ViTModel without pooler, as `facebook/dino-vits16` is stored. Returns the model."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = randomise(ViTModel(ViTConfig(**sizes, image_size=SIDE, patch_size=PATCH), add_pooling_layer=False), seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    save_processor(folder, "ViTFeatureExtractor", size=SIDE, **imagenet)
    return model


def save_blip2(folder: Path, seed: int = 0):
    """A Blip2ForImageTextRetrieval with four queries. Returns the model."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=sizes | {"image_size": SIDE, "patch_size": PATCH},
        qformer_config=sizes
        | {"vocab_size": len(WORDS) + 1, "encoder_hidden_size": WIDTH, "use_qformer_text_input": True}
        | {"max_position_embeddings": 40},
        text_config={"model_type": "opt", "vocab_size": 10, "hidden_size": 8, "num_attention_heads": 1}
        | {"ffn_dim": 8, "num_hidden_layers": 1, "word_embed_proj_dim": 8, "max_position_embeddings": 8},
        num_query_tokens=4,
        image_text_hidden_size=EMBEDDING,
    )
    model = randomise(Blip2ForImageTextRetrieval(config), seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_bert_tokenizer(folder, ("<image>",))
    settings = clip_processor_settings() | {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    save_processor(folder, "BlipImageProcessor", **{k: v for k, v in settings.items() if k != "crop_size"})
    return model


def save_mask2former(folder: Path) -> Path:
    """A random Mask2Former in the published layout: config.json, model.safetensors, preprocessor_config.json."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **sizes,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=LABELS,
        label2id={v: k for k, v in LABELS.items()},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, do_resize=True).save_pretrained(folder)
    return folder


MED_CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 24,  # not the vision width: the published file's is overridden too
    "add_cross_attention": True,
}


def imagereward_state(seed: int = 0, vision: int = 64) -> dict[str, torch.Tensor]:
    """Random weights under ImageReward.pt's names and with its shapes, at width 64 (vision, one head) and 32 (text)."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, wide: int, narrow: int) -> None:
        state[f"{name}.weight"] = torch.randn(narrow, wide, generator=generator) * 1.5 / wide**0.5
        state[f"{name}.bias"] = torch.randn(narrow, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    state[f"{v}cls_token"] = torch.randn(1, 1, vision, generator=generator)
    state[f"{v}pos_embed"] = torch.randn(1, 1 + (SIDE // PATCH) ** 2, vision, generator=generator)
    state[f"{v}patch_embed.proj.weight"] = torch.randn(vision, 3, PATCH, PATCH, generator=generator) * 0.1
    state[f"{v}patch_embed.proj.bias"] = torch.randn(vision, generator=generator) * 0.1
    for k in range(2):
        norm(f"{v}blocks.{k}.norm1", vision)
        linear(f"{v}blocks.{k}.attn.qkv", vision, 3 * vision)
        linear(f"{v}blocks.{k}.attn.proj", vision, vision)
        norm(f"{v}blocks.{k}.norm2", vision)
        linear(f"{v}blocks.{k}.mlp.fc1", vision, 4 * vision)
        linear(f"{v}blocks.{k}.mlp.fc2", 4 * vision, vision)
    norm(f"{v}norm", vision)
    state[f"{t}embeddings.position_ids"] = torch.arange(512)[None]
    state[f"{t}embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, WIDTH, generator=generator)
    state[f"{t}embeddings.position_embeddings.weight"] = torch.randn(512, WIDTH, generator=generator)
    norm(f"{t}embeddings.LayerNorm", WIDTH)
    for k in range(2):
        layer = f"{t}encoder.layer.{k}"
        for attention, width in (("attention", WIDTH), ("crossattention", vision)):
            linear(f"{layer}.{attention}.self.query", WIDTH, WIDTH)
            linear(f"{layer}.{attention}.self.key", width, WIDTH)
            linear(f"{layer}.{attention}.self.value", width, WIDTH)
            linear(f"{layer}.{attention}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm", WIDTH)
        linear(f"{layer}.intermediate.dense", WIDTH, 64)
        linear(f"{layer}.output.dense", 64, WIDTH)
        norm(f"{layer}.output.LayerNorm", WIDTH)
    linear("blip.vision_proj", vision, 16)
    linear("blip.text_proj", WIDTH, 16)
    for k, wide, narrow in zip((0, 2, 4, 6, 7), (WIDTH, 1024, 128, 64, 16), (1024, 128, 64, 16, 1)):
        linear(f"mlp.layers.{k}", wide, narrow)
    return state


def save_imagereward(folder: Path, seed: int = 0) -> Path:
    """ImageReward.pt, med_config.json beside it, and a tokenizer in `bert`. Returns the .pt file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(imagereward_state(seed), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    save_bert_tokenizer(folder / "bert")
    return folder / "ImageReward.pt"
