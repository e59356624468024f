"""The model under test is not to be trusted: what a forward can do to a verdict, and who says so."""

import contextlib
import copy
import functools
import warnings
from itertools import product

import hostile_models as hostile
import numpy as np
import pytest
import torch
from grids import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from scaled_models import Scaled
from test_contract import KINDS, ONE_EACH
from torch import nn
from torch.nn import functional

import robbench
from robbench.attacks import Victim, build_attack
from robbench.attacks.search.decision import margins
from robbench.attacks.trust.agreement import DIFFERENT, ROUNDING, relative_gaps
from robbench.attacks.trust.preflight import check_model
from robbench.core.errors import UserError
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
SHORT = {"iterations": 5, "square_queries": 30, "target_classes": 2, "fab_target_classes": 2}


def attack(name="pgd20", flow=None, epsilon=None, dataset="digits"):
    spec = resolve_attack(name, dataset, MODELS, epsilon)
    own = SHORT if spec.algorithm.startswith("autoattack") else {}
    if "steps" in spec.parameters:
        own = {"steps": min(10, spec.parameters["steps"])}
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **own}}), flow)


def evaluated(model, images, name="pgd20", batch_size=48, **options):
    ids, x, y = images
    return attack(name, **options).evaluate(Victim(model, "cpu", batch_size), ids, x, y, 0, batch_size)


@functools.cache
def evaluated_plainly(model, images, name, flow=None):
    """`evaluated` of an honest model, once for all tests that compare with it."""
    return evaluated(model, images, name, flow=flow)


@pytest.fixture(scope="module")
def right(classifier, images):
    """(ids, x, y) of images that the classifier gets right."""
    ids, x, y = images
    rows = (margins(classifier(x), y) > 0).nonzero().squeeze(1)[:24]
    return ids[rows], x[rows], y[rows]


# ------------------------------------------------------------------------------------------ refused beforehand
BY_BATCH = [
    hostile.BatchCentred,
    hostile.FunctionalTrainMode,
    hostile.FixedSeedNoise,
    hostile.KnowsItsPlace,
    hostile.AloneIsSpecial,
    hostile.StaysInTrainingWithoutStatistics,
]


@pytest.mark.parametrize("batch_size", slow_but([48, 1], [48, 8, 1]))
@pytest.mark.parametrize("kind", BY_BATCH)
def test_logits_that_depend_on_the_batch_are_refused_at_every_batch_size(
    kind, batch_size, classifier, images
):
    with pytest.raises(UserError, match="depend on the other images of its batch"):
        evaluated(kind(classifier).eval(), images, "fgsm", batch_size)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_images_are_enough_to_see_it(n, classifier, images):
    with pytest.raises(UserError, match="depend on the other images of its batch"):
        check_model(Victim(hostile.BatchCentred(classifier)), images[1][:n])


def test_statistics_that_a_forward_updates_are_refused(classifier, images):
    with pytest.raises(
        UserError, match=r"changes the model: the values of 'norm.running_mean'|depend on the other"
    ):
        evaluated(hostile.StaysInTraining(classifier).eval(), images, "fgsm")


@pytest.mark.parametrize("kind", [hostile.CountsInABuffer, hostile.LeavesHooks])
def test_a_forward_that_changes_the_model_is_refused(kind, classifier, images):
    before = [len(part._forward_hooks) for part in classifier.modules()]
    try:
        with pytest.raises(UserError, match="a forward of the model changes the model"):
            evaluated(kind(classifier).eval(), images, "square")
    finally:
        for part, hooks in zip(classifier.modules(), before, strict=True):
            while len(part._forward_hooks) > hooks:
                part._forward_hooks.popitem()


def test_a_model_that_answers_gradients_otherwise_is_refused(classifier, images):
    with pytest.raises(UserError, match="between a forward with and one without gradients"):
        evaluated(hostile.FixedUnderNoGrad(classifier), images)


def test_not_finite_logits_of_clean_images_are_refused(classifier, images):
    _, x, y = images
    model = hostile.NotFiniteWhereWrong(classifier, x, (y + 1) % 10)
    with pytest.raises(UserError, match="NaN or infinite logits for"):
        evaluated(model, images)


