"""What is trained: LoRA or full weights of a Generator's modules, their reference, their average, their export."""

import copy
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visalign.pipeline.generator import Generator

ADAPTER = "default"
_WITH_LORA = ("transformer", "unet", "text_encoder")  # components, or what their names begin with
ATTENTION_ONLY = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("q_proj", "k_proj", "v_proj", "out_proj"),  # of text encoders
)
ALL_LINEAR = "all-linear"
CONDITIONING = re.compile(
    r"(^|[._])(t|time|timestep|text_embedder|guidance_embedder|pooled|adaln|mod|modulation|norm\d*)(?=[._]|$)", re.I
)


Parts = Literal["denoiser", "text", "both"]


class Policy:
    """The trainable part of a Generator's denoiser, its text encoders or both, in float32 whatever the model's dtype.

    `base_digest` names the weights it was built on. `modules` are those trained, by component; `module` is the first.

    Args:
        generator: its trained modules are changed in place. With text encoders under training (TexForce,
            arXiv:2311.15657) it encodes prompts anew in every call, see `Generator.encode_anew`.
        lora_rank: 0 trains all weights of the denoiser, and keeps a frozen copy as the reference; a half-precision
            denoiser then computes in its own dtype over float32 weights.
        lora_alpha: LoRA's scale is alpha / rank.
        lora_targets: names of linear layers, or of groups of them: "all-linear" (where None), "attention",
            "conditioning" (those that turn time and pooled text into the scales and shifts of norms).
        gradient_checkpointing: recompute the denoiser's activations in the backward pass.
        parts: what is trained; "text" and "both" need a lora_rank.
        component: which of the modules in the loop is trained, e.g. controlnet; None: the main one.

    Raises:
        ValueError: lora_targets that a module lacks, or a pipeline that could not load a LoRA on its text encoders.
    """

    def __init__(
        self,
        generator: Generator,
        lora_rank: int,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        parts: Parts = "denoiser",
        component: str | None = None,
    ):
        self.generator, self.lora_rank = generator, lora_rank
        if component is not None and component not in generator.denoisers:
            expected = sorted(generator.denoisers)
            raise ValueError(f"component: got {component!r}, expected one that runs in the loop: {expected}")
        module = generator.denoiser if component is None else generator.denoisers[component]
        denoiser = cast(Any, module)  # a diffusers model: its adapter methods are not in nn.Module
        components = generator.pipeline.components
        self.modules: dict[str, Any] = {}
        if parts != "text":
            self.modules[next(n for n, m in generator.denoisers.items() if m is denoiser)] = denoiser
        self.texts = _text_encoders(generator, lora_rank) if parts != "denoiser" else []
        self.modules |= {name: components[name] for name in self.texts}
        self.module = next(iter(self.modules.values()))
        for part in components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self.base_digest = "-".join(
            weights_digest(m) for m in {id(m): m for m in (denoiser, *self.modules.values())}.values()
        )
        self.frozen: dict[str, Tensor] = {}
        if lora_rank:
            alpha = lora_alpha if lora_alpha is not None else lora_rank
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for module in self.modules.values():
                    targets = _targets(module, lora_targets)
                    config = dict(r=lora_rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
                    module.add_adapter(LoraConfig(**config), ADAPTER)
        else:
            self.module.requires_grad_(True)
        self.trained: dict[str, nn.Parameter] = {
            name if parts == "denoiser" else f"{component}.{name}": p
            for component, module in self.modules.items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        dtype = next(iter(self.trained.values())).dtype
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
        if not lora_rank:
            if dtype != torch.float32:
                _compute_in(self.module, dtype)
            self.frozen = {name: p.detach().clone() for name, p in self.trained.items()}
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if self.texts:
            generator.encode_anew()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within, the generator is the base model: adapters off, or the frozen copy swapped in; without gradient."""
        with torch.no_grad():
            if self.lora_rank:
                with ExitStack() as after:
                    for module in self.modules.values():
                        module.disable_adapters()
                        after.callback(module.enable_adapters)
                    yield
            else:
                with self.swapped(self.frozen):
                    yield

    @contextmanager
    def swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Within, the trained parameters hold `values`; afterwards their own again, bit for bit."""
        own = {name: p.data for name, p in self.trained.items()}
        try:
            for name, parameter in self.trained.items():
                parameter.data = values[name]
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = own[name]

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.trained.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put trained weights back.

        Raises:
            ValueError: other names or shapes than this policy's.
        """
        check_same_names("resume", {k: tuple(v.shape) for k, v in tensors.items()}, self.trained)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])

    def export(self, folder: Path, values: dict[str, Tensor] | None = None) -> None:
        """Write what plain diffusers loads: `pipe.load_lora_weights(folder)`, or the component for full weights."""
        folder.mkdir(parents=True, exist_ok=True)
        with self.swapped(values or self.tensors()):
            if not self.lora_rank:
                self.module.save_pretrained(folder)
                return
            layers: dict[str, Any] = {}
            for component, module in self.modules.items():
                state = {
                    k: v.detach().clone() for k, v in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()
                }
                config = copy.deepcopy(module.peft_config[ADAPTER])
                layers[f"{component}_lora_layers"] = {_prefix(component, module) + k: v for k, v in state.items()}
                layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
        self.generator.pipeline.save_lora_weights(str(folder), **layers)


class Average:
    """Exponential moving average of a policy's weights, in float32 (arXiv:2505.05470's schedule).

    After update n the decay is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, policy: Policy, decay: float):
        self.policy, self.decay, self.updates = policy, decay, 0
        self.values = {name: p.detach().clone() for name, p in policy.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in self.policy.trained.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)


