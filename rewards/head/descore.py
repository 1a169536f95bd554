"""DeScore: a video judge that thinks first, in words, and then scores by a linear head on Qwen3-VL.

Reconstructed in part [R]: the places of question, thoughts and `<Reward>` in the conversation are ours, as the authors'
code could not be read; the head, its keys and its two passes are theirs.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_videos, images_to_pil
from visalign.rewards.base import Context, RewardError, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message
from visalign.rewards.vlm.heads import read_weights
from visalign.rewards.vlm.judging import SamplingParams, ask, column, fill, load_template
from visalign.rewards.vlm.loading import check_vlm_options

TOKEN = "<Reward>"
FILE = "rm_head.pth"
KEYS = ("rm_head.weight", "base_model.model.rm_head.weight")


def load_head(path: str | Path, features: int) -> Tensor:
    """The weight (features,), float32, of a file that has it under one of KEYS.

    Raises:
        ValueError: other keys or another shape; names them.
    """
    state = read_weights(path)
    if len(state) != 1 or next(iter(state)) not in KEYS:
        raise ValueError(f"head: got keys {sorted(state)} in {str(path)!r}, expected one of {KEYS}")
    key, weight = next(iter(state.items()))
    if tuple(weight.shape) != (1, features):
        raise ValueError(f"head: got shape {tuple(weight.shape)} for {key!r}, expected {(1, features)}")
    return weight[0].float()


@register_reward("descore")
class DeScoreReward:
    """A video's score; unbounded, higher is better; no gradient, as frames go through the model's own processor.

    The conversation is the video with the question, then the thoughts, then `<Reward>`, whose final hidden state is all
    that the head reads. Thoughts are asked of `thinker`, and are the rationale; without one they are empty, which the
    model was trained for too.

    Args:
        model: folder or hub id of the merged model and processor, with `<Reward>` in its tokenizer.
        template: the question it was taught, with "{prompt}": a .txt file or the text. It is not shipped.
        head: the file of the head; None: `rm_head.pth` in the model's folder.
        thinker: a chat with the same model, e.g. make_chat(model, url); its thoughts are scored here.
        fps: frames a second, where the context does not say.
        device: where to run; None follows the videos. dtype: of the backbone; the head is float32.
    """

    name = "descore"
    differentiable = False
    kind = "pointwise"
    media = "videos"
    needs = ("prompts",)
    range = (-math.inf, math.inf)
    checkpoints: tuple[str, ...] = ()
    licence = "see the model's page"
    source = "DeScore, decoupled think-then-score, on Qwen3-VL-8B"

    def __init__(
        self,
        model: str,
        template: str | Path | None = None,
        head: str | Path | None = None,
        thinker: Chat | None = None,
        fps: float = 2.0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        seed: int = 0,
        device: str | None = None,
        dtype: str = "bfloat16",
        download: bool = False,
    ) -> None:
        from visalign.rewards.vlm.model import VLM

        self.preflight({"template": template, "fps": fps, "dtype": dtype})
        self.template = load_template("", template)
        self.thinker, self.fps = thinker, float(fps)
        self.params = SamplingParams(max_tokens, temperature, seed=seed, retries=0)
        vlm = VLM(model, device, dtype, download)
        self.model, self.processor = vlm.model, vlm.processor
        self._device = None if device is None else torch.device(device)
        self.token = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        if self.token in (None, self.processor.tokenizer.unk_token_id):
            raise ValueError(f"model: got {model!r} without {TOKEN} in its tokenizer, expected DeScore's own")
        self.head = load_head(head or Path(model).expanduser() / FILE, self.model.config.get_text_config().hidden_size)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if options.get("template") is None or "{prompt}" not in load_template("", options["template"]):
            raise ValueError(
                "template: expected the question the model was taught, with '{prompt}' in the prompt's place"
            )
        fps = options.get("fps", 2.0)
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
            raise ValueError(f"fps: got {fps!r}, expected a number above 0")
        check_vlm_options(options.get("dtype", "bfloat16"))
        SamplingParams.of(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: videos (N, F, 3, H, W) in [0, 1]; prompts: N strings; context["fps"]: frames a second."""
        check_videos(images)
        check_prompts(images, prompts)
        if min(images.shape[-2:]) < 4:  # the processor could not tell what is the channels' axis
            got = f"{images.shape[-1]} x {images.shape[-2]} pixels"
            raise ValueError(f"videos: got {got}, expected at least 4 pixels a side")
        fps = float((context or {}).get("fps", self.fps))
        thoughts, problems = self._think(images, prompts)
        scores = [
            None if problem else self._score(video, prompt, thought, fps, n)
            for n, (video, prompt, thought, problem) in enumerate(zip(images, prompts, thoughts, problems))
        ]
        rationale = [problem or thought for thought, problem in zip(thoughts, problems)]
        return RewardOutput(column(scores), {}, rationale, torch.tensor([score is not None for score in scores]))

    def _think(self, videos: Tensor, prompts: Sequence[str]) -> tuple[list[str], list[str | None]]:
        if self.thinker is None:
            return [""] * len(prompts), [None] * len(prompts)
        chats = [[Message("user", fill(self.template, prompt, (video,)))] for video, prompt in zip(videos, prompts)]
        answers = ask(self.thinker, chats, lambda reply: reply.text, self.params)
        return [answer.value or "" for answer in answers], [answer.problem for answer in answers]

    @torch.no_grad()
    def _score(self, video: Tensor, prompt: str, thoughts: str, fps: float, n: int) -> float:
        device = self._device or video.device
        turn = [{"type": "video"}, {"type": "text", "text": self.template.replace("{prompt}", prompt)}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        frames = len(video)
        inputs = self.processor(
            text=[text + thoughts + TOKEN],
            videos=[images_to_pil(video)],
            video_metadata=[{"fps": fps, "total_num_frames": frames, "frames_indices": list(range(frames))}],
            do_sample_frames=False,
            return_tensors="pt",
        )
        places = (inputs["input_ids"][0] == self.token).nonzero()[:, 0]
        if len(places) != 1:
            problem = f"got {len(places)} {TOKEN} tokens, expected 1; is one in the prompt or the thoughts?"
            raise RewardError(self.name, problem, n, prompt)
        self.model.to(device)
        inputs = {k: v.to(device, self.model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        hidden = self.model.base_model(**inputs).last_hidden_state[0, places[0]]
        return float(hidden.float() @ self.head.to(device))
