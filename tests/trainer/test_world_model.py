"""The world model: its encoders and predictors, its loss, and what a plan asks of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vicreg_jepa import cli, config
from vicreg_jepa.compare import memory
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.evaluation import state_probe, world_report
from vicreg_jepa.methods import build
from vicreg_jepa.methods.world import whiten
from vicreg_jepa.ops import published
from vicreg_jepa.training.run import restore
from vicreg_jepa.training.trainer import Diverged, Trainer
from vicreg_jepa.worlds.two_rooms import TwoRooms

from tests.trainer.test_trainer import run, settings
from tests.trainer.test_world_networks import moved

LATENT, CONDITION = 12, 5
KERNELS = ("fused", "reference")


def changed(**sections) -> config.Config:
    """The tests' world settings, with some replaced."""
    values = config.describe(settings("world", steps=20, save_every=20))
    for section, some in sections.items():
        values[section] |= some
    return config.parse(values)


# ------------------------------------------------------------------------------ the loss


def windows(batch: int = 6, steps: int = 4) -> tuple[Tensor, Tensor]:
    world = TwoRooms()
    states = [world.reset(torch.arange(batch))]
    actions = 2 * torch.rand(batch, steps, 2) - 1
    for step in range(steps):
        states.append(world.step(states[-1], actions[:, step]))
    return torch.stack([world.render(state) for state in states], dim=1), actions


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_loss_is_the_sum_of_its_terms_as_they_are_defined(kernels):
    weights = {"prediction": 2.0, "one_step": 0.5, "variance": 3.0, "covariance": 0.7}
    weights |= {"time_variance": 0.4, "time_covariance": 0.3, "similarity": 0.2, "inverse": 5.0}
    loss = weights | {"sigreg": 0.6}
    made = config.parse(config.describe(changed(loss=loss)) | {"kernels": kernels})
    method = moved(build.method(made, 2))
    frames, actions = windows()
    with torch.no_grad():
        z = torch.stack([method.encode(frames[:, t]) for t in range(5)], dim=1)
        embedded = method.action_encoder(actions)
        rolled, latent, memory = [], z[:, 0], None
        for t in range(3):
            latent, memory = method.predictor.step(latent, embedded[:, t], memory)
            rolled.append(latent)
        guessed = method.inverse(torch.cat((z[:, :-1], z[:, 1:]), dim=-1))
        terms = {
            "prediction": (torch.stack(rolled, dim=1) - z[:, 1:4]).square().mean(),
            "one_step": (method.predictor.one_step(z[:, :-1], embedded) - z[:, 1:]).square().mean(),
            "similarity": (z[:, 1:] - z[:, :-1]).square().mean(),
            "inverse": (guessed - actions).square().mean(),
        }
        deviations = (z - z.mean(dim=1, keepdim=True)) * (5 / 4) ** 0.5 / 0.3
        for prefix, rows in (("", z), ("time_", deviations)):
            variance, covariance = published.variance_covariance(rows.flatten(0, 1))
            terms |= {f"{prefix}variance": variance, f"{prefix}covariance": covariance}
        actual = method.terms(frames, actions)
        sigreg = actual.pop("sigreg")
        total = method(frames, actions)
    torch.testing.assert_close(actual, terms, rtol=1e-4, atol=1e-6)
    expected = 0.6 * sigreg + sum(weights[name] * term for name, term in terms.items())
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("predictor", ["mlp", "gru", "transformer"])
def test_pairs_of_frames_give_the_terms_of_these_frames(predictor):
    """Other frames do not matter, and each pair is predicted by itself."""
    loss = {"pairs": 3, "unroll": 8, "time_variance": 1.0}
    made = changed(loss=loss, model={"predictor": predictor}, data={"window": 8})
    method = moved(build.method(made, 2))
    frames, actions = windows(steps=8)
    times = method.times(8)
    assert times[:2] == [0, 1]
    assert [time + 1 for time in times[::2]] == times[1::2]
    assert 1 <= times[2] <= times[4] <= 7
    with torch.no_grad():
        terms = method.terms(frames, actions)
        z = torch.stack([method.encode(frames[:, t]) for t in times], dim=1)
        embedded = method.action_encoder(actions)
        rolled = method.predictor.unroll(z[:, :1], embedded)
        places = [time - 1 for time in times[1:]]
        firsts = [method.predictor.one_step(z[:, i : i + 1], embedded[:, times[i]][:, None])
                  for i in (0, 2, 4)]  # fmt: skip
        torch.testing.assert_close(
            terms["prediction"],
            (rolled[:, places] - z[:, 1:]).square().mean(),
            rtol=1e-4,
            atol=1e-6,
        )
        off = torch.cat(firsts, dim=1) - z[:, 1::2]
        torch.testing.assert_close(terms["one_step"], off.square().mean(), rtol=1e-4, atol=1e-6)
        change = (z[:, 1::2] - z[:, ::2]).square().mean()
        torch.testing.assert_close(terms["similarity"], change, rtol=1e-4, atol=1e-6)
        others = [time for time in range(9) if time not in times]
        frames[:, others] = 255
        assert method(frames, actions) == sum(
            getattr(method.weights, name) * term for name, term in terms.items()
        )


