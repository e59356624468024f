"""What `robbench.evaluate` takes for data and models, and what it refuses in one line."""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import robbench
from robbench.core.terminal import Terminal
from robbench.evaluation import EvaluationResult
from robbench.evaluation.inputs import read_inputs
from robbench.evaluation.measuring import show_progress
from robbench.evaluation.planning import plan_run
from robbench.evaluation.subject import prepare, preserve
from robbench.run.progress import LiveProgress, PlainProgress

N, CLASSES = 20, 3


def _make() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), torch.rand(N, 1, 8, 8)
    x = (255 * x).round() / 255
    return net, x, net(x).argmax(1)


NET, X, Y = _make()


def evaluate(model: Any, *data: Any, **options: Any) -> EvaluationResult:
    chosen = {"attacks": "fgsm", "epsilon": 0.1, "progress": False, "device": "cpu", **options}
    return robbench.evaluate(model, *data, **chosen)


@pytest.fixture(scope="module")
def plain() -> EvaluationResult:
    found = evaluate(NET, X, Y)
    assert 0 < found.accuracy["fgsm@0.1"].value < found.clean.value == 100
    return found


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        position = 0
        while True:
            yield X[position % N], Y[position % N]
            position += 1


def one_buffer() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that share their memory, as loaders with a pool make them."""
    x, y = torch.empty(5, 1, 8, 8), torch.empty(5, dtype=torch.int64)
    for start in range(0, N, 5):
        x.copy_(X[start : start + 5])
        y.copy_(Y[start : start + 5])
        yield x, y


@pytest.mark.parametrize(
    "data",
    [
        lambda: (X.numpy(), Y.numpy()),
        lambda: (X.tolist(), Y.tolist()),
        lambda: (list(X), list(Y)),
        lambda: (X.double(), Y.to(torch.uint8)),
        lambda: (X.numpy().astype(">f8"), Y.numpy().astype(">u2")),
        lambda: (X.numpy()[::-1][::-1], Y.numpy()[::-1][::-1]),
        lambda: (X.clone().requires_grad_(), Y.int()),
        lambda: (TensorDataset(X, Y),),
        lambda: (DataLoader(TensorDataset(X, Y), 7),),
        lambda: (list(zip(X, Y, strict=True)),),
        lambda: ([(image.numpy(), int(label)) for image, label in zip(X, Y, strict=True)],),
    ],
)
def test_the_same_samples_in_any_form_give_the_same_verdicts(data: Callable[[], Any], plain: Any) -> None:
    found = evaluate(NET, *data())
    assert found.samples["robust"].equals(plain.samples["robust"])
    assert found.samples["prediction_fgsm@0.1"].equals(plain.samples["prediction_fgsm@0.1"])
    assert found.notes == ()


def test_images_of_8_bits_are_scaled_and_it_is_said_once(plain: Any) -> None:
    grey = (255 * X).round().byte()
    for data in ((grey, Y), (grey.numpy(), Y.numpy()), (DataLoader(TensorDataset(grey, Y), 7),)):
        found = evaluate(NET, *data)
        assert found.samples.equals(plain.samples)
        assert found.notes == ("x is uint8: its pixels were divided by 255",)


@pytest.mark.parametrize("data", [Endless, one_buffer])
def test_what_has_no_length_is_read_as_far_as_asked(data: Callable[[], Any], plain: Any) -> None:
    with pytest.raises(robbench.UserError, match=r"without a length, which may never end.*n=1000"):
        evaluate(NET, data())
    assert evaluate(NET, data(), n=N).samples.equals(plain.samples)


def test_a_shuffling_loader_is_read_once(plain: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = evaluate(NET, DataLoader(TensorDataset(X, Y), 7, shuffle=True), keep_images=True)
    assert found.clean.value == 100
    assert (found.adversarial["fgsm@0.1"].shape, found.n) == (X.shape, N)
    assert found.accuracy == plain.accuracy
    assert found.samples["label"].tolist() != Y.tolist()


def test_n_draws_from_arrays_and_data_sets_alike_and_keeps_positions(plain: Any) -> None:
    of_arrays, of_set = evaluate(NET, X, Y, n=7), evaluate(NET, TensorDataset(X, Y), n=7)
    ids = of_arrays.samples["id"].tolist()
    assert ids == sorted(ids) != list(range(7))
    assert of_arrays.samples.equals(of_set.samples)
    assert of_arrays.samples["label"].tolist() == Y[ids].tolist()


REFUSED = [
    ("(255 * x).long()", "y", "x is torch.int64; give uint8 pixels 0..255 or floating point pixels in [0,1]"),
    ("255 * x", "y", "divide by 255 where these are 0..255: x / 255"),
    ("x - 0.5", "y", "put the normalisation inside the model"),
    ("torch.where(x == x.max(), torch.nan, x)", "y", "x has NaN or infinite pixels in"),
    ("x.permute(0, 2, 3, 1)", "y", "channels last; give x.permute(0, 3, 1, 2)"),
    ("x.permute(0, 2, 3, 1).numpy()", "y", "channels last; give x.transpose(0, 3, 1, 2)"),
    ("x[:, 0]", "y", "give x[:, None] of grey images"),
    ("x.flatten(1)", "y", "as in x.reshape(N, C, H, W)"),
    ("x[:0]", "y[:0]", "x has no images"),
    ("[]", "[]", "x has no images"),
    ("TensorDataset(x[:0], y[:0])", "None", "x has no images"),
    ("x.to_sparse()", "y", "x is no array of numbers"),
    ("x", "y[:5]", "x has 20 images and y 5 labels; give one label per image"),
    ("x", "nn.functional.one_hot(y, 3)", "as one-hot labels have; give class numbers [N]: y.argmax(1)"),
    ("x", "y[:, None]", "y.reshape(-1)"),
    ("x", "y.float()", "y is torch.float32; give integer class numbers 0, 1, ... (y.long()"),
    ("x", "y > 0", "y is torch.bool"),
    ("x", "['a'] * 20", "y is no array of numbers"),
    ("x", "None", "y is missing"),
    ("x", "y + 3", "check the labels and dataset="),
    ("TensorDataset(x, y)", "y", "which brings its own labels"),
    ("[(a, b, 0) for a, b in zip(x, y)]", "None", "((x, y) for x, y, *_ in data)"),
    ("[{'image': a, 'label': b} for a, b in zip(x, y)]", "None", "with keys of 'image', 'label'"),
    ("[(x[0], 0), (x[0, :, :4], 0)]", "None", "images of 1 x 8 x 8 and of 1 x 4 x 8"),
    ("[(x[0], y[:3])]", "None", "give (image, label) pairs"),
    ("(x, y)", "None", "give (image, label) pairs or (images, labels) batches, or images x and labels y"),
    ("3", "None", "x is of type int"),
]


@pytest.mark.parametrize(("x", "y", "text"), REFUSED)
def test_data_that_would_be_bent_is_refused(x: str, y: str, text: str) -> None:
    names = {"x": X, "y": Y, "torch": torch, "nn": nn, "TensorDataset": TensorDataset}
    with pytest.raises(robbench.UserError, match=re.escape(text)) as caught:
        evaluate(NET, eval(x, names), eval(y, names))  # the cases above
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epsilon": 8}, "epsilon=8: .* give 8/255 if you mean 8 of 255 grey levels"),
        ({"epsilon": "eight"}, "epsilon='eight' is not a budget"),
        ({"epsilon": True}, "epsilon=True is not a budget"),
        ({"epsilon": []}, r"epsilon=\[\] has no budget"),
        ({"epsilon": None}, "needs an epsilon; give epsilon=VALUE, or dataset=NAME"),
        ({"eta": 1}, "eta= changes none of these attacks"),
        ({"device": "gpu"}, "device='gpu' is not a device"),
        ({"device": 3}, "device=3 is not a device|device='3' is not a device"),
        ({"batch_size": 0}, "batch_size=0; give"),
        ({"seed": -1}, "seed=-1; give"),
        ({"n": 0}, "n=0 is no number of samples"),
        ({"n": 99}, "n=99 is not available"),
        ({"dataset": "cifar"}, "did you mean 'cifar10'"),
        ({"flow": "digits-glow"}, "flow= changes none of these attacks"),
        ({"attacks": "jsa10", "eta": 0.1}, "name one with flow=, or train one"),
        ({"attacks": "jsa10", "eta": 0.1, "flow": 3}, "flow is of type int"),
        ({"fresh": True}, "no out= is given"),
        ({"out": 3}, "out=3 is no folder"),
        ({"out": __file__}, "is a file; give a folder"),
        ({"name": "a b"}, "name='a b' is no name of a model"),
    ],
)
def test_arguments_are_named_as_python_writes_them(options: dict[str, Any], text: str) -> None:
    with pytest.raises(robbench.UserError, match=text) as caught:
        evaluate(NET, X, Y, **options)
    assert not re.search(r"(?<!robbench train )--(?!defense|dataset NAME)", str(caught.value))


@pytest.mark.parametrize(
    "text", ["8/255", "2/255,8/255", ["2/255", 8 / 255], np.array([2, 8]) / 255, torch.tensor(0.1)]
)
def test_budgets_are_numbers_and_fractions(text: Any) -> None:
    found = [one.spec.epsilon for one in evaluate(NET, X, Y, epsilon=text).attacks]
    assert found == [2 / 255, 8 / 255][-len(found) :] or found == [float(torch.tensor(0.1))]


# ---------------------------------------------------------------------------------------------------------- models
class Holder:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returning(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = NET, change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (Holder, "model returns a Holder: its .logits was taken for logits"),
        (lambda out: {"logits": out}, 'model returns a dict: its ["logits"] was taken for logits'),
        (lambda out: (out, 0), "model returns a tuple: its first element was taken for logits"),
    ],
)
def test_logits_are_taken_out_of_what_a_model_returns(change: Any, note: str, plain: Any) -> None:
    found = evaluate(Returning(change), X, Y)
    assert found.samples.equals(plain.samples)
    assert found.notes == (note,)
    assert note in str(found)
    assert robbench.attack("fgsm", epsilon=0.1)(Returning(change), X, Y).shape == X.shape


@pytest.mark.parametrize(
    "change", [lambda out: out[:, 0], lambda out: out[:, :1], lambda out: {"out": out}, str]
)
def test_what_holds_no_logits_is_refused(change: Any) -> None:
    with pytest.raises(
        robbench.UserError, match=r"logits of shape \(2, classes\)|the single logit of a binary classifier"
    ):
        evaluate(Returning(change), X, Y)


def test_functions_are_models_and_what_cannot_be_checked_is_said(plain: Any) -> None:
    found = evaluate(lambda x: NET(x), X, Y)
    assert found.samples.equals(plain.samples)
    assert "only Sequential could be put into eval mode" in found.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(lambda x: x.flatten(1)[:, :3], X, Y)
    assert "without a torch.nn.Module" in found.notes[0]


@pytest.mark.parametrize(("shape", "classes"), [((4, 5, 7, 11), 3), ((2, 3, 224, 224), 2), ((1, 1, 9, 9), 2)])
def test_odd_shapes_two_classes_single_images(shape: tuple[int, ...], classes: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(shape[1], classes, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        x = torch.rand(shape)
    found = evaluate(net, x, net(x).argmax(1), attacks="fgsm,pgd10-l2")
    assert found.clean.value == 100
    assert found.n == shape[0]


# ------------------------------------------------------------------------------------------------- left as found
class Dirty(nn.Module):
    """Changes itself in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.register_forward_hook(lambda *_: None)
        out: Tensor = self.net(x)
        return out


