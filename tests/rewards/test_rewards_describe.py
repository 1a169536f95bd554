import sys

import pytest
import torch

from visalign.commands import cli
from visalign.rewards import entry_points as points
from visalign.rewards import make_reward, parse_spec, register_reward, reward_names, score
from visalign.rewards.base import _REWARDS
from visalign.rewards.describe import describe, table

PACKAGE = """
import torch

class Sharp:
    '''Steps between
    pixels.

    More.
    '''
    name, kind, differentiable, range, needs = "sharp", "pointwise", True, (0.0, 1.0), ()
    licence, checkpoints = "MIT", ("someone/model",)

    def __init__(self, power, gain=2.0):
        self.gain = gain * power

    def __call__(self, images, prompts, context=None):
        return self.gain * images.diff(dim=3).abs().mean(dim=(1, 2, 3))

def pale(images):
    return images.mean(dim=(1, 2, 3))

number = 3
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with entry points, as pip leaves it."""
    (tmp_path / "a_package.py").write_text(PACKAGE)
    (tmp_path / "broken_package.py").write_text("import no_such_thing")
    for name, lines in {
        "a_package": "".join(f"{n} = a_package:{n}\n" for n in ("pale", "number"))
        + "clip = a_package:Sharp\nsharp = a_package:Sharp\n",
        "broken_package": "broken = broken_package:thing\npale_too = a_package:pale\nabsent = a_package:nothing\n",
        "rival": "twice = a_package:pale\n",
        "other": "twice = a_package:Sharp\n",
    }.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[visalign.rewards]\n{lines}")
    monkeypatch.syspath_prepend(str(tmp_path))
    points._found.cache_clear()
    yield
    points._found.cache_clear()
    for name in ("a_package", "broken_package"):
        sys.modules.pop(name, None)


def test_a_package_brings_rewards_and_options(installed):
    images = torch.rand(2, 3, 8, 8)
    assert {"sharp", "pale", "broken"} <= set(reward_names())
    sharp = make_reward("sharp", power=3.0)
    torch.testing.assert_close(score(sharp, images, ["a", "b"]).total, 6 * images.diff(dim=3).abs().mean(dim=(1, 2, 3)))
    result = score(make_reward("pale:0.5+jpeg_compressibility:0"), images, ["a", "b"])
    torch.testing.assert_close(result.total, images.mean(dim=(1, 2, 3)) / 2)
    with pytest.raises(ValueError, match="did you mean 'power'"):
        parse_spec("sharp", powr=1)


def test_a_broken_package_matters_only_when_asked_for(installed):
    assert score(make_reward("pale"), torch.rand(1, 3, 4, 4), ["a"]).total.shape == (1,)
    assert "a_package" in sys.modules and "broken_package" not in sys.modules
    for name, says in {
        "broken": "reward 'broken': could not load 'broken_package:thing' of package 'broken_package': ModuleNotFound",
        "absent": "reward 'absent': could not load 'a_package:nothing' of package 'broken_package': AttributeError",
        "number": "'a_package:number' of package 'a_package', which is a int, expected a callable",
        "twice": "reward 'twice': got several entry points, .*rival.* and .*other|other.* and .*rival",
    }.items():
        with pytest.raises(ValueError, match=says) as error:
            parse_spec(name)
        assert "\n" not in str(error.value)


def test_a_package_cannot_take_a_name_of_ours(installed):
    assert type(make_reward("clip")).__name__ == "ClipReward"


def test_a_description_is_what_the_class_says(installed):
    d = describe("sharp")
    assert (d.kind, d.differentiable, d.range, d.needs, d.media) == ("pointwise", True, (0.0, 1.0), (), "images")
    assert (d.licence, d.checkpoints, d.source, d.about) == ("MIT", ("someone/model",), "", "Steps between pixels.")
    assert list(d.options) == ["power", "gain"] and d.options["gain"] == 2.0
    assert describe("pale").kind is None


def test_show_prints_options_and_whether_they_are_required(installed, capsys):
    cli.main(["rewards", "show", "sharp"])
    out = capsys.readouterr().out
    assert "power (required)" in out and "gain = 2.0" in out and "someone/model" in out and "[0, 1]" in out
    cli.main(["rewards", "show", "jpeg_compressibility"])
    out = capsys.readouterr().out
    assert "unit_kb = 1.0" in out and "(-inf, 0]" in out and "gradient    no" in out


def test_list_has_a_line_for_every_name_also_where_importing_fails(installed, capsys):
    cli.main(["rewards", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == reward_names()
    assert "could not load 'broken_package:thing'" in next(line for line in lines if line.startswith("broken"))
    (gold,) = (line for line in lines if line.startswith("gold "))
    assert gold.split() == ["gold", "pointwise", "images", "no", "[0,", "1]", "prompts"]


def test_listing_loads_no_weights(monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("torch.load", loads)
    monkeypatch.setattr("safetensors.torch.load_file", loads)
    monkeypatch.setattr("visalign.rewards.embedding.encoder._load", loads)
    assert len(table()) == len(reward_names()) + 1


def test_every_reward_of_ours_says_what_it_is():
    for name in reward_names():
        d = describe(name)
        if name == "remote":  # is what its server says
            continue
        assert d.kind and len(d.about) > 20, name
        assert d.media in ("images", "videos", "both"), name


def test_attributes_that_only_an_instance_knows_are_not_made_up(monkeypatch):
    monkeypatch.setattr("visalign.rewards.base._REWARDS", dict(_REWARDS))

    @register_reward("by_option")
    class ByOption:
        """Its range depends on an option, so the class cannot tell."""

        kind, differentiable = "pointwise", False

        @property
        def range(self):
            return (0.0, 1.0)

    assert describe("by_option").range is None


def test_bad_calls_are_one_line(capsys):
    for argv, says in {
        ("show",): "'show' takes the name",
        ("list", "clip"): "'list' takes none",
        ("show", "clop"): "did you mean 'clip'",
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main(["rewards", *argv])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and says in error and error.count("\n") == 1
