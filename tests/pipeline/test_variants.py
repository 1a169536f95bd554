import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from visalign.commands.drawing import sample
from visalign.pipeline.generator import Generator
from visalign.pipeline.lora_loading import load_lora, lora_matrices
from visalign.pipeline.variants import Variants
from visalign.worlds import resolve_model

PROMPT, SEED = ["a red circle"], [3]


def load() -> Generator:
    return Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LoRA of the flow model and a transformer with other weights, as folders."""
    folder, pipeline = tmp_path_factory.mktemp("variants"), load().pipeline
    torch.manual_seed(0)
    other = copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(()))
    other.save_pretrained(folder / "weights")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(str(folder / "lora"), transformer_lora_layers=layers)
    return folder


@pytest.fixture(scope="module")
def generator():
    return load()


@pytest.fixture(scope="module")
def variants(generator, folders):
    found = Variants(generator.pipeline)
    found.base = sample(generator, PROMPT, SEED)  # before anything is added
    found.add("lora", folders / "lora")
    found.add("weights", folders / "weights")
    return found


def test_the_base_is_the_base_bit_for_bit_whatever_was_added_and_used(generator, variants):
    for name, strength in (("lora", 1.0), ("weights", 0.7)):
        with variants.using(generator, name, strength):
            assert (sample(generator, PROMPT, SEED) - variants.base).abs().max() > 0.01
        with variants.using(generator, None):
            assert torch.equal(sample(generator, PROMPT, SEED), variants.base)
        with variants.using(generator, name, 0.0):
            assert torch.equal(sample(generator, PROMPT, SEED), variants.base)


def test_full_strength_is_what_plain_diffusers_loads(generator, variants, folders):
    plain = load()
    plain.pipeline.load_lora_weights(str(folders / "lora"))
    with variants.using(generator, "lora"):
        torch.testing.assert_close(sample(generator, PROMPT, SEED), sample(plain, PROMPT, SEED), atol=1e-5, rtol=0)
    plain = load()
    plain.pipeline.transformer = type(plain.pipeline.transformer).from_pretrained(folders / "weights")
    with variants.using(generator, "weights"):
        torch.testing.assert_close(sample(generator, PROMPT, SEED), sample(plain, PROMPT, SEED), atol=1e-5, rtol=0)


def test_half_strength_lies_between(generator, variants):
    layer = generator.pipeline.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    base = layer(x)
    for name in ("lora", "weights"):
        with variants.using(generator, name, 0.5):
            half = layer(x)
        with variants.using(generator, name, 1.0):
            whole = layer(x)
        torch.testing.assert_close(half - base, (whole - base) / 2, atol=1e-5, rtol=1e-4)


def test_weights_are_put_back_after_an_error(generator, variants):
    with pytest.raises(RuntimeError, match="stopped"), variants.using(generator, "weights"):
        raise RuntimeError("stopped")
    assert torch.equal(sample(generator, PROMPT, SEED), variants.base)


def test_mistakes_are_named(generator, variants, folders, tmp_path):
    with pytest.raises(ValueError, match="strength: got 1.5"), variants.using(generator, "lora", 1.5):
        pass
    with pytest.raises(ValueError, match="did you mean 'lora'"), variants.using(generator, "lore"):
        pass
    with pytest.raises(ValueError, match="name: got 'lora', already taken"):
        variants.add("lora", folders / "lora")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="a FluxTransformer2DModel, expected one of this pipeline's components"):
        variants.add("other", tmp_path)


def renamed(folder, to, name):
    """The LoRA of the fixture with other names for its matrices."""
    values = load_file(str(folder / "lora" / "pytorch_lora_weights.safetensors"))
    to.mkdir()
    save_file({name(key): value for key, value in values.items()}, str(to / "lora.safetensors"))
    return to


def kohya(key):
    head, side = key.rsplit(".lora_", 1)
    side = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[side]
    return "lora_unet_" + head.replace(".", "_") + "." + side


@pytest.mark.parametrize(
    "name",
    [
        lambda key: key.removeprefix("transformer."),
        lambda key: key.replace("transformer.", "diffusion_model.blocks."),
        lambda key: key.replace("transformer.transformer_blocks.0", "transformer.transformer_blocks.77"),
        kohya,
    ],
    ids=["no prefix", "diffusion_model", "a layer it lacks", "lora_unet"],
)
def test_a_lora_of_which_not_all_arrives_is_refused_rather_than_drawn_without(folders, tmp_path, name):
    """Whether a foreign layout is taken is diffusers' business; that nothing is missing is ours."""
    pipeline = load().pipeline
    file = next(renamed(folders, tmp_path / "other", name).iterdir())
    try:
        assert load_lora(pipeline, file) >= len(lora_matrices(file))
    except ValueError as error:
        assert str(error).startswith("lora: ") and "\n" not in str(error)


def test_a_lora_loaded_whole_is_counted_and_other_files_are_refused(folders, tmp_path):
    pipeline, lora = load().pipeline, folders / "lora"
    wanted = len(lora_matrices(next(lora.iterdir())))
    assert load_lora(pipeline, lora, "good") == wanted > 0
    with pytest.raises(ValueError, match="of .* matrices in .* 0 came into|could not be loaded"):
        load_lora(pipeline, renamed(folders, tmp_path / "bare", lambda key: key.removeprefix("transformer.")), "bare")
    with pytest.raises(ValueError, match="holds no LoRA layers"):
        load_lora(pipeline, folders / "weights")
    with pytest.raises(ValueError, match="holds no .safetensors file"):
        load_lora(pipeline, tmp_path / "none")
