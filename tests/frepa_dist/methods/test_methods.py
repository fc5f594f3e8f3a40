from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from safetensors.torch import save_file

from frepa_dist.config import RunConfig
from frepa_dist.methods.base import Losses, StepInfo
from frepa_dist.methods.mae import MaeConfig, ModelConfig, create_model, create_student, normalize_images
from frepa_dist.methods.mine_term import HmiConfig, ema_momentum, teacher_tokens
from frepa_dist.methods.registry import create_method
from frepa_dist.methods.retmae import AuxConfig, RetMaeConfig
from frepa_dist.methods.terms import scheduled_weight
from shards.support.errors import ConfigError, DataError
from shards.support.settings import validate
from tests.frepa_dist.methods.steps import ThreadComm

MODEL = ModelConfig(size="tiny", image_size=32, patch_size=8)
LATE = StepInfo(step=90, total_steps=100, seed=7)
NUM_SAMPLES = 8


def whole_batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (NUM_SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "window": torch.tensor([[0.0, 255.0]]).repeat(NUM_SAMPLES, 1),
        "hf_indices": torch.rand(NUM_SAMPLES, 16, generator=generator).argsort(1)[:, :4],
        "mask_noise": torch.rand(NUM_SAMPLES, 16, generator=generator),
        "slot": torch.arange(NUM_SAMPLES),
    }


def build(config):
    """The networks of a method, the critics' zero layer filled so that they have something to say."""
    torch.manual_seed(0)
    nets = {name: spec.build() for name, spec in create_method(config).submodules().items()}
    for name, net in nets.items():
        if name.endswith("critic"):
            torch.nn.init.normal_(net.last.weight, std=0.3)
    if "teacher" in nets:
        own = nets["teacher"].state_dict()
        nets["teacher"].load_state_dict({k: v for k, v in nets["student"].state_dict().items() if k in own})
    return nets


def train_step(config, nets, world_size=1, accumulation=1, info=LATE):
    """One global batch as the loop runs it: mean gradients, the method's state and the metrics of rank 0."""
    comm, batch = ThreadComm(world_size), whole_batch()
    per_rank = NUM_SAMPLES // world_size
    micro = per_rank // accumulation
    cuts = [[r * per_rank + m * micro for m in range(accumulation)] for r in range(world_size)]
    batches = [[{k: v[at : at + micro] for k, v in batch.items()} for at in rank] for rank in cuts]
    method = create_method(config)
    targets = [[method.targets(nets, b, info) for b in rank] for rank in batches]
    names = targets[0][0].keys()
    pool = {name: torch.cat([micro[name] for rank in targets for micro in rank]) for name in names}

    def run(rank):
        own, method = {k: copy.deepcopy(v) for k, v in nets.items()}, create_method(config)
        method.load_state_dict({k: torch.tensor(0.3) for k in method.state_dict()})
        metrics = []
        for b, t in zip(batches[rank], targets[rank], strict=True):
            losses = method.losses(own, b, t, pool, info, comm)
            (losses.total / accumulation).backward()
            metrics.append(losses.metrics)
        method.after_step(info, comm)
        gradients = {
            f"{net}.{name}": p.grad
            for net, module in own.items()
            for name, p in module.named_parameters()
            if p.grad is not None
        }
        return gradients, method.state_dict(), metrics

    with ThreadPoolExecutor(world_size) as threads:
        results = list(threads.map(run, range(world_size)))
    gradients = {k: sum(r[0][k] for r in results) / world_size for k in results[0][0]}
    for _, state, _ in results:
        assert state == results[0][1]  # all ranks hold the same moving averages
    return gradients, results[0][1], results[0][2]


@pytest.mark.parametrize("estimator", ["dv", "smile", "infonce", "js", "cosine"])
def test_gradients_do_not_depend_on_how_the_global_batch_is_cut(estimator):
    config = RetMaeConfig(model=MODEL, hmi=HmiConfig(estimator=estimator, weight=1.0, negatives=3, hidden=16))
    nets = build(config)
    whole, state, _ = train_step(config, nets)
    alone, _, _ = train_step(config.model_copy(update={"hmi": None}), build(config))
    assert not torch.allclose(whole["student.norm.weight"], alone["student.norm.weight"], atol=1e-5)
    assert any(name.startswith("teacher_critic.") for name in whole) == (estimator != "cosine")
    for world_size, accumulation in ((1, 2), (2, 1), (2, 2)):
        cut, cut_state, _ = train_step(config, nets, world_size, accumulation)
        assert cut.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(cut_state, state, rtol=0, atol=1e-6)


