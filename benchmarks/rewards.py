"""How much faster the yes-token rewards score than the naive route: ratios measured in one process.

    python benchmarks/rewards.py                # a tiny and a 100M-class random Qwen2.5-VL on this machine's CPU
    python benchmarks/rewards.py --size tiny
    python benchmarks/rewards.py --size 3b --device cuda --dtype bfloat16 --side 448

Task: a group of 16 candidates against one reference picture (RewardDance). Naive: the model's own forward on its
processor's output, logits of the whole vocabulary at all positions, nothing shared, 1 and 8 conversations at a time.
Naive and ours alternate; the median of their ratios is printed. The pictures of a round are new, but for the reference.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from visalign.images import images_to_pil
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.model import VLM
from visalign.rewards.vlm.yes_token import YesNo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "toys"))
import tiny_vlm

GROUP = 16
CRITERIA = """You compare two images made for the prompt: a red circle left of two blue squares on a wooden table.
Objects: everything that the prompt names is there, and nothing that contradicts it.
Counts: there are exactly as many of each thing as the prompt says.
Colours and materials: each belongs to the thing that the prompt gives it to, and to no other.
Positions: things stand to each other as the prompt says.
Quality: the image is sharp, evenly lit, well composed, and free of distortions, artefacts and stray text.
An image that shows less of the prompt is never the better one, however good it looks.
"""
SIZES = {  # hidden, layers, heads, keys' heads, vocabulary, vision width, vision depth
    "tiny": (32, 2, 2, 1, 512, 32, 2),
    "100m": (640, 10, 10, 2, 32768, 384, 8),
    "3b": (2048, 36, 16, 2, 151936, 1280, 32),
}


def make_vlm(size: str, device: str, dtype: str) -> VLM:
    """A random Qwen2.5-VL of this size with the tests' tiny tokenizer; rows of the head past it are never read."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tiny_vlm.make_tokenizer()
    hidden, layers, heads, kv_heads, vocabulary, width, depth = SIZES[size]
    head = hidden // heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 8, 3 * head // 16, head // 2 - head // 8 - 3 * head // 16],
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_heads": max(2, width // 80),
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [depth - 1],
        },
        **{name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tiny_vlm._TOKENS.items()},
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).to(device, getattr(torch, dtype))
    processor = tiny_vlm.make_processor("qwen2_5_vl", tokenizer)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}
    return VLM.of(model, processor, name=size, device=device, picture_cache=GROUP)


def conversations(reference: torch.Tensor, candidates: torch.Tensor) -> list[list[Message]]:
    question = "Is image 2 better than image 1? Answer Yes or No."
    return [[Message("user", (CRITERIA, "Image 1: ", reference, "Image 2: ", c, question))] for c in candidates]


def naive(vlm: VLM, asked: list[list[Message]], batch: int) -> torch.Tensor:
    yes, no = (vlm.tokenizer.encode(word)[0] for word in ("Yes", "No"))
    odds = []
    for k in range(0, len(asked), batch):
        part = asked[k : k + batch]
        pictures = [[images_to_pil(p[None])[0] for p in c[0].parts if isinstance(p, torch.Tensor)] for c in part]
        texts = [vlm.render(c) for c in part]
        inputs = vlm.processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: value.to(vlm.device) for name, value in inputs.items()}
        last = vlm.model(**inputs).logits[:, -1].float()
        odds.append(last[:, yes] - last[:, no])
    return torch.cat(odds)


def seconds(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


@torch.no_grad()
def measure(size: str, device: str, dtype: str, side: int, rounds: int) -> None:
    vlm = make_vlm(size, device, dtype)
    parameters = sum(weight.numel() for weight in vlm.model.parameters())
    judge, generator = YesNo(vlm), torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (3, side, side), generator=generator).float().to(device) / 255
    print(f"{size}: {parameters / 1e6:.1f}M parameters, {device}, {dtype}, {side} px, group of {GROUP}")
    for batch in (1, 8):
        ratios, gap = [], 0.0
        for k in range(rounds + 1):  # the first round warms up
            candidates = torch.randint(0, 256, (GROUP, 3, side, side), generator=generator).float().to(device) / 255
            asked = conversations(reference, candidates)
            slow, expected = seconds(lambda asked=asked, batch=batch: naive(vlm, asked, batch))
            fast, found = seconds(lambda asked=asked: judge(asked).log_odds)
            gap = max(gap, float((expected - found).abs().max()))
            if k:
                ratios.append(slow / fast)
        print(f"  naive at batch {batch}: {statistics.median(ratios):.2f} x our time, largest difference {gap:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: tiny and 100m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", type=int, default=224, help="pixels of a picture's side; a multiple of 28")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for size in arguments.size or ("tiny", "100m"):
        measure(size, arguments.device, arguments.dtype, arguments.side, arguments.rounds)