def test_every_step_has_its_own_pairs():
    method = build.method(changed(loss={"pairs": 3, "unroll": 4}, data={"window": 16}), 2)
    seen = set()
    for _ in range(20):
        seen.add(tuple(method.times(16)))
        assert method.times(16) == method.times(16)
        method.after_step()
    assert len(seen) > 10


def test_latents_begin_white():
    """Components of too little variance keep less than 1."""
    method = build.method(changed(), 2)
    world = TwoRooms(wall="random")
    before = method.encode(world.render(world.reset(torch.arange(400)))).std(dim=0)
    assert before.max() < 0.05
    method.prepare(world.render(world.reset(torch.arange(400))))
    z = method.encode(world.render(world.reset(torch.arange(400)))).detach()
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-3)
    assert z.std(dim=0).max() < 1.01
    assert z.std(dim=0).mean() > 0.5


def test_more_features_than_frames_are_white_without_their_covariance(monkeypatch):
    """The tokens of a ViT are thousands of features, whose covariance takes minutes."""
    torch.manual_seed(0)
    features = torch.randn(40, 300, dtype=torch.float64) * torch.linspace(1, 3, 300).double()
    layer, other = nn.Linear(300, 8).double(), nn.Linear(300, 8).double()
    whiten(other, torch.cat([features] * 10))  # more frames: by the covariance
    monkeypatch.delattr(torch.linalg, "eigh")
    whiten(layer, features)
    with torch.no_grad():
        z, same = layer(features), other(features)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(8).double(), rtol=0, atol=1e-9)
    # The same components: one is a rotation of the other.
    turned = torch.linalg.lstsq(z, same).solution
    torch.testing.assert_close(z @ turned, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("features", "latent", "message"),
    [
        (torch.rand(40, 6), 8, "model.latent: got 8, takes at most the encoder's 6 features"),
        (torch.ones(40, 6), 4, "frames: got 40 whose features are the same"),
        (torch.rand(1, 6), 4, "frames: got 1 whose features are the same"),
    ],
)
def test_latents_that_cannot_be_white_are_refused(features, latent, message):
    with pytest.raises(ValueError, match=message):
        whiten(nn.Linear(6, latent).double(), features.double())


def test_sigreg_is_new_in_each_step_and_a_term_of_weight_0_is_not_computed():
    off = dict.fromkeys(("one_step", "variance", "covariance", "similarity", "inverse"), 0.0) | {
        "time_variance": 0.0,
        "time_covariance": 0.0,
    }
    method = build.method(changed(loss=off | {"sigreg": 0.1}), 2)
    frames, actions = windows()
    first = method.terms(frames, actions)
    assert set(first) == {"prediction", "sigreg"}
    assert method.terms(frames, actions)["sigreg"] == first["sigreg"]
    method.after_step()
    assert method.terms(frames, actions)["sigreg"] != first["sigreg"]