# ----------------------------------------------------------------------------------------------- seen at the end
@pytest.mark.parametrize("calls", [12, 15, 20, 25, 30])
def test_a_function_that_changes_after_some_calls_fails_the_cell(calls, classifier, images):
    with pytest.raises(
        UserError, match=r"other logits at the end|answered the attack other than|misclassified when"
    ):
        evaluated(hostile.ChangesAfter(classifier, calls), images)


@pytest.mark.parametrize("first", [1, 5, 9, 13, 17])
def test_one_random_forward_in_twenty_fails_the_cell(first, classifier, images):
    plain = evaluated_plainly(classifier, images, "pgd20")
    try:
        outcome = evaluated(hostile.OneInTwenty(classifier, first), images)
    except UserError:
        return
    # Where the random forward was one that nothing rests on, such as the probe of the gradients.
    assert torch.equal(outcome.robust, plain.robust)


@pytest.mark.parametrize("name", ["pgd20", "apgd-ce", "square", "fab-t"])
def test_a_model_that_forgets_what_broke_it_fails_the_cell(name, classifier, images, monkeypatch):
    """Right on clean images before and after; the adversarial examples are right again when they are scored."""
    counted, searched = hostile.Around(classifier), []
    scored = Victim.attacked_logits
    with monkeypatch.context() as patch:
        patch.setattr(
            Victim,
            "attacked_logits",
            lambda victim, *rest: (searched.append(counted.calls), scored(victim, *rest))[1],
        )
        evaluated(counted, images, name)
    model = hostile.ForgetsAdversaries(classifier, images[1], searched[0])
    with pytest.raises(
        UserError, match=r"other logits at the end|answered the attack other than|misclassified when"
    ):
        evaluated(model, images, name)


def test_another_function_of_large_batches_fails_the_cell(classifier, images):
    with pytest.raises(UserError, match="other logits at the end of an attack"):
        evaluated(hostile.LargeBatchesAreSpecial(classifier), images)


def test_weights_that_change_while_attacked_fail_the_cell(classifier, images):
    with pytest.raises(UserError, match="changed while it was attacked: the values of 'scale'"):
        evaluated(hostile.DriftingWeights(classifier), images)


def test_an_attack_that_changes_the_model_fails_the_cell(classifier, images, monkeypatch):
    one, head = attack("fgsm"), nn.Linear(10, 10)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(classifier, head)
    original = type(one).search

    def meddling(self, victim, task):
        found = original(self, victim, task)
        with torch.no_grad():
            victim.module[1].bias.add_(1.0)
        return found

    monkeypatch.setattr(type(one), "search", meddling)
    ids, x, y = images
    with pytest.raises(UserError, match=r"changed while it was attacked: the values of '1\.bias'"):
        one.evaluate(Victim(model), ids, x, y, 0, 48)


def test_an_attack_that_writes_into_its_task_changes_nothing_of_the_callers(classifier, images, monkeypatch):
    one = attack("fgsm")
    original = type(one).search

    def meddling(self, victim, task):
        found = original(self, victim, task)
        task.x.fill_(0.0)
        task.y.fill_(3)
        task.ids.fill_(7)
        task.clean_predictions.fill_(3)
        return found

    ids, x, y = (part.clone() for part in images)
    plain = one.evaluate(Victim(classifier), ids, x, y, 0, 48)
    monkeypatch.setattr(type(one), "search", meddling)
    again = one.evaluate(Victim(classifier), ids, x, y, 0, 48)
    assert torch.equal(plain.robust, again.robust)
    assert torch.equal(plain.clean_predictions, again.clean_predictions)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip((ids, x, y), images, strict=True))


# ------------------------------------------------------------------------------------------- honest models pass
@pytest.mark.parametrize(("factor", "shift"), [(1e-6, 0.0), (1.0, 0.0), (1e6, 0.0), (1.0, 1e4)])
def test_scale_and_shift_of_logits_are_nothing_to_complain_about(factor, shift, classifier, images):
    passed = check_model(Victim(Scaled(classifier, factor, shift)), images[1])
    assert passed.gap == 0.0


def test_bfloat16_inside_the_model_passes_and_is_reported_if_it_depends_on_the_batch(classifier, images):
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = classifier

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    outcome = evaluated(Low(), images, "fgsm")
    assert outcome.diagnostics.batch_gap <= DIFFERENT


