"""What the world's vision-language model learns from: pictures with questions in turn, and further losses."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from visalign.worlds.shapes.captions import caption
from visalign.worlds.shapes.questions import BETTER, SAME, WHOLE, Question, ask
from visalign.worlds.shapes.scenes import COLOURS, RELATIONS, SHAPES, Spec
from visalign.worlds.shapes.vlm import merge_order

from .tasks import Task, content


def turns(task: Task, rows: list[int], rng: np.random.Generator) -> tuple[list[list[Question]], list[int], list[int]]:
    """Questions for each row of a batch, the pictures they are about, and how many pictures each row has.

    Pictures are numbers into task.pictures, or -1 - k for spoilt picture k.
    """
    rounds: list[list[Question]] = []
    pictures: list[int] = []
    counts: list[int] = []
    number = int(rng.choice([1, 4, 7]))  # questions in turn; one number a batch, so that little is padded
    for row in rows:
        spec, miss, chance = task.specs[row], task.specs[row ^ 1], rng.random()
        if chance < 0.1:  # two pictures: the same meaning or not, or which one shows a caption
            second = row if rng.random() < 0.5 else row ^ 1
            if rng.random() < 0.5:
                rounds.append([Question("same", SAME, "Yes" if second == row else "No")])
            else:
                second = row ^ 1
                better = rng.random() < 0.5
                described = task.specs[second if better else row]
                rounds.append([Question("better", BETTER.format(caption(described, rng)), "Yes" if better else "No")])
            pictures += [row, second]
            counts.append(2)
        elif chance < 0.2:
            spoilt = rng.random() < 0.5
            pictures.append(-1 - row if spoilt else row)
            rounds.append([Question("whole", WHOLE, "No" if spoilt else "Yes")])
            counts.append(1)
        else:
            pictures.append(row)
            distinct = {q.text: q for q in (ask(spec, miss, rng) for _ in range(number))}.values()
            rounds.append(sorted(distinct, key=lambda q: q.kind == "describe"))  # last: it gives the others away
            counts.append(1)
    return rounds, pictures, counts


def conversation(processor: Any, questions: list[Question], pictures: int) -> tuple[list[int], list[int]]:
    """Token ids of the pictures and the questions with their answers, and labels: -100 but where an answer stands."""
    tokenizer, visual = processor.tokenizer, "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    ids: list[int] = []
    labels: list[int] = []
    for k, question in enumerate(questions):
        before = f"<|im_start|>user\n{visual * pictures if k == 0 else ''}{question.text}<|im_end|>\n"
        before += "<|im_start|>assistant\n"
        for text, taught in ((before, False), (question.answer + "<|im_end|>", True), ("\n", False)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if taught else [-100] * len(piece)
    return ids, labels


def batch_of(
    processor: Any, rounds: list[list[Question]], counts: list[int], device: str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs without pixels and labels (N, T) of a batch, padded on the right."""
    rows = [conversation(processor, questions, count) for questions, count in zip(rounds, counts)]
    longest = max(len(ids) for ids, _ in rows)
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in rows], device=device)
    labels = torch.tensor([x + [-100] * (longest - len(x)) for _, x in rows], device=device)
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows], device=device)
    visual = (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": visual}, labels


class AsideLosses(nn.Module):
    """The auxiliary losses and their heads; reads what the layers of `model` gave in its last forward."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Any, layer: int = 1):
        super().__init__()
        cells, width = len(COLOURS) * len(SHAPES), model.config.text_config.hidden_size
        self.patch = nn.Linear(model.config.vision_config.hidden_size, 1 + cells)
        self.count = nn.Linear(width, 5)
        self.side = nn.Linear(width, len(RELATIONS))
        self.seen: dict[str, Tensor] = {}
        self.colour: Tensor
        self.shape: Tensor
        self.embeddings = [model.get_input_embeddings().weight]  # in a list: not a parameter of this module
        model.model.visual.blocks[-1].register_forward_hook(self.keep("patches"))
        model.model.visual.merger.register_forward_hook(self.keep("merged"))
        model.model.language_model.layers[layer].register_forward_hook(self.keep("words"))
        for table, names, plural in (("colour", list(COLOURS), ""), ("shape", SHAPES, "s")):
            meanings = torch.full((len(processor.tokenizer),), -1)
            for k, name in enumerate(names):
                meanings[[word_id(processor, name), word_id(processor, name + plural)]] = k
            self.register_buffer(table, meanings)
            self.register_buffer(f"{table}_words", torch.tensor([word_id(processor, name) for name in names]))

    def keep(self, name: str) -> Any:
        return lambda _module, _args, out: self.seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    def named(self, ids: Tensor) -> Tensor:
        """Cells (N, T), colour * 4 + shape, at the words that end the name of an object; -1 elsewhere."""
        colour, shape = self.colour[ids].roll(1, 1), self.shape[ids]
        return torch.where((colour >= 0) & (shape >= 0), colour * len(SHAPES) + shape, -1)

    def forward(self, task: Task, places: list[int], counts: list[int], ids: Tensor) -> dict[str, Tensor]:
        clean = torch.tensor([k >= 0 for k in places], device=ids.device)
        known = merge_order(task.labels[[max(k, 0) for k in places]]).to(ids.device)
        plan = self.patch(self.seen.pop("patches")).view(len(places), 64, -1)[clean]
        losses = {"patches": F.cross_entropy(plan.flatten(0, 1), known[clean].flatten())}
        losses["words"] = self.word_loss(self.seen.pop("merged").view(len(places), 16, -1)[clean], known[clean])
        words, cells = self.seen.pop("words"), self.named(ids)
        first = [sum(counts[:n]) for n in range(len(counts))]
        cells[[n for n, count in enumerate(counts) if count > 1 or places[first[n]] < 0]] = -1
        row, place = (cells >= 0).nonzero(as_tuple=True)
        if len(row) == 0:
            return losses
        specs = [task.specs[max(places[k], 0)] for k in first]
        cell, hidden = cells[row, place], words[row, place]
        there = content(specs)[0].to(ids.device)[row, cell]
        sides = torch.tensor([side_of(specs[n], c) for n, c in zip(row.tolist(), cell.tolist())], device=ids.device)
        losses["counts"] = F.cross_entropy(self.count(hidden), there)
        if (sides >= 0).any():
            losses["sides"] = F.cross_entropy(self.side(hidden), sides, ignore_index=-100)
        return losses

    def word_loss(self, merged: Tensor, known: Tensor) -> Tensor:
        """Visual tokens (N, 16, D) that show an object should be near the embeddings of its colour's and shape's words.

        known: (N, 64) patch labels, in the order of `patches`. Cosines times ten are the logits.
        """
        present = known.view(-1, 16, 4).amax(-1)
        tokens, cell = F.normalize(merged[present > 0], dim=-1), present[present > 0] - 1
        losses = []
        for words, target in ((self.colour_words, cell // len(SHAPES)), (self.shape_words, cell % len(SHAPES))):
            losses.append(F.cross_entropy(10 * tokens @ F.normalize(self.embeddings[0][words], dim=-1).T, target))
        return losses[0] + losses[1]


def word_id(processor: Any, word: str) -> int:
    """The one token of a word within a sentence."""
    (token,) = processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return token


def side_of(spec: Spec, cell: int) -> int:
    """Which relation an object of a cell has to the other one of a scene drawn for a relation; -100 for none."""
    if spec.relation is None:
        return -100
    relation = RELATIONS.index(spec.relation)
    for (colour, shape, _), side in zip(spec.groups, (relation, relation ^ 1)):
        if list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape) == cell:
            return side
    return -100
