"""ER-Classifier: its step written out, priors, quirks, resuming, refusals."""

import copy
import dataclasses
from pathlib import Path

import pytest
import scipy.stats
import torch
from test_training import StopHereError, refused, stop_after, weights_hash
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.core.schema import load_yaml
from robbench.defenses import Setting, build_defense
from robbench.defenses.critic import Critic, draw_prior, gaussian_divergence
from robbench.defenses.er import EmbeddingTraining, ErMinus
from robbench.defenses.training import TrainRequest, train
from robbench.models.embedding import EmbeddingClassifier, er_digits
from robbench.recipes import Recipe
from robbench.specs import threat_models

RECIPE = Recipe(name="r", description="", optimizer="adam", learning_rate=0.01, batch_size=8, epochs=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def defense(name: str, **parameters: object) -> ErMinus:
    built = build_defense(name, parameters, Setting("digits", threat_models()))
    assert isinstance(built, ErMinus)
    return built


def small_network() -> EmbeddingClassifier:
    """With batch norm in both parts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = er_digits((1, 8, 8), 10, embedding=3, width=1 / 8)
    assert isinstance(network, EmbeddingClassifier)
    return network.train()


def training(built: ErMinus, model: EmbeddingClassifier) -> EmbeddingTraining:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = built.optimization(model, RECIPE)
    assert isinstance(found, EmbeddingTraining)
    return found


X = torch.rand(8, 1, 8, 8, generator=seeded(5))
Y = torch.arange(8)
ADVERSARIAL = (X + 0.1 * torch.randn(X.shape, generator=seeded(6)).sign()).clamp(0, 1)


class WrittenOut:
    """Section B and the public code as plain statements, with the names of that code."""

    def __init__(self, model: EmbeddingClassifier, critic: nn.Module, quirks: bool) -> None:
        self.nets = {"enc": model.encoder, "cla": model.classifier, "dis": critic}
        rates = {"enc": 0.01, "cla": 0.05 * 0.01, "dis": 0.5 * 0.01}
        self.optimizers = {k: torch.optim.Adam(net.parameters(), rates[k]) for k, net in self.nets.items()}
        self.quirks = quirks

    def zero(self) -> None:
        for net in self.nets.values():
            net.zero_grad()

    def step(self, batches: tuple[Tensor, ...], y: Tensor, generator: torch.Generator) -> None:
        enc, cla, dis = self.nets["enc"], self.nets["cla"], self.nets["dis"]
        self.zero()
        for images in batches:
            z_fake = 2.0 * torch.randn(len(images), 3, generator=generator)
            z_real = enc(images).detach()
            self.move(3.0 * (dis(z_fake).mean() - dis(z_real).mean()), "dis")
            with torch.no_grad():
                for weight in dis.parameters():
                    weight.clamp_(-0.01, 0.01)
        losses = [1.5 * cross_entropy(cla(enc(images)), y) for images in batches]
        self.move(sum(losses[1:], losses[0]) / len(losses), "cla", "enc")
        for images in batches:
            self.move(0.2 * dis(enc(images)).mean(), "enc")

    def move(self, loss: Tensor, *moving: str) -> None:
        if not self.quirks:
            self.zero()
        flags = [(p, name in moving) for name, net in self.nets.items() for p in net.parameters()]
        found = torch.autograd.grad(loss, [p for p, moves in flags if moves])
        for parameter, gradient in zip([p for p, moves in flags if moves], found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for name in moving:
            self.optimizers[name].step()


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("name", ["er", "er-at"])
def test_a_step_is_the_published_one(name: str, quirks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"lambda_critic": 3.0, "lambda_classifier": 1.5, "lambda_encoder": 0.2, "sigma": 2.0}
    built, model = defense(name, quirks=quirks, **weights), small_network()
    batches = (X,) if name == "er" else (X, ADVERSARIAL)
    monkeypatch.setattr(type(built), "batches", lambda *_: batches)
    ours = training(built, model)
    theirs = copy.deepcopy(model)
    reference = WrittenOut(theirs, copy.deepcopy(ours.critic), quirks)
    mine, other = seeded(9), seeded(9)
    for _ in range(3):
        ours.step(X, Y, mine, 0.01, 0)
        reference.step(batches, Y, other)
    for one, two in ((model, theirs), (ours.critic, reference.nets["dis"])):
        for key, value in one.state_dict().items():
            torch.testing.assert_close(value, two.state_dict()[key], rtol=1e-4, atol=1e-6, msg=key)
    assert max(float(p.detach().abs().max()) for p in ours.critic.parameters()) <= 0.01


def test_without_a_regulariser_there_are_two_networks_and_no_draw() -> None:
    built, model = defense("er-minus"), small_network()
    ours, generator = training(built, model), seeded(3)
    before = generator.get_state()
    ours.step(X, Y, generator, 0.01, 0)
    assert set(ours.optimizers) == {"encoder", "classifier"}
    assert torch.equal(generator.get_state(), before)
    rates = {name: o.param_groups[0]["lr"] for name, o in ours.optimizers.items()}
    assert rates == {"encoder": 0.01, "classifier": pytest.approx(0.0005)}


def test_quirks_are_eval_mode_after_the_first_epoch() -> None:
    for quirks in (False, True):
        model = small_network()
        ours = training(defense("er", quirks=quirks), model)
        for epoch in (0, 1):
            model.train()
            ours.step(X, Y, seeded(), 0.004, epoch)
            assert model.training == (not quirks or epoch == 0)


# ------------------------------------------------------------------------------------------- priors, divergence
@pytest.mark.parametrize(
    ("prior", "sigma", "distribution"),
    [
        ("gaussian", 2.0, scipy.stats.norm(scale=2.0)),
        ("uniform", 1.0, scipy.stats.uniform(-3, 6)),
        ("cauchy", 1.0, scipy.stats.cauchy()),
    ],
)
def test_priors_have_their_distribution(prior, sigma, distribution) -> None:
    draws = draw_prior(prior, torch.Size((5000, 4)), sigma, seeded())
    assert draws.dtype == torch.float32
    assert bool(draws.isfinite().all())
    assert scipy.stats.kstest(draws.flatten().numpy(), distribution.cdf).pvalue > 0.01


def test_cauchy_is_finite_at_the_ends_of_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 1 - 2.0**-24]))
    draws = draw_prior("cauchy", torch.Size((2,)), 1.0, seeded())
    assert bool(draws.isfinite().all())
    assert draws[0] == -draws[1]


def test_the_divergence_is_that_of_torch() -> None:
    z = torch.randn(50, 3, generator=seeded(2)) * torch.tensor([0.5, 1.0, 3.0]) + 1.0
    fitted = torch.distributions.Normal(z.mean(0), z.std(0, correction=0))
    wanted = torch.distributions.kl_divergence(fitted, torch.distributions.Normal(0.0, 2.0)).sum()
    assert float(gaussian_divergence(z, 2.0)) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.isfinite(gaussian_divergence(torch.ones(4, 2), 1.0))  # a constant coordinate


def test_the_kl_variant_pulls_embeddings_to_the_prior() -> None:
    distances = []
    for weight in (0.0, 1.0):
        model = small_network()
        ours = training(defense("er", regularizer="kl", lambda_encoder=weight), model)
        for _ in range(60):
            ours.step(X, Y, seeded(), 0.01, 0)
        distances.append(float(gaussian_divergence(model.encoder(X), 1.0).detach()))
    assert distances[1] < 0.2 * distances[0]


def test_the_critic_prefers_images_and_the_encoder_follows_it() -> None:
    """After many critic steps on fixed embeddings far from the prior, T is larger there."""
    model = small_network()
    with torch.no_grad():
        model.encoder[-1].bias.add_(5.0)
    ours = training(defense("er"), model)
    for _ in range(30):
        ours._move_critic(X, 0.01, generator := seeded())
    with torch.no_grad():
        prior = draw_prior("gaussian", torch.Size((500, 3)), 1.0, generator)
        assert ours.critic(model.encoder(X)).mean() > ours.critic(prior).mean()


def test_the_critic_has_four_hidden_layers_and_log_sigmoid() -> None:
    critic = Critic(4)
    sizes = [(m.in_features, m.out_features) for m in critic.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(4, 512), (512, 512), (512, 512), (512, 512), (512, 1)]
    assert critic(torch.randn(7, 4)).shape == (7,)
    assert bool((critic(torch.randn(7, 4)) < 0).all())


# ------------------------------------------------------------------------------------------------- inner attack
def test_the_inner_attack_aims_at_the_predicted_label() -> None:
    model = small_network()
    for source, same in (("predicted", True), ("true", False)):
        built = defense("er-at", label_source=source, steps=2)
        found = [built.batches(model, X, labels, seeded())[1] for labels in (Y, (Y + 1) % 10)]
        assert torch.equal(*found) == same
        assert f"aims at the {source} label" in built.note


def test_the_first_gradient_is_off_the_box_with_quirks_only() -> None:
    from robbench.attacks.search.geometry import GeneratorNoise

    for quirks in (False, True):
        built = defense("er-at", quirks=quirks)
        space = built.space(built.current)
        state = space.start(X, Y, GeneratorNoise(8, seeded(), torch.device("cpu")))
        image = space.render(state)[0]
        assert bool(((image < 0) | (image > 1)).any()) == quirks
        moved = space.render(space.advance(state, {"delta": torch.ones_like(X)}))[0]
        assert float(moved.min()) >= 0
        assert float(moved.max()) <= 1


# ------------------------------------------------------------------------------------------------------ training
def small(out: Path, name: str = "er-at", **overrides: object) -> TrainRequest:
    attack = {"steps": 1} if name == "er-at" else {}
    return TrainRequest(
        defense=name,
        dataset="digits",
        recipe="er-digits",
        architecture_arguments={"width": 1 / 32, "embedding": 3},
        epochs=3,
        train_samples=60,
        validation_samples=20,
        name="small",
        out=out,
        device="cpu",
        overrides={"recipe.selection": "last", **attack, **overrides},
    )


@pytest.mark.parametrize("quirks", [False, True])
def test_resuming_gives_the_weights_of_an_uninterrupted_training(tmp_path: Path, quirks: bool) -> None:
    """The checkpoint holds critic and optimisers of all three networks. With quirks the learning rate never falls."""
    rates: set[float] = set()
    whole = train(small(tmp_path / "a", quirks=quirks), lambda report: rates.add(report.learning_rate))
    assert (rates == {0.002}) == quirks
    with pytest.raises(StopHereError):
        train(small(tmp_path / "b", quirks=quirks), stop_after(2, step=1))
    torch.rand(7)
    assert weights_hash(train(small(tmp_path / "b", quirks=quirks))) == weights_hash(whole)
    card = load_yaml(whole / "card.yaml", ModelCard)
    assert card.architecture.arguments == {"width": 1 / 32, "embedding": 3}
    assert card.training is not None
    assert card.training.note.startswith("PGD of the training aims at the predicted label")
    assert ("quirks" in card.training.note) == quirks
    assert card.training.parameters["defense"]["label_source"] == "predicted"


def test_every_variant_trains(tmp_path: Path) -> None:
    hashes = {}
    for name, settings in (
        ("er", {}),
        ("er", {"prior": "uniform"}),
        ("er", {"prior": "cauchy"}),
        ("er", {"regularizer": "kl"}),
        ("er-minus", {}),
        ("e-cla", {}),
    ):
        request = dataclasses.replace(small(tmp_path, name, **settings), name=f"m{len(hashes)}", epochs=1)
        hashes[name, str(settings)] = weights_hash(train(request))
    assert len(set(hashes.values())) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "digits-cnn", "architecture_arguments": {}}, ["'er'", "er-digits"]),
        ({"defense": "e-cla", "architecture": "conv3", "architecture_arguments": {}}, ["e-cla", "er-digits"]),
        ({"overrides": {"prior": "laplace"}}, ["prior", "cauchy"]),
        ({"overrides": {"prior": "cauchy", "regularizer": "kl"}}, ["kl", "gaussian", "cauchy", "critic"]),
        ({"overrides": {"prior": "uniform", "sigma": "2"}}, ["sigma", "uniform"]),
        ({"overrides": {"sigma": "0"}}, ["sigma"]),
        ({"overrides": {"lambda_encoder": "-1"}}, ["lambda_encoder"]),
        ({"overrides": {"lambda_encoder": ".inf"}}, ["lambda_encoder"]),
        ({"overrides": {"steps": "3"}}, ["steps"]),
        ({"architecture_arguments": {"embedding": 0}}, ["embedding=0"]),
        ({"architecture_arguments": {"width": 0.001}}, ["width=0.001"]),
        ({"architecture": "er-mnist", "architecture_arguments": {}}, ["er-mnist", "(1, 8, 8)"]),
        ({"architecture": "er-stl10", "architecture_arguments": {}}, ["er-stl10", "(1, 8, 8)", "96"]),
    ],
)
def test_bad_requests_name_what_is_wrong(tmp_path: Path, changes: dict, words: list[str]) -> None:
    message = refused(dataclasses.replace(small(tmp_path, "er"), **changes))
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("*.pt"))


def test_an_inner_attack_on_a_renderer_is_refused() -> None:
    with pytest.raises(UserError, match="image"):
        defense("er-at", attack="elastic")
