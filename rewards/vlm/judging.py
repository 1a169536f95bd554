"""What judges that write their scores share: opening a chat, templates, and asking again what came back unreadable."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardError

from .chat import Chat, Message, Part, Reply
from .parsing import Unreadable

RETRY_TEMPERATURE = 0.7  # of asking again, where the first question was put at temperature 0 and would only repeat
RETRY_SEED_STEP = 1000  # keeps the seeds of second tries apart from those of a judge's several passes
_T = TypeVar("_T")
_UNIFIED = "github.com/CodeGoat24/UnifiedReward, "
_RATIONAL = "github.com/X-GenGroup/Flow-Factory, src/flow_factory/rewards/rational_rewards_"
UPSTREAM = {  # template: the project and file whose words a checkpoint was trained on; none of them is shipped here
    "hpsv3": "github.com/MizzenAI/HPSv3, hpsv3/dataset/data_collator_qwen.py",
    "editreward_following": "github.com/TIGER-AI-Lab/EditReward, EditReward/dataset/prompts.py",
    "editreward_quality": "github.com/TIGER-AI-Lab/EditReward, EditReward/dataset/prompts.py",
    "editscore_sc": "github.com/VectorSpaceLab/EditScore, editscore/vie_prompts.py",
    "editscore_pq": "github.com/VectorSpaceLab/EditScore, editscore/vie_prompts.py",
    "unifiedreward_point_v1": _UNIFIED + "inference_qwen/image_generation/qwen_point_score_image_generation.py",
    "unifiedreward_point_v2_image": _UNIFIED
    + "inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py",
    "unifiedreward_point_v2_video": _UNIFIED
    + "inference_qwen/UnifiedReward-2.0-inference/point_score_APS_video_generation.py",
    "unifiedreward_pair_rank_image": _UNIFIED + "inference_qwen/image_generation/qwen_pair_rank_image_generation.py",
    "unifiedreward_pair_score_image": _UNIFIED
    + "inference_qwen/UnifiedReward-2.0-inference/pair_score_image_generation.py",
    "unifiedreward_think_image": _UNIFIED
    + "UnifiedReward-Think/inference_qwen/UnifiedReward-Think-qwen3vl-inference/qwen3vl_infer_cot_image_generation.py",
    "rational_rewards_t2i_system": _RATIONAL + "t2i.py",
    "rational_rewards_t2i": _RATIONAL + "t2i.py",
    "rational_rewards_edit_system": _RATIONAL + "edit.py",
    "rational_rewards_edit": _RATIONAL + "edit.py",
    "clip_flant5_system": "github.com/linzhiqiu/t2v_metrics, SYSTEM_MSG in t2v_metrics/constants.py",
}


@dataclass(frozen=True)
class Answer(Generic[_T]):
    """What was read in a reply, or `value` None and the `problem`."""

    value: _T | None
    reply: Reply
    problem: str | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How a judge's words are drawn, and how often it is asked again.

    Raises:
        ValueError: a number out of range, under the name of its field.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int = 0
    retries: int = 3

    def __post_init__(self) -> None:
        check_count(vars(self), max_tokens=1, top_logprobs=0, retries=0)
        if type(self.temperature) not in (int, float) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature!r}, expected a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected 0 < top_p <= 1")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Those among a judge's options; what is not there, or None, is as by default."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: options[name] for name in names if options.get(name) is not None})


def ask(
    chat: Chat, conversations: Sequence[Sequence[Message]], read: Callable[[Reply], _T], params: SamplingParams
) -> list[Answer[_T]]:
    """One answer for each conversation, read by `read`, which raises Unreadable where it cannot.

    Unreadable answers are asked for again up to `params.retries` times, each time with another seed (and, from
    temperature 0, at RETRY_TEMPERATURE). A failed request is not: the chat has tried it again itself.
    """
    answers: list[Answer[_T] | None] = [None] * len(conversations)
    open_ = list(range(len(conversations)))
    for attempt in range(params.retries + 1):
        if not open_:
            break
        replies = chat(
            [conversations[n] for n in open_],
            max_tokens=params.max_tokens,
            temperature=RETRY_TEMPERATURE if attempt and params.temperature == 0 else params.temperature,
            top_p=params.top_p,
            seed=params.seed + attempt * RETRY_SEED_STEP,
            top_logprobs=params.top_logprobs,
        )
        if len(replies) != len(open_):
            raise ValueError(f"chat {chat.name!r}: got {len(replies)} replies, expected {len(open_)}")
        for n, reply in zip(open_, replies):
            answers[n] = _read(reply, read)
        open_ = [n for n in open_ if _unreadable(answers[n])]
    return [answer for answer in answers if answer is not None]


def _read(reply: Reply, read: Callable[[Reply], _T]) -> Answer[_T]:
    if reply.error is not None:
        return Answer(None, reply, f"no answer: {reply.error}")
    try:
        return Answer(read(reply), reply)
    except Unreadable as error:
        return Answer(None, reply, f"unreadable answer: {error}; it ends {reply.text[-80:]!r}")


def _unreadable(answer: Answer | None) -> bool:
    return answer is not None and answer.problem is not None and answer.reply.error is None


def open_chat(
    chat: Chat | None, model: str, url: str | None, options: Mapping[str, Any] | None, argument: str = "chat"
) -> Chat:
    """The chat given, or a new one with `model`; see `make_chat`."""
    if chat is not None and not callable(chat):
        raise ValueError(f"{argument}: got {type(chat).__name__}, expected a Chat")
    return make_chat(model, url, **(options or {})) if chat is None else chat


def load_template(name: str, given: str | Path | None = None) -> str:
    """What the user gave, a file (a path ending in .txt) or the text itself; or else that of UPSTREAM's `name`.

    The latter is read from NAME.txt in the folder that the environment variable VISALIGN_TEMPLATES names, or
    ~/.cache/visalign/templates.

    Raises:
        ValueError: no such file (says where the text is found), or no place in the text for the prompt.
    """
    if given is not None and not str(given).endswith(".txt"):
        text = str(given)
    else:
        path = template_folder() / f"{name}.txt" if given is None else Path(given).expanduser()
        if not path.is_file():
            raise ValueError(f"template: got no file at {str(path)!r}, expected {_wanted(name)}")
        text = path.read_bytes().decode("utf-8")  # read_text would change line ends
    mark = placeholder(name) if name in UPSTREAM else None
    if mark is not None and mark not in text:
        raise ValueError(f"template: got a text without {mark!r}, expected it in the prompt's place")
    return text


def load_templates(names: Mapping[str, str], given: Mapping[str, str | Path] | None = None) -> dict[str, str]:
    """The templates called `names` (key: name), but what the user gave by its key for those there; as above."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"templates: got {given!r}, expected a mapping with some of the keys {sorted(names)}")
    for key in given:
        if key not in names:
            raise unknown_name("templates", key, names)
    return {key: load_template(name, given.get(key)) for key, name in names.items()}


