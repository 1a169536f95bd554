"""Pictures to a pipeline's latents: what its own decoding undoes."""

from typing import Any

import torch
from torch import Tensor

from .generator import Generator, UnsupportedPipeline


class Encoder:
    """Encodes images (N, 3, H, W) or videos (N, F, 3, H, W), float in [0, 1], to a Generator's latents, float32.

    The mean of the autoencoder's distribution is taken, not a sample, so that a picture always gives the same latents.
    Scale and shift are read from the autoencoder's configuration. At the first use it is checked that the pipeline
    decodes the latents as the autoencoder alone does.

    Raises:
        UnsupportedPipeline: no autoencoder, latents that the pipeline's loop holds otherwise (packed), or others that
            decode differently.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator, self._checked = generator, False
        self.vae: Any = getattr(generator.pipeline, "vae", None)
        self._name = type(generator.pipeline).__name__
        if self.vae is None or not hasattr(self.vae, "encode"):
            raise UnsupportedPipeline(f"pipeline: got {self._name} without a vae, expected one that encodes pictures")

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str], **inputs: Any) -> Tensor:
        """Latents (N, ...). `prompts` and `inputs` are for the check alone."""
        raw = self._raw(pictures)
        latents = self._scaled(raw).float()
        if not self._checked:
            self._check(raw, latents, prompts, inputs)
            self._checked = True
        return latents

    def _raw(self, pictures: Tensor) -> Tensor:
        pictures = pictures.transpose(1, 2) if pictures.ndim == 5 else pictures  # (N, 3, F, H, W)
        weights = next(self.vae.parameters())
        encoded = self.vae.encode((pictures * 2 - 1).to(weights.device, weights.dtype))
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent

    def _scaled(self, raw: Tensor) -> Tensor:
        config = self.vae.config
        if config.get("latents_mean") is not None:
            shape = (1, -1, *[1] * (raw.ndim - 2))
            mean, std = (torch.tensor(config[k]).to(raw).view(shape) for k in ("latents_mean", "latents_std"))
            return (raw - mean) / std
        return (raw - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)

    def _check(self, raw: Tensor, latents: Tensor, prompts: list[str], inputs: dict[str, Any]) -> None:
        expected = tuple(self.generator.noise(prompts, [0] * len(prompts), **inputs).shape)
        if tuple(latents.shape) != expected:
            got = f"{self._name}, whose latents are {expected} where its vae gives {tuple(latents.shape)}"
            raise UnsupportedPipeline(f"pipeline: got {got}, expected one that samples the vae's own latents")
        alone = self.vae.decode(raw, return_dict=False)[0]
        alone = (alone.transpose(1, 2) if alone.ndim == 5 else alone).float() / 2 + 0.5
        decoded = self.generator.decode(latents, prompts, **inputs)
        difference = (decoded - alone.clamp(0, 1)).abs().max().item()
        if not difference <= (1e-3 if raw.dtype == torch.float32 else 5e-2):
            raise UnsupportedPipeline(
                f"pipeline: got {self._name}, which decodes a picture's latents differently from its vae by "
                f"{difference:.1e}, expected the same"
            )


def picture_size(generator: Generator) -> tuple[int, int]:
    """Height and width in pixels of what a Generator draws: as it was told, else by its model's configuration.

    Raises:
        ValueError: neither says.
    """
    given = generator.call_kwargs
    if given.get("height") and given.get("width"):
        return int(given["height"]), int(given["width"])
    side = getattr(generator.denoiser.config, "sample_size", None)
    factor = getattr(generator.pipeline, "vae_scale_factor", None)
    if side is None or factor is None:
        raise ValueError(f"height, width: got {given.get('height')}, {given.get('width')}, expected numbers")
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    return int(height * factor), int(width * factor)
