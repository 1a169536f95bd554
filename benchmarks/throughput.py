"""How much of the bare denoiser's speed a rollout and a training step keep: ratios measured in one process.

    python benchmarks/throughput.py             # the shipped shapes model, batch 32, float32, on this machine's CPU
    python benchmarks/throughput.py --gpu       # also a transformer of SD3.5-Medium's size, random weights

Baseline: the denoiser alone, called on latents and embeddings of the same shapes; forward only for rollouts, forward
and backward of a sum of squares for training. Baseline and measurement alternate; the median of their ratios is
printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.sampling.rollout import recompute, rollout
from visalign.training.policy import Policy
from visalign.transitions import FlowSDE
from visalign.worlds import resolve_model
from visalign.worlds.shapes import world_prompts


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def denoiser_arguments(generator: Generator, prompts: list[str], seeds: list[int]) -> dict:
    """What the stock pipeline hands the denoiser in a step."""
    seen: dict = {}
    hook = generator.denoiser.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        generator.predict(generator.noise(prompts, seeds), 0, prompts, seeds)
    hook.remove()
    return seen


def measure(generator: Generator, batch: int, rounds: int) -> None:
    prompts, seeds, steps = world_prompts("train", batch), list(range(batch)), generator.num_steps
    policy, transition = Policy(generator, lora_rank=32, lora_alpha=64), FlowSDE(0.7)
    arguments, denoiser = denoiser_arguments(generator, prompts, seeds), generator.denoiser
    trained = list(range(steps - 1))
    trajectory = rollout(generator, prompts, seeds, transition, sde_steps=trained)

    def bare_forward() -> None:
        with torch.no_grad():
            for _ in range(steps):
                denoiser(**arguments)

    def sample() -> None:
        rollout(generator, prompts, seeds, transition, sde_steps=trained, decode=False)

    def bare_training() -> None:
        for _ in trained:
            denoiser(**arguments)[0].square().mean().backward()

    def train() -> None:
        def learn(i: int, _latents: Tensor, prediction: Tensor) -> None:
            recompute(trajectory, i, prediction, transition).log_prob(trajectory.next_latents[i]).mean().backward()

        generator.denoise(prompts, seeds, learn, latents={i: trajectory.latents[i] for i in trained})

    for name, bare, ours, calls in (
        ("rollout", bare_forward, sample, steps),
        ("training", bare_training, train, len(trained)),
    ):
        ratios, overheads, rates = [], [], []
        seconds(bare), seconds(ours)
        for _ in range(rounds):
            first, second = seconds(bare), seconds(ours)
            ratios.append(first / second)
            overheads.append((second - first) / calls * 1e3)
            rates.append(batch / second)
        print(
            f"{name}: {statistics.median(ratios):.3f} of the bare denoiser ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"{statistics.median(overheads):+.2f} ms a step, {statistics.median(rates):.2f} images/s",
            flush=True,
        )
    decode = statistics.median(
        seconds(lambda: generator.decode(trajectory.final, prompts, seeds)) for _ in range(rounds)
    )
    print(f"decode: {decode / batch * 1e3:.2f} ms an image")
    policy.module.zero_grad(set_to_none=True)


def large_generator() -> Generator:
    """An SD3.5-Medium-sized transformer of random weights in the shapes pipeline's frame, bf16, 512 px latents."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    small = Generator.from_pretrained(resolve_model("shapes-flow"))
    small.close()
    parts = dict(small.pipeline.components)
    config = dict(small.pipeline.transformer.config)
    config |= {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    config |= {"sample_size": 64, "pos_embed_max_size": 64, "dual_attention_layers": tuple(range(13))}
    with torch.device("cuda"):
        parts["transformer"] = SD3Transformer2DModel.from_config(config)
    pipeline = StableDiffusion3Pipeline(**parts).to("cuda", torch.bfloat16)
    return Generator(pipeline, num_steps=10, guidance_scale=1.0, max_sequence_length=160, calibrate=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    print(f"shapes-flow, batch {arguments.batch}, {torch.get_num_threads()} threads")
    measure(
        Generator.from_pretrained(resolve_model("shapes-flow"), dtype=torch.float32), arguments.batch, arguments.rounds
    )
    if arguments.gpu:
        if not torch.cuda.is_available():
            raise SystemExit("throughput: --gpu needs a GPU")
        print(f"SD3.5-Medium-sized, random weights, bf16, 512 px, batch 8, {torch.cuda.get_device_name()}")
        torch.cuda.reset_peak_memory_stats()
        measure(large_generator(), 8, arguments.rounds)
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
