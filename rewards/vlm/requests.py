"""What an OpenAI-compatible chat endpoint is sent, and how its answers are read: pure functions on plain data.

`logprobs` and `top_logprobs` are OpenAI's. `video_url` with frames in one data URL and `prompt_logprobs` are vLLM's.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from visalign.images import images_to_numpy, images_to_pil

from .chat import Message, Reply, Token

PICTURE_FORMATS = ("png", "jpeg")
PIECE = "\ufffd"  # what a token decodes to that holds only some bytes of a character


def sampling_options(max_tokens: int, temperature: float, top_p: float, seed: int | None, top_logprobs: int) -> dict:
    """The options of a request by OpenAI's names; what is not asked for is left out."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if seed is not None:
        options["seed"] = seed
    if top_logprobs:
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    return options


def forcing_options() -> dict:
    """The options by which vLLM reads a given assistant turn instead of writing one, and says how likely it was.

    [R]: reconstructed from vLLM's request fields; 0 asks for the tokens that stand there and no alternatives.
    """
    options: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    return options | {"add_generation_prompt": False, "continue_final_message": True}


def content_key(model: str, conversation: Sequence[Message], options: Mapping[str, Any]) -> str:
    """Hash of all that an answer depends on: the model, the words, the pixels as sent (8 bits), the options."""
    digest = hashlib.sha256(json.dumps([model, options], sort_keys=True).encode())
    for message in conversation:
        digest.update(json.dumps([message.role, len(message.parts)]).encode())
        for part in message.parts:
            if isinstance(part, str):
                digest.update(json.dumps(part).encode())
            else:
                pixels = _frames(part)
                digest.update(json.dumps([part.ndim, pixels.shape]).encode())
                digest.update(pixels.tobytes())
    return digest.hexdigest()


def messages_payload(conversation: Sequence[Message], picture_format: str = "png") -> list[dict]:
    """A conversation as the endpoint's `messages`, pictures as data URLs in their places."""
    payload = []
    for message in conversation:
        content: Any = [_part_payload(part, picture_format) for part in message.parts]
        if len(content) == 1 and content[0]["type"] == "text":
            content = content[0]["text"]  # some chat templates take nothing else for a system or assistant turn
        payload.append({"role": message.role, "content": content})
    return payload


def _part_payload(part: str | Tensor, picture_format: str) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.ndim == 4:  # vLLM takes frames as JPEGs only
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(_encode(part, 'jpeg'))}"}}
    [picture] = _encode(part[None], picture_format)
    return {"type": "image_url", "image_url": {"url": f"data:image/{picture_format};base64,{picture}"}}


def _encode(frames: Tensor, picture_format: str) -> list[str]:
    # PNG compressed lightly: three times as fast, and little larger. JPEG with the quality that judges are served with.
    options: dict[str, int] = {"compress_level": 1} if picture_format == "png" else {"quality": 95}
    texts = []
    for picture in images_to_pil(frames):
        buffer = io.BytesIO()
        picture.save(buffer, picture_format, **options)
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return texts


def _frames(part: Tensor) -> np.ndarray:
    return images_to_numpy(part if part.ndim == 4 else part[None])


def read_reply(answer: Any, top_logprobs: int) -> Reply:
    """The reply in an endpoint's answer.

    Raises:
        ValueError: it holds no choice, no text, or not the log-probabilities that were asked for.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content")
        places = (choice.get("logprobs") or {}).get("content") or []
        tokens = tuple(Token(str(p["token"]), float(p["logprob"]), _top(p.get("top_logprobs") or ())) for p in places)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"got an answer that is no chat completion ({type(error).__name__}: {error})") from error
    if top_logprobs and not tokens:
        raise ValueError("got an answer without log-probabilities; does the server give them for this model?")
    if not isinstance(text, str) and not tokens:
        raise ValueError(f"got no text (finish_reason {choice.get('finish_reason')!r})")
    return Reply(text if isinstance(text, str) else "", tokens if top_logprobs else ())


def _top(alternatives: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Log-probability by text; tokens that read the same (byte pieces, or padding of the vocabulary) are added up."""
    top: dict[str, float] = {}
    for entry in alternatives:
        text, value = str(entry["token"]), float(entry["logprob"])
        top[text] = float(np.logaddexp(top[text], value)) if text in top else value
    return top


def read_forced(answer: Any, text: str) -> Reply:
    """The tokens of `text`, the last turn that was forced, with their log-probabilities.

    The endpoint lists those of the whole prompt; the tokens that spell `text` are found from the end, white space aside
    since a lone token may be spelt without its leading space.

    Raises:
        ValueError: no `prompt_logprobs` in the answer, or its last tokens do not spell the text.
    """
    places = answer.get("prompt_logprobs") if isinstance(answer, Mapping) else None
    if not places:
        raise ValueError("got an answer without prompt_logprobs, expected them: they are vLLM's, not of every server")
    tokens: list[Token] = []
    wanted, spelt = "".join(text.split()), ""
    try:
        for place in reversed(places):
            if place is None:  # the first token of all has nothing before it
                break
            [entry] = place.values()
            token = Token(str(entry["decoded_token"]), float(entry["logprob"]))
            spelling = "".join(token.text.split()) + spelt
            complete = _spells(wanted, spelt)  # perhaps: more tokens may fit what pieces of characters stand for
            if complete and (spelling == spelt or not _spells(wanted, spelling)):
                break
            if not complete and not _spells(wanted, spelling, ends=True):
                break
            tokens, spelt = [token, *tokens], spelling
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"got prompt_logprobs that cannot be read ({type(error).__name__}: {error})") from error
    if not _spells(wanted, spelt):
        raise ValueError(f"got prompt_logprobs that end in {spelt[-60:]!r}, expected them to end in {wanted[-60:]!r}")
    if not all(math.isfinite(token.log_prob) for token in tokens):
        raise ValueError("got prompt_logprobs that are not finite")
    return Reply(text, tuple(tokens))


def _spells(text: str, tokens: str, ends: bool = False) -> bool:
    """Whether the tokens read as the text, or as its end. Each split character, never ASCII, has two pieces or more."""
    pattern = ".*" if ends else ""
    for n, part in enumerate(re.split(f"({PIECE}+)", tokens)):
        cut = ends and n == 1 and tokens.startswith(PIECE)  # the first character's other pieces may be yet to come
        pattern += f"[^\\x00-\\x7f]{{1,{(len(part) + cut) // 2}}}" if n % 2 and len(part) + cut > 1 else re.escape(part)
    return re.fullmatch(pattern, text, re.DOTALL) is not None
