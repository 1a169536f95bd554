"""What pictures look like in numbers: colour, sharpness, repeating patterns, and how much those of a group differ.

Statistics take images (N, 3, H, W), float in [0, 1], on any device, and return (N,) float32. They are there to be
watched over a training: which values are good is not for them to say, but a policy that exploits its reward tends to
move them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG


def brightness(images: Tensor) -> Tensor:
    """Mean luma, range [0, 1]."""
    return luma(images).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luma over the pixels, range [0, 0.5]."""
    return luma(images).flatten(1).std(dim=1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """Mean over the pixels of the S of HSV, (max - min) / max over the channels; black counts 0. Range [0, 1]."""
    check_images(images)
    high, low = images.detach().float().amax(1), images.detach().float().amin(1)
    return torch.where(high > 0, (high - low) / high.clamp(min=1e-6), 0.0).mean((1, 2))


def high_frequency(images: Tensor, cutoff: float = 0.25) -> Tensor:
    """Share of the luma's energy at frequencies above `cutoff` cycles a pixel, mean left out; range [0, 1].

    A Hann window keeps the picture's edges, which a Fourier transform joins to each other, from passing for detail.
    An even picture gives 0.

    Args:
        cutoff: length of the frequency vector; an axis ends at 0.5, so 0.25 is the upper octave.
    """
    if not 0 < cutoff < 0.5:
        raise ValueError(f"cutoff: got {cutoff}, expected within (0, 0.5)")
    grey = luma(images)
    height, width = grey.shape[1:]
    window = _hann(height, grey)[:, None] * _hann(width, grey)
    mean = (grey * window).sum((1, 2), keepdim=True) / window.sum()  # of what is seen
    power = torch.fft.fft2((grey - mean) * window).abs().square()
    down, right = torch.fft.fftfreq(height, device=grey.device), torch.fft.fftfreq(width, device=grey.device)
    above = (down[:, None].square() + right.square()).sqrt() > cutoff
    return _share((power * above).sum((1, 2)), power.sum((1, 2)), grey)


def grid_energy(images: Tensor, period: int = 8) -> Tensor:
    """How much of the luma's finer energy repeats every `period` pixels, range [0, 1].

    A transformer's or a decoder's patches leave peaks in the spectrum at multiples of 1 / period, across and down: this
    is their share of all energy at frequencies of 1 / period and above. A pattern of that period alone gives 1; white
    noise about period^2 / (H W). An even picture gives 0. Pictures are cropped to a multiple of the period.

    Raises:
        ValueError: fewer than two periods fit.
    """
    grey = luma(images)
    height, width = (side - side % period if period > 0 else 0 for side in grey.shape[1:])
    if period < 2 or min(height, width) < 2 * period:
        raise ValueError(f"period: got {period}, expected within 2 to half the side ({min(grey.shape[1:])} pixels)")
    grey = grey[:, :height, :width]
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square()
    down, right = torch.fft.fftfreq(height, device=grey.device), torch.fft.fftfreq(width, device=grey.device)
    fine = (down[:, None].square() + right.square()).sqrt() > 0.999 / period  # rounding must not drop 1 / period
    peaks = power[:, :: height // period, :: width // period].sum((1, 2))  # the mean, at 0, has no energy left
    return _share(peaks, (power * fine).sum((1, 2)), grey)


def embed_pixels(images: Tensor, side: int = 8) -> Tensor:
    """A cheap encoder: the picture averaged down to side x side, about mid-grey, (N, 3 * side * side + 1).

    Its cosine sees layout and colour, not texture. The last, small, coordinate is the same for all, so that two evenly
    grey pictures are alike rather than undefined.
    """
    check_images(images)
    small = F.adaptive_avg_pool2d(images.detach().float(), side).flatten(1) - 0.5
    return F.pad(small, (0, 1), value=1e-2)


def cosine_distance(features: Tensor) -> float:
    """Mean of 1 - cosine over the pairs of n >= 2 features (n, D): 0 for copies, 1 for orthogonal ones, at most 2."""
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected (n, D) with n >= 2")
    n, unit = len(features), F.normalize(features.detach().double(), dim=1)
    gram = unit @ unit.T
    return float(1 - (gram.sum() - gram.trace()) / (n * (n - 1)))


def luma(images: Tensor) -> Tensor:
    """(N, H, W) float32 in [0, 1], detached."""
    check_images(images)
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    return (images.detach().float() * weights).sum(1)


def _hann(length: int, like: Tensor) -> Tensor:
    return torch.hann_window(length, device=like.device) if length > 1 else torch.ones(1, device=like.device)


def _share(part: Tensor, whole: Tensor, grey: Tensor) -> Tensor:
    """part / whole; 0 where the whole is no more than float32's rounding of the pixels."""
    floor = 1e-10 * grey[0].numel() ** 2
    return torch.where(whole > floor, part / whole.clamp(min=floor), 0.0)