@pytest.mark.parametrize(
    "model",
    [
        {"predictor": "mlp"},
        {"predictor": "gru"},
        {"latent_tokens": 2, "history": 2, "encoder": "vit", "dim": 32, "depth": 1, "heads": 2,
         "patch": 13},
    ],
    ids=["mlp", "gru", "vit"],
)  # fmt: skip
def test_every_network_has_one_loss_curve(model, tmp_path):
    made = config.describe(changed(model=model, training={"steps": 12}))
    curves = [run(config.parse(made | {"kernels": k}), tmp_path / k) for k in KERNELS]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=0)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_is_autocast(kernels, tmp_path):
    made = config.describe(changed(training={"steps": 3})) | {"kernels": kernels}
    whole = run(config.parse(made), tmp_path / "whole")
    made["training"]["precision"] = "bfloat16"
    half = run(config.parse(made), tmp_path / "half")
    torch.testing.assert_close(half, whole, rtol=2e-2, atol=0)
    assert half != whole


def test_a_loss_that_is_not_finite_leaves_its_windows(tmp_path):
    made = changed()
    trainer = Trainer(made, build.method(made, 2), Ranks(), tmp_path)
    with torch.no_grad():
        next(trainer.method.parameters()).fill_(float("nan"))
    frames, actions = windows(8)
    with pytest.raises(Diverged, match="step 0 is nan"):
        trainer.take((frames, actions))
    (path,) = tmp_path.glob("diverged*.safetensors")
    saved = load_file(path)
    assert torch.equal(saved["frames"], frames)
    assert torch.equal(saved["actions"], actions)


# ------------------------------------------------------------------------------ for planning


def test_candidates_are_rolled_out_each_by_itself():
    method = moved(build.method(changed(), 2))
    frames, _ = windows()
    with torch.no_grad():
        start, actions = method.encode(frames[:, 0]), torch.rand(6, 3, 5, method.actions)
        rollout = method.rollout(start, actions)
        assert rollout.shape == (6, 3, 5, 16)
        embedded = method.action_encoder(actions[4, 2])
        alone = method.predictor.unroll(start[4].view(1, 1, -1), embedded[None])[0]
    torch.testing.assert_close(rollout[4, 2], alone, rtol=1e-4, atol=1e-5)


