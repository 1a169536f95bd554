"""RewardDance: P(yes, this picture is better than the reference), averaged over reference pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardError, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.yes_token import Answers, YesNo, check_judge_options

from .vlm_yes import chosen, fill_in, score_range

CRITERIA = "how fully it shows what the prompt asks for, how good it looks, and how free it is of artefacts"
TASK = 'You compare two images made for the prompt "{prompt}". Judge {criteria}.'
QUESTION = "Is image 2 better than image 1? Answer yes or no first, then give your reason."


class ReferenceStore:
    """Reference pictures (R, 3, H, W) by prompt, to be put in again as the policy gets better."""

    def __init__(self) -> None:
        self._pictures: dict[str, Tensor] = {}

    def put(self, prompt: str, pictures: Tensor) -> None:
        check_images(pictures)
        self._pictures[prompt] = pictures.detach().clone()

    def get(self, prompt: str) -> list[Tensor]:
        """The prompt's references, none if it has none."""
        return list(self._pictures.get(prompt, ()))

    def __len__(self) -> int:
        return len(self._pictures)


@register_reward("rewarddance")
class RewardDance:
    """P("yes", image 2 is better than image 1), image 1 a reference, image 2 the candidate; range (0, 1).

    The mean over the references of each sample: those in `context["references"]`, else those that `references` keeps
    for its prompt. The instruction and a reference come first and run once for all candidates of a prompt; gradients
    reach the candidate only, of a local Qwen-VL. No weights are public: formula and order of the pictures follow the
    paper (Wu et al. 2025, arXiv:2509.08826), the words and the store are ours, and so is "binary" as default (the paper
    reads "full").

    Args:
        model: hub id or folder, or with `url` the server's name of it.
        criteria: what is to be compared, in words.
        swap: also ask with the pictures exchanged, and average P(r, x) with 1 - P(x, r); the criterion
            "position_bias" is what the second place is worth in log-odds.
        options: of `VLM`, or with `url` of `RemoteChat`.
    """

    name = "rewarddance"
    kind = "pointwise"
    media = "images"
    needs = ("prompts",)
    checkpoints = ()
    licence = "that of the model"
    source = "arXiv:2509.08826"

    def __init__(
        self,
        model: str,
        url: str | None = None,
        criteria: str = CRITERIA,
        swap: bool = False,
        yes: str = "yes",
        no: str = "no",
        convention: str = "binary",
        output: str = "probability",
        **options: Any,
    ) -> None:
        self.task, self.swap = TASK.replace("{criteria}", criteria), swap
        self.judge = YesNo(model, url, yes, no, convention, **options)
        self.differentiable = self.judge.differentiable
        self.output, self.range = output, score_range(output)
        self.references = ReferenceStore()

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge_options(options, RewardDance)

    def better(self, first: Sequence[Tensor], second: Sequence[Tensor], prompts: Sequence[str]) -> Answers:
        """Whether each second picture is better than the first, N pairs."""
        return self.judge(
            [
                [Message("user", (fill_in(self.task, p), "\nImage 1: ", a, "\nImage 2: ", b, f"\n{QUESTION}"))]
                for a, b, p in zip(first, second, prompts)
            ]
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1].

        Raises:
            RewardError: a sample without a reference.
        """
        check_images(images)
        check_prompts(images, prompts)
        given = (context or {}).get("references") or [self.references.get(prompt) for prompt in prompts]
        for n, (own, prompt) in enumerate(zip(given, prompts)):
            if not len(own):
                problem = "got no reference picture, expected some in context['references'] or in reward.references"
                raise RewardError(self.name, problem, n, prompt)
        candidates = images.unbind()
        owner = [n for n, own in enumerate(given) for _ in own]
        references = [reference.detach().to(images.device) for own in given for reference in own]
        pictures, words = [candidates[n] for n in owner], [prompts[n] for n in owner]
        forward = self.better(references, pictures, words)
        values, valid, criteria = chosen(forward, self.output), forward.valid, {}
        if self.swap:
            backward = self.better(pictures, references, words)
            mirrored = chosen(backward, self.output)
            values = (values + (1 - mirrored if self.output == "probability" else -mirrored)) / 2
            valid = valid & backward.valid
            criteria["position_bias"] = _mean_by(owner, (forward.log_odds + backward.log_odds).detach() / 2, len(given))
        everything = _mean_by(owner, valid.float().to(values.device), len(given)) == 1
        return RewardOutput(_mean_by(owner, values, len(given)), criteria, valid=everything)


def pick_references(reward: RewardDance, candidates: Tensor, prompt: str, top: int = 2) -> Tensor:
    """The `top` of N candidates (N, 3, H, W) by number of pairwise wins, best first: references for `put`.

    Each pair is asked in both orders and won by the side with the larger difference of log-odds; N (N - 1) questions.
    """
    check_images(candidates)
    n = len(candidates)
    if not 1 <= top <= n:
        raise ValueError(f"top: got {top}, expected 1 to {n}, the number of candidates")
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    matrix = torch.zeros(n, n)
    if pairs:
        pictures = candidates.detach().unbind()
        with torch.no_grad():
            output = reward.better(
                [pictures[i] for i, _ in pairs], [pictures[j] for _, j in pairs], [prompt] * len(pairs)
            )
        for (i, j), odds in zip(pairs, output.log_odds.tolist()):
            matrix[i, j] = odds  # that j is better than i
    wins = ((matrix.T - matrix).sign() + 1).fill_diagonal_(0).sum(dim=1) / 2  # a tie is half a win
    order = sorted(range(n), key=lambda k: (-float(wins[k]), k))
    return candidates[order[:top]]


def _mean_by(owner: Sequence[int], values: Tensor, count: int) -> Tensor:
    """Mean of the values of each owner, (count,)."""
    places = torch.tensor(owner, device=values.device)
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, places, values)
    return sums / torch.bincount(places, minlength=count)
