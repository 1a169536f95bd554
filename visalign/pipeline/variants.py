"""Several versions of one pipeline's weights, side by side: LoRAs and trained components, each at any strength."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visalign.names import unknown_name

from .generator import Generator
from .lora_loading import load_lora


@dataclass(frozen=True)
class Variant:
    """A folder with a LoRA, or with one component of the pipeline as `save_pretrained` writes it."""

    folder: Path
    adapter: str | None  # name of the LoRA in the pipeline
    component: str | None  # name of the component


class Variants:
    """Versions of a pipeline's weights by name. The pipeline is the base's but within `using`.

    One at a time: `using` changes the weights of the pipeline, which all its users see.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._variants: dict[str, Variant] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._variants)

    def add(self, name: str, folder: str | Path) -> None:
        """Load a LoRA, or note a component's folder, which is read at its first use.

        Raises:
            ValueError: the name is taken, or the folder holds neither a LoRA nor a component of this pipeline.
        """
        folder = Path(folder)
        if name in self._variants:
            raise ValueError(f"name: got {name!r}, already taken, by {str(self._variants[name].folder)!r}")
        component = component_in(folder, self.pipeline)
        adapter = None
        if component is None:
            adapter = f"variant_{len(self._variants)}"
            load_lora(self.pipeline, folder, adapter)
            self.pipeline.disable_lora()
        self._variants[name] = Variant(folder, adapter, component)

    @contextmanager
    def using(self, generator: Generator, name: str | None, strength: float = 1.0) -> Iterator[None]:
        """Within, the pipeline has this version's weights; None: the base's.

        Args:
            generator: that drives the pipeline; it forgets its prompts where text encoders change.
            strength: in [0, 1], from the base's weights to the version's: the scale of a LoRA, or the place on the
                straight line between the weights.

        Raises:
            ValueError: an unknown name, or a strength out of range.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: got {strength}, expected within [0, 1]")
        if name is not None and name not in self._variants:
            raise unknown_name("variant", name, self._variants)
        if name is None or strength == 0:
            yield
            return
        variant = self._variants[name]
        with self._lora(generator, variant, strength) if variant.adapter else self._blend(variant, strength):
            yield

    @contextmanager
    def _lora(self, generator: Generator, variant: Variant, strength: float) -> Iterator[None]:
        touched = [name for name, loras in self.pipeline.get_list_adapters().items() if variant.adapter in loras]
        words = any(name.startswith("text_encoder") for name in touched)
        self.pipeline.enable_lora()
        self.pipeline.set_adapters([variant.adapter], [strength])
        if words:
            generator.clear_prompts()
        try:
            yield
        finally:
            self.pipeline.disable_lora()
            if words:
                generator.clear_prompts()

    @contextmanager
    def _blend(self, variant: Variant, strength: float) -> Iterator[None]:
        assert variant.component is not None
        module: nn.Module = self.pipeline.components[variant.component]
        other = self._read(variant, module)
        own = {key.replace(".base_layer.", "."): value for key, value in module.state_dict().items()}  # of a LoRA's
        own = {key: value for key, value in own.items() if key in other and value.is_floating_point()}
        before = {key: value.clone() for key, value in own.items()}
        try:
            with torch.no_grad():
                for key, value in own.items():
                    value.lerp_(other[key].to(value), strength)
            yield
        finally:
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(before[key])

    def _read(self, variant: Variant, module: nn.Module) -> dict[str, Tensor]:
        key = str(variant.folder)
        if key not in self._weights:
            loaded = type(module).from_pretrained(key, use_safetensors=True)  # type: ignore[attr-defined]
            self._weights[key] = dict(loaded.state_dict())
        return self._weights[key]


def component_in(folder: Path, pipeline: Any) -> str | None:
    """The component that a folder holds weights of, by the class that its config.json names; None: it has none."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    kind = json.loads(config.read_text()).get("_class_name")
    for name, component in pipeline.components.items():
        if type(component).__name__ == kind and isinstance(component, nn.Module):
            return name
    raise ValueError(f"folder: got {str(folder)!r}, a {kind}, expected one of this pipeline's components or a LoRA")