def test_layers_quantised_by_the_range_of_their_batch_are_reported(classifier, images):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = classifier

        def forward(self, x):
            step = x.abs().amax() / 63 * (1 + 0.05 * x.mean())
            return self.model((x / step).round() * step)

    outcome = evaluated(Quantised(), images, "square")
    kinds = {one.kind for one in outcome.suspicions}
    assert outcome.diagnostics.batch_gap > ROUNDING
    assert "batch-gap" in kinds


@settings(max_examples=50)
@given(
    st.integers(2, 6),
    st.sampled_from([1e-20, 1e-6, 1.0, 1e6]),
    st.sampled_from([0.0, 1.0, 100.0]),
    st.integers(0, 2**31),
)
def test_gaps_do_not_depend_on_scale_and_shift(classes, factor, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(5, classes, generator=generator, dtype=torch.float64)
    second = first + 0.05 * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    plain = relative_gaps(first, second)
    moved = relative_gaps(factor * (first + shift), factor * (second + shift))
    assert torch.allclose(plain, moved, rtol=0.02, atol=0.02 if shift else 1e-3)
    assert torch.equal(relative_gaps(first, first), torch.zeros(5, dtype=torch.float64))


# --------------------------------------------------------------------------------------------- writing in place
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *(("mul_", n) for n in ("fgsm", "pgd20-l2", "apgd-ce", "square", "jsa10")),
        *slow_but((), (("mul_", n) for n in ("mim", "fab-t", "om-pgd"))),
        *((how, "pgd20") for how in ("mul_", "clamp_", "round_", "data")),
    ],
)
def test_a_forward_that_writes_into_its_input_is_what_it_is_without(how, name, classifier, flow, images):
    kept = [part.clone() for part in images]
    there = evaluated(hostile.InPlace(classifier, how), images, name, flow=flow)
    elsewhere = evaluated(hostile.OutOfPlace(classifier, how), images, name, flow=flow)
    assert torch.equal(there.robust, elsewhere.robust)
    assert torch.equal(there.adversarial, elsewhere.adversarial)
    assert all(torch.equal(one, other) for one, other in zip(images, kept, strict=True))


@pytest.mark.parametrize("name", ["fgsm", "square", "apgd-ce"])
def test_an_output_buffer_used_again_changes_no_earlier_result(name, classifier, images):
    plain = evaluated(classifier, images, name, batch_size=16)
    held = evaluated(hostile.OneOutputBuffer(classifier), images, name, batch_size=16)
    assert torch.equal(plain.robust, held.robust)
    assert torch.equal(plain.margins, held.margins)


# -------------------------------------------------------------------------------------------------- not finite
NAN, INF = float("nan"), float("inf")
INFINITE = [(name, INF) for name in ("pgd20", "om-pgd", "apgd-ce", "apgd-t", "fab-t", "square")]
QUICK = [*product(ONE_EACH, [NAN]), *product(("pgd20", "apgd-ce", "square"), [INF])]


@pytest.mark.parametrize(("name", "value"), slow_but(QUICK, [*product(KINDS, [NAN]), *INFINITE]))
def test_a_model_that_is_not_finite_where_it_is_wrong_is_broken_there(name, value, classifier, flow, right):
    model = hostile.NotFiniteWhereWrong(classifier, right[1], right[2], value, everywhere=value != value)
    if name.startswith("aa-reference"):
        with pytest.raises(UserError, match="which the reference package cannot judge"):
            evaluated(model, right, name)
        return
    plain, outcome = (
        evaluated_plainly(classifier, right, name, flow),
        evaluated(model, right, name, flow=flow),
    )
    finite = model(outcome.adversarial).isfinite().all(1)
    assert not (outcome.robust & ~finite).any()
    # FAB, and APGD-L1 with its large radii, go by points outside the ball, where the two models differ.
    leeway = 8 if "l1" in name and "apgd" in name else 2 if "fab" in name or "aa" in name else 0
    assert int(outcome.robust.sum()) <= int(plain.robust.sum()) + leeway
    if not finite.all():
        assert "not-finite" in {one.kind for one in outcome.suspicions}


@given(
    st.lists(
        st.sampled_from([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0]), min_size=3, max_size=3
    )
)
def test_no_row_that_is_not_finite_is_right(row):
    logits = torch.tensor([row])
    for label in range(3):
        margin = float(margins(logits, torch.tensor([label])))
        others = [value for place, value in enumerate(row) if place != label]
        finite = bool(torch.isfinite(logits).all())
        assert (margin > 0) == (finite and row[label] > max(others))