def test_only_student_and_critics_get_gradients():
    config = RetMaeConfig(model=MODEL)
    gradients, _, _ = train_step(config, build(config))
    assert {name.split(".")[0] for name in gradients} == {"student", "teacher_critic"}


def test_warm_up_is_plain_mae():
    early = StepInfo(step=9, total_steps=100, seed=7)
    config = RetMaeConfig(model=MODEL)
    nets = build(config)
    del nets["teacher"], nets["teacher_critic"]  # not even called
    gradients, state, metrics = train_step(config, nets, info=early)
    plain, _, _ = train_step(MaeConfig(model=MODEL), {"student": nets["student"]}, info=early)
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert float(state["hmi.log_average"]) == pytest.approx(0.3)
    assert metrics == [{}]


def test_the_teacher_sees_the_hf_tokens_alone():
    config = RetMaeConfig(model=MODEL)
    nets, batch = build(config), whole_batch()
    method = create_method(config)
    before = method.targets(nets, batch, LATE)["teacher"]
    assert before.shape == (NUM_SAMPLES, 192)
    assert not before.requires_grad
    images = nets["student"].patchify(batch["image"])
    rest = torch.ones(NUM_SAMPLES, 16, dtype=torch.bool).scatter(1, batch["hf_indices"], False)
    images[rest] = 0
    changed = {**batch, "image": nets["student"].unpatchify(images)}
    assert torch.equal(method.targets(nets, changed, LATE)["teacher"], before)


def test_the_teacher_sees_random_tokens_as_a_control():
    config = RetMaeConfig(model=MODEL, hmi=HmiConfig(tokens="random"))
    batch = {**whole_batch(), "draw_key": [3 + number for number in range(NUM_SAMPLES)]}
    chosen = teacher_tokens(config.hmi, batch)
    assert chosen.shape == batch["hf_indices"].shape
    assert all(len(set(row)) == len(row) and set(row) <= set(range(16)) for row in chosen.tolist())
    assert len({tuple(row) for row in chosen.tolist()}) == NUM_SAMPLES
    part = {**batch, "hf_indices": batch["hf_indices"][2:], "draw_key": batch["draw_key"][2:]}
    assert torch.equal(teacher_tokens(config.hmi, part), chosen[2:])  # however the batch is cut
    nets, method = build(config), create_method(config)
    seen = method.targets(nets, batch, LATE)["teacher"]
    given = create_method(RetMaeConfig(model=MODEL)).targets(nets, {**batch, "hf_indices": chosen}, LATE)
    assert torch.equal(seen, given["teacher"])


def test_z_is_the_mean_of_the_visible_patches_after_the_final_norm(monkeypatch):
    from frepa_dist.methods import mine_term

    config = RetMaeConfig(model=MODEL)
    nets, batch, seen = build(config), whole_batch(), []
    real = mine_term.mine_loss

    def spy(estimator, critic, pairs, *args, **kwargs):
        seen.append(pairs)
        return real(estimator, critic, pairs, *args, **kwargs)

    monkeypatch.setattr(mine_term, "mine_loss", spy)
    method = create_method(config)
    targets = method.targets(nets, batch, LATE)
    method.losses(nets, batch, targets, targets, LATE, ThreadComm(1))
    keep = batch["mask_noise"].argsort(1)[:, :4]
    tokens = nets["student"].encode(normalize_images(batch, MODEL), keep)
    torch.testing.assert_close(seen[0].z, tokens[:, 1:].mean(1))


