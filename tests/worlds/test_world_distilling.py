"""How the world's diffusion and consistency models learn: what their teachers tell, and the published boundary."""

import pytest
import torch
from diffusers import LCMScheduler
from torch import nn

from visalign.pipeline.generator import Generator
from visalign.worlds.shapes.building.consistency import SIGMA_DATA, clean, consistent, train_consistency
from visalign.worlds.shapes.building.diffusion import DDIM, teacher_noise, train_diffusion


class Knowing(nn.Module):
    """A flow model that knows the clean latents and the noise, and checks where it is asked."""

    def __init__(self, latents, noise):
        super().__init__()
        self.latents, self.noise = latents, noise

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections):
        sigma = (timestep / 1000)[:, None, None, None]
        torch.testing.assert_close(hidden_states, (1 - sigma) * self.latents + sigma * self.noise)
        return type("Output", (), {"sample": self.noise - self.latents})


def test_a_flow_model_is_asked_on_its_own_path_and_its_noise_found():
    latents, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.linspace(0.005, 0.999, 5, dtype=torch.float64)
    at = alpha_bar[:, None, None, None]
    noisy = at.sqrt() * latents + (1 - at).sqrt() * noise
    told = teacher_noise(Knowing(latents, noise), noisy, alpha_bar, latents, latents)
    torch.testing.assert_close(told, noise)
    torch.testing.assert_close(clean(told, noisy, at), latents)


def test_the_boundary_is_the_schedulers():
    scheduler = LCMScheduler(**DDIM, timestep_scaling=10.0)
    found, noisy = torch.ones(3, 1, 1, 1), torch.full((3, 1, 1, 1), 10.0)
    timesteps = torch.tensor([0, 1, 999])
    mixed = consistent(found, noisy, timesteps)
    for k, t in enumerate(timesteps.tolist()):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert mixed[k].item() == pytest.approx(c_skip * 10 + c_out, rel=1e-6)
    assert mixed[0].item() == 10 and scheduler.sigma_data == SIGMA_DATA


def test_the_scripts_write_folders_that_load_and_the_student_begins_as_its_teacher(tmp_path):
    torch.set_num_threads(1)
    small = dict(steps=1, batch_size=2, scenes=4)
    train_diffusion(tmp_path / "diffusion", **small)
    train_consistency(tmp_path / "consistency", teacher=tmp_path / "diffusion", learning_rate=0.0, **small)
    diffusion = Generator.from_pretrained(tmp_path / "diffusion")
    consistency = Generator.from_pretrained(tmp_path / "consistency")
    assert (diffusion.schedule.kind, consistency.schedule.kind) == ("diffusion", "consistency")
    assert (diffusion.num_steps, consistency.num_steps) == (10, 4)
    for name, value in diffusion.pipeline.unet.state_dict().items():
        torch.testing.assert_close(consistency.pipeline.unet.state_dict()[name], value)
    assert not consistency.pipeline.unet.time_embedding.cond_proj.weight.any()
