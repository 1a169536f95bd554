"""Every family driven through the Generator against its own stock pipeline, float32, four steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch

from visalign.pipeline.conformance import check
from visalign.pipeline.generator import Generator


@pytest.fixture(params=tiny.FAMILIES)
def measured(request, monkeypatch) -> tiny.Measured:
    tiny.shrink_condition_images(monkeypatch)
    return tiny.measure(request.param)


def test_noise_and_predictions_are_the_stock_ones_at_every_step(measured):
    assert measured.noise == 0
    assert measured.prediction <= 1e-5


def test_the_ode_ends_on_the_stock_latents(measured):
    if measured.trajectory is None:
        pytest.skip("the stock step draws noise")
    assert measured.trajectory <= 1e-5


def test_final_latents_decode_to_the_stock_images(measured):
    assert measured.decode <= 1e-5


def test_a_sample_is_the_same_alone_and_in_a_batch(measured):
    assert measured.batch <= 1e-5


def test_gradients_reach_the_denoiser_and_nothing_else(measured):
    assert all(0 < norm < float("inf") for norm in measured.gradients)
    assert measured.others == 0


_SCRIPT = """
import sys, torch, tiny_pipelines as tiny
torch.save({name: tiny.picture(name) for name in sys.argv[2:]}, sys.argv[1])
"""


def test_the_same_seed_gives_the_same_picture_in_another_process(tmp_path):
    names = ["Stable Diffusion 1.5", "Stable Diffusion 3", "Wan (video)"]
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "pictures.pt"), *names]
    subprocess.run(command, check=True, cwd=Path(tiny.__file__).parent, capture_output=True)
    for name, picture in torch.load(tmp_path / "pictures.pt").items():
        assert tiny.distance(tiny.picture(name), picture) == 0, name


def test_check_reports_the_same_differences_for_a_doctor():
    generator = Generator(tiny.make("Stable Diffusion 3"), num_steps=2, **tiny.FAMILIES["Stable Diffusion 3"].options)
    differences = check(generator, tiny.PROMPTS)
    assert set(differences) == {"noise", "prediction", "trajectory", "decode", "image", "batch"}
    assert max(differences.values()) <= 1e-5