# -------------------------------------------------------------------------------------------- no gradient at all
class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(8 * x) / 8


class Rounded(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(Rounding.apply(x))


class Shrunk(nn.Module):
    """A model of 8x8 images for images of 28x28."""

    def __init__(self, model):
        super().__init__()
        self.first = nn.Conv2d(1, 1, 1)
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.first.bias.fill_(0.0)
        self.model = model

    def forward(self, x):
        return self.model(functional.adaptive_avg_pool2d(self.first(x), 8))


MADE = ("custom function", "scripted", "traced", "numpy")


@pytest.mark.parametrize(
    ("made", "side"),
    slow_but([*product(MADE, (8,)), ("traced", 28)], product(MADE, (8, 28))),
)
def test_models_without_a_plain_backward(made, side, classifier, images):
    ids, x, y = images
    x = x if side == 8 else functional.interpolate(x, 28)
    model = classifier if side == 8 else Shrunk(classifier).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what people have
        if made == "custom function":
            model = Rounded(model)
        elif made == "scripted":
            model = torch.jit.script(model)
        elif made == "traced":
            model = torch.jit.trace(model, x[:3])
        else:

            class Numpy(nn.Module):
                def __init__(self, inner):
                    super().__init__()
                    self.inner = inner

                def forward(self, x):
                    return self.inner(torch.from_numpy(x.numpy().copy()))

            model = Numpy(model)
        square = evaluated(model, (ids, x, y), "square", epsilon=0.1)
        assert 0 <= int(square.robust.sum()) <= len(x)
        if made in ("scripted", "traced"):
            assert evaluated(model, (ids, x, y), "pgd20", epsilon=0.1).robust.sum() <= square.robust.sum() + 2
        else:
            with pytest.raises(UserError, match="follows the gradient of the model, which has none"):
                evaluated(model, (ids, x, y), "pgd20", epsilon=0.1)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda x: (x, x), "the model returned tuple"),
        (lambda x: x.sum(), r"the model returned \(\)"),
        (lambda x: x.flatten(1) > 0.5, "the model returned torch.bool"),
        (
            lambda x: x.flatten(1)[:, :1],
            r"the model returned \(32, 1\) .* single logit of a binary .* torch.cat\(\[-z, z\], 1\)",
        ),
        (lambda x: 1 / 0, "failed on images .* with ZeroDivisionError"),
        (lambda x: exec("raise SystemExit(0)"), "failed on images .* with SystemExit"),
        (lambda x: x.reshape(3, 5), "failed on images .* with RuntimeError"),
    ],
)
def test_forwards_that_are_no_classifier_get_one_line(forward, text, images):
    class Model(nn.Module):
        def forward(self, x):
            return forward(x)

    with pytest.raises(UserError, match=text) as caught:
        evaluated(Model(), images, "fgsm")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- ties, context
