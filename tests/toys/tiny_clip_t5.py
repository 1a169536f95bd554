"""A random CLIP-FlanT5 of a few thousand weights, saved as the published ones are, with the CLIP it looks through."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_hf import PATCH, SIDE, WIDTH, clip_processor_settings, randomise, save_processor
from torch import nn

D_MODEL, SPARE = 24, 12  # SPARE: rows of the head past the tokenizer's last token, as Flan-T5 has 28
SENTENCES = ["Yes", "No", "Yes indeed", "a red circle", "two blue squares on the left", "USER: ASSISTANT:"]
SENTENCES += ['Does this figure show "a green star"? Please answer yes or no.', "Look at the picture, then answer."]


def save_spiece(folder: Path) -> int:
    """T5's tokenizer files: spiece.model, learned from a few words, and its settings. Returns its number of tokens."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=90,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{k}>" for k in range(100)]
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": extra}
    settings = {**names, "extra_ids": 100, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size() + len(extra)


def save_tower(folder: Path, seed: int) -> None:
    """A whole CLIPModel with its image settings, as OpenAI's repository has it; no tokenizer, as none is read."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 10}, vision_config=vision))
    randomise(model, seed).save_pretrained(folder)
    save_processor(folder, **clip_processor_settings())


def save_clip_t5(folder: Path, kind: str = "pytorch_model.bin", seed: int = 0) -> SimpleNamespace:
    """The checkpoint in `folder`, its vision tower's repository in `folder`/tower.

    kind: "pytorch_model.bin" or "model.safetensors", either with " in shards", or with " without tower".

    Returns:
        the parts: t5, vision (with other weights than the repository's, unless without tower), projector.
    """
    from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    save_tower(folder / "tower", seed)
    vision = CLIPVisionModel.from_pretrained(folder / "tower").eval()
    if "without tower" not in kind:
        randomise(vision, seed + 1)
    sizes = {"d_model": D_MODEL, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
    sizes |= {"vocab_size": save_spiece(folder) + SPARE, "feed_forward_proj": "gated-gelu"}
    sizes |= {"decoder_start_token_id": 0, "tie_word_embeddings": False}
    t5 = randomise(T5ForConditionalGeneration(T5Config(**sizes)), seed + 2)
    generator = torch.Generator().manual_seed(seed + 3)
    head = torch.randn(t5.shared.weight.shape, generator=generator) * 0.3
    t5.lm_head.weight = nn.Parameter(head)  # Flan-T5's head is not its embedding
    layers = [nn.Linear(WIDTH, D_MODEL), nn.GELU(), nn.Linear(D_MODEL, D_MODEL)]
    projector = randomise(nn.Sequential(*layers), seed + 4)
    settings = {"mm_vision_tower": str(folder / "tower"), "mm_vision_select_layer": -2, "mm_hidden_size": WIDTH}
    settings |= {"mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True}
    settings |= {"architectures": ["CLIPT5ForConditionalGeneration"], "is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps({**sizes, **settings, "model_type": "clip_t5"}))
    save_state(folder, published_state(t5, vision, projector, "without tower" not in kind), kind)
    return SimpleNamespace(t5=t5, vision=vision, projector=projector)


def published_state(t5: nn.Module, vision: nn.Module, projector: nn.Module, tower: bool = True) -> dict[str, Any]:
    """All tensors by their published names, the embedding under four of them."""
    state = dict(t5.state_dict()) | {"embed_tokens.weight": t5.shared.weight.data}
    state |= {f"mm_projector.{key}": value for key, value in projector.state_dict().items()}
    if tower:
        names = {key: key if key.startswith("vision_model.") else f"vision_model.{key}" for key in vision.state_dict()}
        state |= {f"vision_tower.vision_tower.{names[key]}": value for key, value in vision.state_dict().items()}
        positions = torch.arange(vision.config.image_size**2 // vision.config.patch_size**2 + 1)[None]
        state["vision_tower.vision_tower.vision_model.embeddings.position_ids"] = positions  # of older releases
    return state


def save_state(folder: Path, state: dict[str, Any], kind: str) -> None:
    """In one file or, by `kind`, in two shards with their index."""
    from safetensors.torch import save_file

    name, sharded = kind.split(" ")[0], "in shards" in kind
    stem, ending = name.rsplit(".", 1)
    keys = sorted(state)
    halves = [keys[::2], keys[1::2]] if sharded else [keys]
    files = [f"{stem}-{k:05d}-of-00002.{ending}" for k in (1, 2)] if sharded else [name]
    for file, own in zip(files, halves):
        part = {key: state[key].clone().contiguous() for key in own}
        save_file(part, folder / file) if ending == "safetensors" else torch.save(part, folder / file)
    if sharded:
        placed = {key: file for file, own in zip(files, halves) for key in own}
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