def _text_encoders(generator: Generator, lora_rank: int) -> list[str]:
    """The text encoders that can be trained by LoRA and loaded elsewhere."""
    pipeline = generator.pipeline
    names = [n for n, m in pipeline.components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)]
    taken = inspect.signature(pipeline.save_lora_weights).parameters if hasattr(pipeline, "save_lora_weights") else ()
    if not names or any(f"{name}_lora_layers" not in taken for name in names):
        raise ValueError(
            f"policy: got text encoders of {type(pipeline).__name__}, which loads no LoRA for {names or 'any'}, "
            "expected 'denoiser', or a pipeline that does (Stable Diffusion 1 and 2, SDXL, LCM)"
        )
    if not lora_rank:
        raise ValueError("lora_rank: got 0 for text encoders, expected > 0")
    return names


def _prefix(component: str, module: nn.Module) -> str:
    """What LoRA files put before a CLIP text model's layers, which were within a `text_model` until transformers 5."""
    return "text_model." if component.startswith("text_encoder") and not hasattr(module, "text_model") else ""


def scaled_change(policy: Policy, values: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Trained weights `values` with their change of the model scaled: LoRA's B, or the difference to the frozen copy.

    0 is the base model exactly, 1 gives `values` back; between them reward is traded for fidelity (arXiv:2309.17400).
    """
    if scale == 1:
        return values
    if policy.lora_rank:
        return {name: v * scale if ".lora_B." in name else v for name, v in values.items()}
    return {name: torch.lerp(policy.frozen[name], v, scale) for name, v in values.items()}


def _targets(module: nn.Module, wanted: Sequence[str] | None) -> Any:
    """peft's `target_modules` for layers that this denoiser really has."""
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    chosen: set[str] = set()
    for target in wanted or (ALL_LINEAR,):
        if target == ALL_LINEAR:
            names = set(linear)
        elif target == "conditioning":
            names = {name for name in linear if CONDITIONING.search(name)}
        else:
            suffixes = ATTENTION_ONLY if target == "attention" else (target,)
            names = {name for name in linear if any(name == s or name.endswith("." + s) for s in suffixes)}
        if not names:
            raise ValueError(
                f"lora_targets: got {target!r}, which this model lacks, expected attention, conditioning, all-linear "
                f"or names of linear layers, e.g. {linear[:4]}"
            )
        chosen |= names
    return [name for name in linear if name in chosen]


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module with float32 weights compute in `dtype`, as it did before its weights were widened."""
    forward = module.forward

    @functools.wraps(forward)
    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, dtype=dtype):
            return forward(*args, **kwargs)

    module.forward = autocast_forward  # type: ignore[method-assign]


def weights_digest(module: nn.Module, each: int = 16) -> str:
    """A short name for a module's weights: of every tensor's name, shape and first few values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:each].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_names(argument: str, got: dict[str, tuple[int, ...]], trained: dict[str, nn.Parameter]) -> None:
    """Refuse weights of another model, rank or target list."""
    expected = {name: tuple(p.shape) for name, p in trained.items()}
    if got == expected:
        return
    for name, shape in expected.items():
        if got.get(name) != shape:
            raise ValueError(f"{argument}: {name} has shape {got.get(name)}, expected {shape}: made for another model")
    raise ValueError(f"{argument}: holds {len(got)} tensors, expected {len(expected)}: made for another model")