def template_folder() -> Path:
    """Where the user keeps other projects' templates."""
    return Path(os.environ.get("VISALIGN_TEMPLATES") or "~/.cache/visalign/templates").expanduser()


def placeholder(name: str) -> str | None:
    """What stands in a template for the prompt; None where there is no place for it."""
    if name == "editscore_sc":
        return "<instruction>"
    return None if name == "editscore_pq" or name.endswith("_system") else "{prompt}"


def _wanted(name: str) -> str:
    if name not in UPSTREAM:
        return "a text file"
    place = "" if placeholder(name) is None else f", with {placeholder(name)} for the prompt"
    pictures = " and <image> for each picture" if name in ("rational_rewards_t2i", "rational_rewards_edit") else ""
    return f"the words that the checkpoint was trained on: copy them from {UPSTREAM[name]}{place}{pictures}"


def check_count(options: Mapping[str, Any], **least: int) -> None:
    """Raise ValueError where an option is there and is no whole number of at least what is given for it."""
    for name, low in least.items():
        value = options.get(name, low)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {low}")


DEFAULTS = SamplingParams()


def fill(template: str, prompt: str, pictures: Sequence[Part] = (), placeholder: str = "{prompt}") -> tuple[Part, ...]:
    """Parts of a message: the prompt put in its place, pictures in those of "<image>", or else before the text.

    What stands in the prompt is left as it is, even if it looks like a placeholder.
    """
    pieces = template.split("<image>")
    texts = [piece.replace(placeholder, prompt) for piece in pieces]
    if len(pieces) == 1:
        return (*pictures, texts[0])
    if len(pieces) != len(pictures) + 1:
        raise ValueError(f"template: got {len(pieces) - 1} <image>, expected {len(pictures)}")
    parts: list[Part] = [texts[0]]
    for picture, text in zip(pictures, texts[1:]):
        parts += [picture, text]
    return tuple(part for part in parts if isinstance(part, Tensor) or part)


def source_images(context: Context | None, count: int, name: str) -> list[Tensor]:
    """The picture each edit began with: the first of its references.

    Raises:
        RewardError: a sample without one.
    """
    references = (context or {}).get("references")
    if references is None or len(references) != count:
        raise RewardError(name, f"got no references for {count} images, expected the source image of each")
    for n, own in enumerate(references):
        if len(own) == 0:
            raise RewardError(name, "got no reference, expected the source image", sample=n)
    return [own[0] for own in references]


def column(values: Sequence[float | None]) -> Tensor:
    """Numbers as float32 (N,), NaN where there is none."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def make_chat(model: str, url: str | None = None, **options: Any) -> Chat:
    """A chat with `model`: at an OpenAI-compatible endpoint where `url` is given, else run here by transformers."""
    if url is not None:
        from .remote_chat import RemoteChat

        return RemoteChat(model, url, **options)
    from .local_chat import LocalChat

    return LocalChat(model, **options)