def test_metrics_and_the_sign_of_the_loss():
    config = RetMaeConfig(model=MODEL)
    nets, batch, method = build(config), whole_batch(), create_method(config)
    targets = method.targets(nets, batch, LATE)
    losses = method.losses(nets, batch, targets, targets, LATE, ThreadComm(1))
    assert set(losses.metrics) == {
        f"mi/{key}" for key in ("estimate", "critic_mean", "critic_max", "log_partition", "skipped")
    }
    assert all(value.ndim == 0 and not value.requires_grad for value in losses.metrics.values())
    assert losses.weights == {"rec": 1.0, "hmi": 0.1}
    terms = losses.terms
    torch.testing.assert_close(losses.total, terms["rec"] + 0.1 * terms["hmi"])
    assert -losses.terms["hmi"] <= losses.metrics["mi/estimate"] + 1e-6  # minimized: minus a lower bound


def test_a_runaway_critic_is_skipped_and_counted():
    config = RetMaeConfig(model=MODEL)
    nets = build(config)
    plain, _, _ = train_step(MaeConfig(model=MODEL), {"student": nets["student"]})
    nets["teacher_critic"].last.bias.data.fill_(25.0)
    gradients, state, metrics = train_step(config, nets, world_size=2, accumulation=2)
    assert [float(m["mi/skipped"]) for m in metrics] == [1.0, 1.0]
    assert float(metrics[0]["mi/log_partition"]) > 20
    assert float(state["hmi.log_average"]) == pytest.approx(0.3)
    for name, gradient in gradients.items():
        if name.startswith("teacher_critic"):
            assert not gradient.any()
        else:
            torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)


def test_state_goes_round_and_foreign_state_is_refused():
    method = create_method(RetMaeConfig(model=MODEL))
    method.load_state_dict({"hmi.log_average": torch.tensor(1.5)})
    assert method.state_dict() == {"hmi.log_average": torch.tensor(1.5)}
    with pytest.raises(ValueError, match="expected"):
        method.load_state_dict({"other": torch.tensor(1.5)})


def test_hf_masking_hides_the_hf_tokens():
    seen = []

    def student(images, noise, mask_ratio):
        seen.append(noise)
        return create_model(MaeConfig(model=MODEL))(images, noise, mask_ratio)

    batch = whole_batch()
    for flag in (True, False):
        create_method(MaeConfig(model=MODEL, hf_masking=flag)).losses(
            {"student": student}, batch, {}, {}, LATE, ThreadComm(1)
        )
    hidden = seen[0].argsort(1)[:, 4:]
    assert all(
        set(hf.tolist()) <= set(row.tolist()) for hf, row in zip(batch["hf_indices"], hidden, strict=True)
    )
    assert torch.equal(seen[1], batch["mask_noise"])


def test_schedules():
    config = HmiConfig()

    def at(step):
        return StepInfo(step=step, total_steps=1000, seed=0)

    assert scheduled_weight(config, at(0)) == scheduled_weight(config, at(100)) == 0
    assert scheduled_weight(config, at(125)) == pytest.approx(0.05)
    assert scheduled_weight(config, at(150)) == scheduled_weight(config, at(999)) == pytest.approx(0.1)
    sudden = HmiConfig(ramp_fraction=0)
    assert [scheduled_weight(sudden, at(step)) for step in (99, 100)] == [0, 0.1]
    assert scheduled_weight(HmiConfig(warmup_fraction=0, ramp_fraction=0), at(0)) == 0.1
    assert ema_momentum(config, at(0)) == pytest.approx(0.996)
    assert ema_momentum(config, at(999)) == 1
    assert ema_momentum(config, StepInfo(step=500, total_steps=1001, seed=0)) == pytest.approx(0.998)


def test_images_are_normalized_in_float32():
    batch = whole_batch()
    images = batch["image"]
    mean, std = torch.tensor(MODEL.mean).view(3, 1, 1), torch.tensor(MODEL.std).view(3, 1, 1)
    torch.testing.assert_close(normalize_images(batch, MODEL), (images.float() / 255 - mean) / std)
    window = torch.tensor([[-160.0, 240.0]]).repeat(NUM_SAMPLES, 1)
    ct = torch.randint(-1024, 3072, (NUM_SAMPLES, 1, 32, 32), dtype=torch.int16)
    expected = (((ct.float() + 160) / 400).clamp(0, 1) - mean) / std
    torch.testing.assert_close(normalize_images({"image": ct, "window": window}, MODEL), expected)


