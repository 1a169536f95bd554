"""A world of real pictures: the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships.

An unconditional flow model of them, a classifier whose log-probabilities are rewards, and a second classifier that
judges. Small enough that laws of samples, and not only the best of them, can be compared: a sample of 20 steps takes
about a millisecond. The pictures are from Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, CC BY 4.0.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from visalign.transitions import Schedule

from .network import SIDE, DigitClassifier, DigitFlow

WEIGHTS = Path(__file__).parent / "weights"
HELD_OUT = 500  # pictures in neither network's training


@lru_cache
def load_pictures(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 8, 8), float32 in [0, 1], 1 is ink, and their digits (N,): 1,297 to train, 500 to test.

    The split is a fixed shuffle, the same for all networks.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    rows = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
    pictures = torch.tensor(digits.images[rows] / 16, dtype=torch.float32)
    return pictures[:, None], torch.tensor(digits.target[rows])


def load_network(name: Literal["flow", "classifier", "judge"], folder: Path | str = WEIGHTS) -> nn.Module:
    """A network of `python -m visalign.worlds.digits.build`, float32, frozen, on the CPU.

    "classifier" is for rewards, "judge", trained apart from it, for measuring what they led to.

    Raises:
        ValueError: an unknown name, or no file of it in the folder.
    """
    from safetensors.torch import load_file

    if name not in ("flow", "classifier", "judge"):
        raise ValueError(f"name: got {name!r}, expected 'flow', 'classifier' or 'judge'")
    file = Path(folder) / f"{name}.safetensors"
    if not file.is_file():
        raise ValueError(f"folder: got no file at {str(file)!r}; `python -m visalign.worlds.digits.build` makes one")
    network = DigitFlow() if name == "flow" else DigitClassifier()
    network.load_state_dict({key: weight.float() for key, weight in load_file(file).items()})
    return network.eval().requires_grad_(False)


class DigitsModel:
    """The flow over digits, as searches ask for a model (`visalign.search.chain.Model`). Prompts are ignored.

    Latents are (N, 1, 8, 8) float32, twice the picture less one; images are (N, 3, 8, 8) in [0, 1].

    Args:
        num_steps: T, of equal length.
        network: velocity (N, 1, 8, 8) from latents and sigma (N,); None: the shipped one.
        device: where it runs.

    Raises:
        ValueError: num_steps below 1.
    """

    def __init__(
        self, num_steps: int = 20, *, network: nn.Module | None = None, device: str | torch.device = "cpu"
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: got {num_steps}, expected >= 1")
        self.device = torch.device(device)
        self.denoiser = (load_network("flow") if network is None else network).to(self.device)
        sigmas = torch.linspace(1, 0, num_steps + 1)
        self.schedule = Schedule("flow", 1000 * sigmas[:-1], sigmas=sigmas)

    def noise(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The first latents, a row from each seed alone, drawn on the CPU."""
        if len(prompts) != len(seeds):
            raise ValueError(f"seeds: got {len(seeds)}, expected {len(prompts)}, one per prompt")
        rows = [torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    def predict(self, latents: Tensor, step_index: int, prompts: Sequence[str]) -> Tensor:
        """The velocity (N, 1, 8, 8) at a step's latents, float32, with gradient if grad is enabled."""
        sigma, _ = self.schedule.step(step_index)
        return self.denoiser(latents.float(), torch.full((len(latents),), sigma, device=latents.device))

    def decode(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (N, 3, 8, 8); no gradient reaches pixels that are clamped."""
        return ((latents.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
