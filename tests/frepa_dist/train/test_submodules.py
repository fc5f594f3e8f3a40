import pytest
import torch
from torch import nn

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import Method, StepInfo
from frepa_dist.train.engines import World
from frepa_dist.train.submodules import EmaSubmodule, Submodules, check_opponents
from shards.support.errors import ConfigError
from tests.frepa_dist.train.adversarial_method import Pair, PairConfig

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def make(dtype: torch.dtype) -> tuple[nn.Linear, EmaSubmodule]:
    torch.manual_seed(0)
    student = nn.Linear(8, 8).to(dtype)
    teacher = nn.Linear(8, 8)
    teacher.load_state_dict(student.state_dict())
    return student, EmaSubmodule(teacher, student, WORLD, "fp32")


def test_what_is_not_trained_is_not_rounded():
    student, teacher = nn.Linear(8, 8), nn.Linear(8, 8)
    student.bias.requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    bias = student.bias.clone()
    average = EmaSubmodule(teacher, student.bfloat16(), WORLD, "bf16")
    average.after_step(0.0)
    assert torch.equal(average.module.bias, bias)
    assert torch.equal(average.module.weight, student.weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_the_average_follows_a_moving_student(dtype, momentum):
    student, teacher = make(dtype)
    expected = student.weight.detach().double().clone()
    for _ in range(200):
        with torch.no_grad():
            student.weight += torch.randn_like(student.weight) * 0.1
        expected = momentum * expected + (1 - momentum) * student.weight.detach().double()
        teacher.after_step(momentum)
    torch.testing.assert_close(teacher.module.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_of_a_bf16_student_is_held_in_fp32():
    """In bf16 a step of (1 - 0.9999) of the gap would be rounded away, and the teacher would stand still."""
    student, teacher = make(torch.bfloat16)
    start = teacher.module.weight.detach().clone()
    with torch.no_grad():
        student.weight += 1.0
    for _ in range(1000):
        teacher.after_step(0.9999)
    covered = ((teacher.module.weight - start) / (student.weight.float() - start)).mean()
    assert teacher.module.weight.dtype == torch.float32
    assert float(covered.detach()) == pytest.approx(1 - 0.9999**1000, rel=0.01)


def test_a_teacher_takes_no_gradient_and_runs_under_autocast():
    student = nn.Linear(8, 8).bfloat16()
    teacher = EmaSubmodule(nn.Linear(8, 8), student, WORLD, "bf16")
    output = teacher.call(torch.zeros(2, 8))
    assert output.dtype == torch.bfloat16
    assert not output.requires_grad


class Forgetful(Pair):
    opponent_losses = Method.opponent_losses


def test_opponents_without_losses_are_refused_before_anything_is_built():
    method = Forgetful(PairConfig())
    with pytest.raises(ConfigError, match=r"opponents \(judge\).*define opponent_losses in Forgetful"):
        Submodules(method, TrainConfig(steps=1), 1, WORLD)
    assert method.opponent_losses("judge", {}, {}, StepInfo(0, 1, 0)) is None


def test_opponents_are_asked_for_losses_only_where_there_are_some():
    method = Pair(PairConfig())
    check_opponents(method, method.submodules())
    student = {"student": method.submodules()["student"]}
    check_opponents(Forgetful(PairConfig()), student)