def test_a_term_of_weight_0_stays_out_of_the_graph():
    x = torch.tensor(2.0, requires_grad=True)
    losses = Losses({"a": x * 3, "b": x / 0}, {"a": 0.5, "b": 0.0})
    losses.total.backward()
    assert float(losses.total.detach()) == 3.0
    assert float(x.grad) == 1.5


@pytest.fixture
def aux_weights(tmp_path):
    path = tmp_path / "aux.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.mark.parametrize("hmi", [None, HmiConfig()])
def test_the_auxiliary_encoder_has_a_critic_and_a_term_of_its_own(aux_weights, hmi):
    config = RetMaeConfig(model=MODEL, hmi=hmi, aux=AuxConfig(model="test_vit", weights=aux_weights))
    specs = create_method(config).submodules()
    kinds = {"student": "engine", "auxiliary": "frozen", "auxiliary_critic": "plain"}
    if hmi is not None:
        kinds |= {"teacher": "ema", "teacher_critic": "plain"}
        assert specs["teacher"].of == "student"
        assert specs["teacher"].momentum(LATE) == ema_momentum(hmi, LATE)
    assert {name: spec.kind for name, spec in specs.items()} == kinds
    nets = build(config)
    whole, state, metrics = train_step(config, nets)
    assert set(state) == {"aux.log_average"} | ({"hmi.log_average"} if hmi else set())
    assert "mi_aux/estimate" in metrics[0]
    assert any(name.startswith("auxiliary_critic.") for name in whole)
    cut, _, _ = train_step(config, nets, 2, 2)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_the_auxiliary_encoder_sees_what_the_student_sees(aux_weights):
    config = RetMaeConfig(model=MODEL, hmi=None, aux=AuxConfig(model="test_vit", weights=aux_weights))
    nets, batch, method = build(config), whole_batch(), create_method(config)
    expected = nets["auxiliary"](batch["image"] / 255)
    torch.testing.assert_close(method.targets(nets, batch, LATE)["auxiliary"], expected)
    shifted = {"image": batch["image"].short() * 4 - 500, "window": 4 * batch["window"] - 500}
    torch.testing.assert_close(
        method.targets(nets, {**batch, **shifted}, LATE)["auxiliary"], expected, atol=1e-4, rtol=0
    )


def test_the_auxiliary_encoder_runs_in_the_compute_dtype(aux_weights):
    config = RetMaeConfig(model=MODEL, hmi=None, aux=AuxConfig(model="test_vit", weights=aux_weights))
    nets, batch = build(config), whole_batch()
    full = create_method(config).targets(nets, batch, LATE)["auxiliary"]
    half = create_method(config, torch.bfloat16).targets(nets, batch, LATE)["auxiliary"]
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_cosine_needs_embeddings_of_one_width():
    with pytest.raises(ConfigError, match="192 and 64"):
        create_method(RetMaeConfig(model=MODEL, aux=AuxConfig(model="test_vit", estimator="cosine")))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "mae", "hmi": {}}, "hmi"),
        ({"name": "unheard-of"}, "name"),
        ({"name": "mae", "model": {"image_size": 100}}, "multiple"),
        ({"name": "mae", "model": {"image_size": 32}, "mask_ratio": 0.9}, "mask_ratio"),
        ({"name": "retmae", "hmi": {"estimator": "kl"}}, "estimator"),
        ({"name": "retmae", "hmi": {"partition_limit": 200}}, "partition_limit"),
    ],
)
def test_configs_that_cannot_be(method, words):
    data = {"output": "run", "data": {"root": "data"}, "train": {"steps": 1}, "method": method}
    with pytest.raises(ConfigError, match=words):
        validate(RunConfig, data, where="test")


def test_a_student_starts_from_a_checkpoint_and_a_model_does_not_need_it(tmp_path):
    start = create_model(MaeConfig(model=MODEL))
    save_file(start.state_dict(), tmp_path / "mae.safetensors")
    config = MaeConfig(model=MODEL.model_copy(update={"init": tmp_path / "mae.safetensors"}))
    assert torch.equal(create_student(config).decoder_pred.weight, start.decoder_pred.weight)
    gone = MaeConfig(model=MODEL.model_copy(update={"init": tmp_path / "gone.pth"}))
    create_model(gone)
    with pytest.raises(DataError, match=r"gone\.pth"):
        create_student(gone)