def check_lora_fits(lora: Path, model: Path, rank: int | None = None, alpha: float | None = None) -> None:
    """Refuse a LoRA folder that does not belong to a local model, from the files' headers alone.

    Args:
        rank, alpha: those it is to be trained on with; None: any.

    Raises:
        ValueError: no LoRA file there, one of its layers is missing in the model or has other sizes, another rank or
            alpha.
    """
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora] if lora.is_file() else []
    if not files:
        raise ValueError(f"lora: got {str(lora)!r}, which holds no .safetensors file, expected a LoRA folder")
    layers = header(files[0])
    if not any(".lora_" in key for key in layers):
        raise ValueError(f"lora: got {str(files[0])!r}, which holds no LoRA layers, expected a LoRA file")
    weights: dict[str, list[int]] = {}
    for file in sorted(
        [*model.glob("*/diffusion_pytorch_model*.safetensors"), *model.glob("text_encoder*/model*.safetensors")]
    ):
        if file.parent.name.startswith(_WITH_LORA):
            weights |= {f"{file.parent.name}.{k}".replace(".text_model.", "."): s for k, s in header(file).items()}
    own_alpha = lora_alpha(files[0])
    for key, shape in layers.items():
        layer, dot, side = key.removesuffix(".weight").rpartition(".lora_")
        if not dot or not layer.startswith(_WITH_LORA):
            continue
        base = weights.get(f"{layer}.weight".replace(".text_model.", "."))
        want = None if base is None else base[1] if side == "A" else base[0]
        have, own_rank = (shape[1], shape[0]) if side == "A" else (shape[0], shape[1])
        if weights and want != have:
            raise ValueError(
                f"lora: {str(lora)!r} does not fit {str(model)!r}: {layer} is {base}, the LoRA needs {have}"
            )
        if rank is not None and own_rank != rank:
            raise ValueError(f"lora: {str(lora)!r} has rank {own_rank}, expected lora_rank, {rank}")
        if alpha is not None and (own_alpha or own_rank) != alpha:  # without a word of it, diffusers takes the rank
            raise ValueError(f"lora: {str(lora)!r} has alpha {own_alpha or own_rank:g}, expected lora_alpha, {alpha:g}")


def lora_alpha(file: Path) -> float | None:
    """The alpha that a LoRA file says it was trained with; None where it does not say."""
    with safe_open(str(file), "pt") as f:
        metadata = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return next((float(v) for k, v in metadata.items() if k.endswith("lora_alpha")), None)


def load_lora(policy: Policy, folder: Path) -> None:
    """Start from a LoRA that `export` or another tool wrote.

    Raises:
        ValueError: it is for other layers or of another rank.
    """
    file = next(iter(sorted(folder.glob("*.safetensors")))) if folder.is_dir() else folder
    tensors = load_file(str(file))
    for component, module in policy.modules.items():
        prefix = f"{component}.{_prefix(component, module)}"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        own = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()}
        if own != {k: tuple(v.shape) for k, v in state.items()}:
            raise ValueError(
                f"lora: {str(folder)!r} has other layers or another rank than lora_rank={policy.lora_rank} with these "
                f"lora_targets for {component}; give the ones it was trained with"
            )
        set_peft_model_state_dict(module, state, adapter_name=ADAPTER)


def header(file: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file, without reading its tensors."""
    try:
        with safe_open(str(file), "pt") as f:
            return {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{file}: damaged or no safetensors file ({' '.join(str(error).split())})") from None
