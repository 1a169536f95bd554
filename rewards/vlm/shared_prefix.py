"""Hidden states of many prompts, each shared beginning computed once.

The tokens that all prompts of a call begin with run as one row; then, for prompts about the same pictures, what those
share further (many questions on one picture); then the rest, in batches, on top of the keys and values so far. Every
token keeps the position it has in its whole prompt, so the result is that of whole prompts up to rounding.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompt import Picture, Prompt, Vision, left_pad


class SeeingModel(Protocol):
    """What is needed of a `VLM`."""

    base: Any  # the transformers model without its head
    vision: Any  # which tokens are visual; see QwenVision
    batch_size: int
    share_prefix: bool

    @property
    def device(self) -> torch.device: ...
    def see(self, pictures: Sequence[Picture]) -> dict[str, Vision]:
        """Features by picture key."""
        ...

    def positions(self, prompt: Prompt) -> Tensor:
        """Position ids, (axes, tokens)."""
        ...


@dataclass(frozen=True)
class State:
    """Keys and values of R rows of T tokens, some of them padding."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # (R, heads, T, size) each; none before the first token
    mask: Tensor  # (R, T), 1 where a token is


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a prompt, to run on top of row `parent` of a state."""

    place: int  # of the prompt in the call
    start: int
    stop: int
    parent: int = 0


def common_length(prompts: Sequence[Prompt], keep: int) -> int:
    """How many tokens all prompts begin with, leaving at least `keep` of the shortest."""
    most = max(0, min(len(p.marks) for p in prompts) - keep)
    first = prompts[0].marks
    return bisect_left(range(1, most + 1), True, key=lambda t: any(p.marks[:t] != first[:t] for p in prompts))


def shared_hidden(vlm: SeeingModel, prompts: Sequence[Prompt], keep: int = 1) -> Tensor:
    """Hidden states (N, keep, D) of the last `keep` tokens of each prompt; see `VLM.hidden`."""
    vision = vlm.see([picture for prompt in prompts for picture in prompt.pictures])
    runner = _Runner(vlm, prompts, vision)
    trunk = common_length(prompts, keep) if vlm.share_prefix and len(prompts) > 1 else 0
    trunk = trunk if _worth_it(trunk, prompts) else 0
    state = State((), torch.ones(1, 0, dtype=torch.long))
    if trunk:
        _, state = runner.run(state, [Piece(0, 0, trunk)])
    # Prompts that begin alike next to each other.
    order = sorted(range(len(prompts)), key=lambda n: [(isinstance(m, str), m) for m in prompts[n].marks])
    states: dict[int, Tensor] = {}
    for k in range(0, len(order), vlm.batch_size):
        places = order[k : k + vlm.batch_size]
        pieces, base = [Piece(n, trunk, len(prompts[n].ids)) for n in places], state
        branches = _branches(prompts, places, trunk, keep) if vlm.share_prefix else []
        if len(branches) < len(places) and branches:
            _, base = runner.run(state, [Piece(group[0], trunk, stop) for group, stop in branches])
            ends = [(n, stop, row) for row, (group, stop) in enumerate(branches) for n in group]
            pieces = [Piece(n, stop, len(prompts[n].ids), row) for n, stop, row in ends]
        hidden, _ = runner.run(base, pieces)
        short = keep - hidden.shape[1]
        hidden = F.pad(hidden, (0, 0, short, 0)) if short > 0 else hidden[:, -keep:]
        states.update(zip((piece.place for piece in pieces), hidden))
    return torch.stack([states[n] for n in range(len(prompts))])


def _branches(prompts: Sequence[Prompt], places: Sequence[int], trunk: int, keep: int) -> list[tuple[list[int], int]]:
    """Groups of prompts that share enough beyond the trunk, and where what each shares ends; [] if nothing does."""
    groups: list[tuple[list[int], int]] = []
    for n in places:
        if groups:
            group, stop = groups[-1]
            together = common_length([prompts[group[0]], prompts[n]], keep)
            together = min(together, stop) if len(group) > 1 else together
            if _worth_it(together - trunk, [prompts[n]], trunk):
                groups[-1] = ([*group, n], together)
                continue
        groups.append(([n], max(trunk + 1, len(prompts[n].ids) - keep)))
    if any(stop <= trunk or stop > len(prompts[n].ids) - keep for group, stop in groups for n in group):
        return []
    return groups


def _worth_it(shared: int, prompts: Sequence[Prompt], trunk: int = 0) -> bool:
    """Whether a pass of its own pays: at least a quarter of what is left to run."""
    return 4 * shared >= max(len(p.ids) for p in prompts) - trunk


class _Runner:
    """Runs pieces of prompts through the language model."""

    def __init__(self, vlm: SeeingModel, prompts: Sequence[Prompt], vision: dict[str, Vision]) -> None:
        self.vlm, self.prompts, self.vision = vlm, prompts, vision
        assert vlm.vision is not None
        self.sight = vlm.vision
        known: dict[Any, Tensor] = {}  # prompts of a call often differ in pictures of one size alone
        forms = [(prompt.ids, tuple(picture.pixels.shape for picture in prompt.pictures)) for prompt in prompts]
        for form, prompt in zip(forms, prompts):
            if form not in known:
                known[form] = vlm.positions(prompt)
        self.positions = [known[form] for form in forms]

    def run(self, state: State, pieces: Sequence[Piece]) -> tuple[Tensor, State]:
        """Hidden states (len(pieces), longest, D), padded on the left, and the state with these tokens in it."""
        from transformers import DynamicCache

        device = self.vlm.device
        ids, mask = left_pad([self.prompts[p.place].ids[p.start : p.stop] for p in pieces], 0)
        longest = ids.shape[1]
        positions = torch.stack(
            [
                F.pad(self.positions[p.place][:, p.start : p.stop], (longest - (p.stop - p.start), 0), value=0)
                for p in pieces
            ],
            dim=1,
        )
        parents = torch.tensor([p.parent for p in pieces], device=device)
        whole_mask = torch.cat([state.mask[parents.cpu()], mask], dim=1)
        cached = self.vlm.share_prefix
        cache = DynamicCache() if cached else None
        if cache is not None:
            for layer, (keys, values) in enumerate(state.layers):
                cache.update(keys[parents], values[parents], layer)
        visual = (self.sight.is_visual(ids) & mask.bool()).to(device)
        embeds, more = self._embed(ids.to(device), visual, pieces)
        out = self.vlm.base.language_model(
            inputs_embeds=embeds,
            attention_mask=whole_mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=cached,
            **more,
        )
        layers = tuple((layer.keys, layer.values) for layer in cache.layers) if cache is not None else ()
        return out.last_hidden_state, State(layers, whole_mask)

    def _embed(self, ids: Tensor, visual: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings (N, T, D) with the pictures' features in their places, and what Qwen3-VL wants besides."""
        embeds = self.vlm.base.get_input_embeddings()(ids)
        if not visual.any():
            return embeds, {}
        features = torch.cat([self._features(piece, None) for piece in pieces]).to(embeds.dtype)
        embeds = embeds.masked_scatter(visual[..., None], features)
        depth = max(len(v.deepstack) for v in self.vision.values())
        if not depth:
            return embeds, {}
        deep = [torch.cat([self._features(piece, layer) for piece in pieces]) for layer in range(depth)]
        return embeds, {"visual_pos_masks": visual, "deepstack_visual_embeds": deep}

    def _features(self, piece: Piece, layer: int | None) -> Tensor:
        """Features of the visual tokens within a piece, (tokens, D)."""
        prompt = self.prompts[piece.place]
        seen = [self.vision[picture.key] for picture in prompt.pictures]
        every = [v.features if layer is None else v.deepstack[layer] for v in seen]
        visual = [token in self.sight.types for token in prompt.ids[: piece.stop]]
        before, within = sum(visual[: piece.start]), sum(visual[piece.start :])
        if not within:
            features = next(iter(self.vision.values())).features
            return features.new_zeros(0, features.shape[-1])
        return torch.cat(every)[before : before + within]