def _found(model: nn.Module) -> list[Any]:
    hooks = [len(part._forward_hooks) for part in model.modules()]
    modes = [part.training for part in model.modules()]
    parameters = [(id(p), p.data_ptr(), p.requires_grad, p.grad) for p in model.parameters()]
    return [hooks, modes, parameters, [(id(b), b.tolist()) for b in model.buffers()]]


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), *NET), Dirty])
def test_the_model_the_data_and_the_random_states_are_left_as_found(make: Callable[[], nn.Module]) -> None:
    model, x, y = make().train(), X.clone(), Y.clone()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    next(model.parameters()).requires_grad_(False)
    before, states = _found(model), (torch.get_rng_state(), np.random.get_state()[1].copy())
    for call in (
        lambda: evaluate(model, x, y),
        lambda: robbench.attack("pgd10", epsilon=0.1).run(model, x, y),
    ):
        if isinstance(model, Dirty):
            with pytest.raises(robbench.UserError, match="a forward of the model changes the model"):
                call()
        else:
            call()
        assert _found(model) == before
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_context_changes_nothing(context: Any, plain: Any) -> None:
    with context():
        assert evaluate(NET, X.clone(), Y).samples.equals(plain.samples)
        assert robbench.attack("fgsm", epsilon=0.1)(NET, X.clone(), Y).shape == X.shape


def test_a_model_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    with pytest.raises(robbench.UserError, match=r"was made inside torch\.inference_mode"):
        evaluate(model, X, Y)


def test_tensors_that_were_moved_come_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), *NET).train()
    before = _found(model)
    with preserve(model):
        model.double().eval()
        model[0].running_mean.add_(1)
        with torch.no_grad():
            model[2].weight.mul_(2)
    assert _found(model) == before
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    weight = NET[1].weight.clone()
    with preserve(NET):
        NET[1].weight.data.mul_(2)
    assert torch.equal(NET[1].weight, weight)


def test_a_notebook_gets_the_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = read_inputs(X, Y)
    with prepare(NET, X, "cpu", 8, inputs.device) as subject:
        attack = robbench.attack("fgsm", epsilon=0.1).attack
        plan = plan_run(subject, inputs, [attack], None, None, None, 0, keep_images=False)
    assert isinstance(show_progress(plan, (), True), PlainProgress)
    monkeypatch.setattr("robbench.evaluation.measuring.find_spec", lambda _: object())
    monkeypatch.setattr("robbench.evaluation.measuring.Terminal", _Notebook)
    assert isinstance(show_progress(plan, (), True), LiveProgress)


class _Notebook(Terminal):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.is_jupyter = True