def test_frames_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"frames: got torch\.float32, takes torch\.uint8"):
        build.method(changed(), 2).encode(torch.rand(1, 65, 65, 2))


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.prediction=0"], "loss.prediction: got 0, world takes more"),
        (["loss.unroll=33"], "loss.unroll: got 33, takes at most data.window, 32 actions"),
        (["loss.pairs=33"], "loss.pairs: got 33, takes 0 for all frames, or at most data.w"),
        (["data.length=8"], "data.length: got 8, takes at least data.window, 32"),
        (["model.history=2"], "model.history: got 2, but it is used by model.predictor 'transf"),
        (["model.keypoints=0", "model.sharpness=9"], "model.sharpness: got 9.0, but it is that of"),
        (["model.keypoints=0", "model.keypoint_map=1"], "model.keypoint_map: got 1, but it is th"),
        (["model.frequency=2"], "model.frequency: got 2.0, but it is that of model.waves"),
        (["model.waves=8", "model.predictor=gru"], "model.waves: got 8, but it is used by"),
        (["model.encoder=vit", "model.keypoints=3"], "keypoints: got 3, but it is used by model"),
        (["model.encoder=vit", "model.keypoints=0"], "model.heads: got 4 for model.dim 32"),
        (["model.predictor=transformer", "model.predictor_heads=5"], "predictor_heads: got 5 for"),
        (["model.predictor=transformer", "model.latent_tokens=3"], "takes a divisor of model.lat"),
        (["training.accumulate=2"], "training.accumulate: got 2, world takes 1: a step on traj"),
        (["training.compile=true"], "training.compile: got True, world takes false"),
        (["training.parallel=fsdp"], "training.parallel: got 'fsdp', world takes 'ddp'"),
        (["data.kind=digits"], "data.kind: got 'digits', world takes trajectories: world, traj"),
        (["data.kind=trajectories"], "data.path: missing, takes a folder with data.kind"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("world_two_rooms", words)


@pytest.mark.parametrize(
    ("recipe", "word", "message"),
    [
        ("ijepa_digits", "model.heads=3", "model.heads: got 3 for model.dim 64, takes a divisor"),
        (
            "vjepa_physics",
            "model.predictor_heads=7",
            "predictor_heads: got 7 for model.predictor_",
        ),
    ],
)
def test_heads_that_do_not_fit_are_named_by_their_setting(recipe, word, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load(recipe, [word])


# ------------------------------------------------------------------------------ probes


def test_probes_read_what_is_there_and_no_more():
    torch.manual_seed(0)
    x = torch.randn(600, 4)
    facts = {
        "linear": 10 * x[:, :2] + 3,
        "bent": x[:, 2].abs() * 5,
        "side": (x[:, 3] > 0).long(),
        "signs": (x[:, :2] > 0).long() + 1,
        "noise": torch.randn(600),
        "same": torch.ones(600),
    }
    fit, test = (
        {name: fact[rows] for name, fact in facts.items()}
        for rows in (slice(480), slice(480, None))
    )
    assert state_probe.varying(fit, test) == ["linear", "bent", "side", "signs", "noise"]
    del fit["same"], test["same"]
    errors = state_probe.errors(x[:480], x[480:], fit, test, seed=0)
    assert errors["linear"][0] < 0.1
    assert errors["bent"][0] > 2.2 > 1.5 > errors["bent"][1]
    assert max(errors["side"]) < 0.1
    assert max(errors["signs"]) < 0.1
    assert min(errors["noise"]) > 0.85
    means = {name: state_probe.constant(fit[name], test[name]) for name in fit}
    assert means["linear"] == pytest.approx(10 * 2**0.5, rel=0.1)
    assert means["signs"] == pytest.approx(0.5, abs=0.12)
    assert means["side"] == pytest.approx(0.5, abs=0.12)


def test_ridge_squares_the_smaller_of_samples_and_features(monkeypatch):
    """Features that are 0 change nothing but which of the two problems is solved."""
    generator = torch.Generator().manual_seed(0)
    shapes = (90, 7), (40, 7), (7, 2), (90, 2)
    x, z, weights, noise = (torch.randn(*s, generator=generator).double() for s in shapes)
    y = x @ weights + noise
    sizes, solve = [], torch.linalg.solve

    def seen(matrix, goal):
        sizes.append(len(matrix))
        return solve(matrix, goal)

    monkeypatch.setattr(torch.linalg, "solve", seen)
    few = state_probe.ridge(x, y, z)
    assert set(sizes) == {7}
    many = state_probe.ridge(*(torch.cat((x, x.new_zeros(90, 90)), dim=1), y,
                               torch.cat((z, z.new_zeros(40, 90)), dim=1)))  # fmt: skip
    assert max(sizes) == 90
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------ commands


def test_a_run_is_trained_probed_exported_and_compared(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = ["model.dim=8", "model.latent=16", "model.predictor_dim=32", "training.batch=8"]
    words += ["data.window=8", "loss.unroll=8", "training.steps=3", "training.log_every=1"]
    given = ["train", "world_two_rooms_random", *words, "--output", str(run)]
    assert cli.main(given) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(1 <= row["effective_rank"] <= 16 and row["std"] > 0 for row in rows)
    monkeypatch.setattr(world_report, "FRAMES", 400)
    monkeypatch.setattr(state_probe, "STEPS", 10)
    capsys.readouterr()
    assert cli.main(["probe", str(run)]) == 0
    out = capsys.readouterr().out
    assert "320 frames to fit probes to, 80 of other episodes" in out
    lines = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    assert lines[""] == ["position", "wall", "door", "room"]
    for name in ("world, step 3", "untrained encoder", "pixels", "mean, or commonest class"):
        assert len(lines[name]) == 8
    assert float(lines["pixels"][0].rstrip(",")) < float(lines["mean, or commonest class"][1])
    assert cli.main(["probe", str(run), "--label", "room"]) == 2
    file = tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(run), str(file)]) == 0
    _, method, _ = restore(run)
    for name, z in load_file(file).items():
        assert torch.equal(z, method.encoder.state_dict()[name])
    capsys.readouterr()
    # Starting processes takes longer than all else here; test_cli.py does it.
    monkeypatch.setattr(memory, "in_own_process", lambda function, *given: function(*given))
    assert cli.main(["compare", "world_two_rooms_random", *words, "--rounds", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[0] == "world"
    assert float(line[-1]) < 1e-4