class Coarse(nn.Module):
    """Logits rounded to whole numbers: many ties."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).clamp(-8, 8).round()


def test_a_tie_is_wrong_before_and_after_an_attack_and_counted(classifier, images):
    _, x, y = images
    with torch.no_grad():
        top = Coarse(classifier)(x).topk(2).values
    assert (top[:, 0] == top[:, 1]).any()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = robbench.evaluate(Coarse(classifier), x, y, ["square"], dataset="digits", epsilon=0.0)
    assert any("tied logits" in str(one.message) for one in said)
    assert result.clean == result.accuracy["square@0"]


def _inference():
    return torch.inference_mode()


def _autocast():
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def _default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS = (torch.no_grad, _inference, _autocast, _default_float64)
BESIDE_PGD = ("apgd-ce", "square", "fab-t", "jsa10")  # each in a context of its own; in the others when slow


@pytest.mark.parametrize(
    ("name", "context"),
    slow_but(
        [*product(("pgd20-l2",), CONTEXTS), *zip(BESIDE_PGD, CONTEXTS, strict=True)],
        product(("pgd20-l2", *BESIDE_PGD), CONTEXTS),
    ),
)
def test_results_do_not_depend_on_the_callers_context(name, context, classifier, flow, images):
    plain = evaluated_plainly(classifier, images, name, flow)
    one, copies = attack(name, flow), tuple(part.clone() for part in images)
    with context():
        inside = one.evaluate(Victim(classifier, "cpu", 48), *copies, 0, 48)
    assert torch.equal(plain.robust, inside.robust)
    assert torch.equal(plain.adversarial, inside.adversarial)
    assert torch.get_default_dtype() == torch.float32


def test_a_model_made_in_inference_mode_is_refused_by_name(images):
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UserError, match=r"'1.weight' was made inside torch.inference_mode"):
        evaluated(model, images)


# ------------------------------------------------------------------------------------------------------- inputs
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y: (x, y.float() / 10), "labels are torch.float32"),
        (lambda x, y: (x, y.float()), "labels are torch.float32"),
        (lambda x, y: (x, y > 3), "labels are torch.bool"),
        (lambda x, y: ((255 * x).byte(), y), "images are torch.uint8"),
        (lambda x, y: (x + 1e-3, y), r"beyond \[0,1\] by 0.001"),
        (lambda x, y: (x * 255, y), r"beyond \[0,1\] by 254"),
        (lambda x, y: (torch.full_like(x, float("nan")), y), r"images span \[nan, nan\]"),
        (lambda x, y: (x, y[:-1]), "give .N,C,H,W. images and .N. labels"),
        (lambda x, y: (x, y + 10), "outside the model's 10 classes"),
        (lambda x, y: (x, -1 - y), "outside the model's 10 classes"),
    ],
)
def test_inputs_that_would_be_bent_are_refused(change, text, classifier, images):
    ids, x, y = images
    with pytest.raises(UserError, match=text):
        evaluated(classifier, (ids, *change(x, y)))


def test_pixels_beyond_the_box_by_rounding_are_clipped(classifier, images):
    ids, x, y = images
    plain = evaluated(classifier, images, "fgsm")
    back = (x - 0.1307) / 0.3081 * 0.3081 + 0.1307
    near = evaluated(classifier, (ids, torch.where(x == 1, x * (1 + 2**-23), back), y), "fgsm")
    assert int((plain.robust != near.robust).sum()) <= 1
    assert near.adversarial.max() <= 1
    assert near.adversarial.min() >= 0


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_seeds_are_whole_numbers(seed, classifier, images):
    ids, x, y = images
    with pytest.raises(UserError, match="seed="):
        attack("fgsm").evaluate(Victim(classifier), ids, x, y, seed, 48)


@pytest.mark.parametrize("ids", [torch.zeros(48, dtype=torch.int64), torch.arange(48.0), torch.arange(47)])
def test_sample_ids_are_whole_numbers_and_all_different(ids, classifier, images):
    _, x, y = images
    with pytest.raises(UserError, match="sample_ids are"):
        attack("fgsm").evaluate(Victim(classifier), ids, x, y, 0, 48)


def test_clean_accuracy_that_is_chance_is_the_first_suspicion(classifier, images):
    ids, x, y = images
    outcome = evaluated(classifier, (ids, x, (y + 1) % 10), "fgsm")
    assert outcome.suspicions[0].kind == "chance"
    assert "not above the 10 % of chance" in outcome.suspicions[0].text
    assert "chance" not in {one.kind for one in evaluated(classifier, images, "fgsm").suspicions}


class Wrapped:
    """No module: takes one of several outputs."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return (self.model(x), x)[0]


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapped,
        lambda model: lambda x: model(x),
        lambda model: model.forward,
        lambda model: functools.partial(torch.nn.Module.__call__, model),
    ],
)
def test_functions_are_models_and_what_they_hold_is_put_into_eval_mode(wrap, classifier, images):
    _, x, y = images
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), copy.deepcopy(classifier)).train()
    plain = robbench.evaluate(model, x, y, ["fgsm"], dataset="digits", epsilon=0.1)
    same = robbench.evaluate(
        wrap(model), x.numpy(), y.tolist(), ["fgsm"], dataset="digits", epsilon=np.float32(0.1)
    )
    assert [plain.clean, *plain.accuracy.values()] == [same.clean, *same.accuracy.values()]
    assert model.training


@pytest.mark.parametrize("model", [None, 3, nn.Linear])
def test_what_is_no_model_is_refused(model, images):
    _, x, y = images
    with pytest.raises(UserError, match="is no model"):
        robbench.evaluate(model, x, y, ["fgsm"], epsilon=0.1)
