"""Suspicious models, models that cannot be attacked so, and batches that do not fit."""

import math
import warnings
from itertools import product

import pytest
import torch
from grids import slow_but
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn.functional import one_hot

import robbench
from robbench.attacks import Victim, build_attack
from robbench.attacks.trust.diagnosis import cross_entropy, probability_rows, zero_gradients
from robbench.attacks.trust.suspicions import Diagnostics, RobbenchWarning, exact_interval
from robbench.core.errors import UserError
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
SHORT = {"iterations": 6, "square_queries": 60, "target_classes": 3, "fab_target_classes": 3}


def attack(name="pgd20", epsilon=0.1, **parameters):
    spec = resolve_attack(name, "digits", MODELS, epsilon)
    short = SHORT if spec.algorithm == "autoattack" else {}
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **short, **parameters}}))


def evaluated(one, model, images, batch_size=48, seed=0):
    ids, x, y = images
    return one.evaluate(Victim(model, "cpu", batch_size), ids, x, y, seed, batch_size)


def found(outcome):
    return {one.kind: one for one in outcome.suspicions}


class Around(nn.Module):
    """A function of images around a model, and one of its logits."""

    def __init__(self, model, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


# ------------------------------------------------------------------------------------------------ pure functions
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12))
def test_rows_of_a_softmax_are_probabilities_and_their_logarithms_are_not(logits):
    row = torch.tensor([logits], dtype=torch.float32)
    assert bool(probability_rows(row.softmax(1)))
    assert not bool(probability_rows(row.log_softmax(1)))
    assert not bool(probability_rows(row.softmax(1) * 1.001))
    assert not bool(probability_rows(row.softmax(1) - row.softmax(1).amin() - 0.1))


@given(st.floats(-700, 700), st.floats(-5, 5))
def test_the_loss_of_two_classes_is_the_closed_form(margin, shift):
    logits = torch.tensor([[shift + margin, shift]], dtype=torch.float64)
    true_margin = float(logits[0, 0] - logits[0, 1])
    expected = (
        math.log1p(math.exp(-true_margin))
        if true_margin > 0
        else -true_margin + math.log1p(math.exp(true_margin))
    )
    assert float(cross_entropy(logits, torch.tensor([0]))) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_torchs():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    labels = torch.arange(50) % 7
    torch.testing.assert_close(
        cross_entropy(logits, labels), nn.functional.cross_entropy(logits, labels, reduction="none")
    )


def test_zero_and_infinite_gradients():
    slope = torch.tensor([[0.0, 0.0], [0.0, 1e-38], [1.0, math.nan], [math.inf, 0.0], [1.0, 2.0]])
    assert zero_gradients(slope[:, :, None]).tolist() == [True, False, True, True, False]


def test_nothing_counted_is_nothing_suspected():
    assert Diagnostics().suspicions == ()
    assert Diagnostics(samples=5, probability_rows=4).suspicions == ()


@pytest.mark.parametrize("n", [1, 2, 12, 48, 499, 1000])
def test_one_sample_that_square_breaks_is_chance(n):
    assert Diagnostics(samples=n, square_given=n, square_broke=1).suspicions == ()


@pytest.mark.parametrize(("n", "most"), [(48, 1), (120, 1), (200, 2), (1000, 5), (10_000, 29)])
def test_square_is_suspicious_where_the_interval_excludes_chance(n, most):
    """`most`: the largest count whose exact two-sided interval reaches down to 0.2 % (scipy's binomial test)."""
    for broken in (most, most + 1):
        low = stats.binomtest(broken, n).proportion_ci(0.95, "exact").low
        assert (low > 0.002 and broken > 1) == (broken > most)
        assert bool(Diagnostics(samples=n, square_given=n, square_broke=broken).suspicions) == (broken > most)


@pytest.mark.parametrize(("zero", "told"), [(1, False), (2, False), (3, True), (242, True)])
def test_zero_gradients_are_a_sign_where_the_interval_excludes_chance(zero, told):
    """Of one sample they are zero together: 20 of 4840 gradients are 1 of 242 samples."""
    bounds = stats.binomtest(zero, 242).proportion_ci(0.95, "exact")
    assert (bounds.low > 0.002) == told
    clean = Diagnostics(samples=242, probed=242, zero_gradients=zero)
    followed = Diagnostics(samples=242, gradients=4840, zero_steps=20 * zero)
    for counts, kind in ((clean, "zero-gradients"), (followed, "zero-steps")):
        assert [one.kind for one in counts.suspicions] == [kind] * told
        assert all(
            f"{100 * bounds.low:.1f} to {100 * bounds.high:.1f} %" in s.text for s in counts.suspicions
        )


def test_what_only_square_broke_is_told_with_count_and_interval():
    (one,) = Diagnostics(samples=1000, square_given=700, square_broke=8).suspicions
    bounds = stats.binomtest(8, 1000).proportion_ci(0.95, "exact")
    assert one.kind == "square-only"
    assert one.numbers == pytest.approx(
        {"broken": 8, "given": 700, "share": 0.008, "low": bounds.low, "high": bounds.high}
    )
    assert "8 of the 700" in one.text
    assert "0.8 % of 1000, 95 % interval 0.3 to 1.6 %" in one.text


@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_intervals_are_scipys(successes, others):
    n = successes + others
    bounds = stats.binomtest(successes, n).proportion_ci(0.95, "exact") if n else (0.0, 1.0)
    assert exact_interval(successes, n) == pytest.approx(tuple(bounds), abs=1e-9)


# --------------------------------------------------------------------------------------------- suspicious models
@pytest.mark.parametrize("name", ["pgd20", "aa", "pgd20-l2", "square", "apgd-ce"])
def test_an_ordinary_model_is_not_suspected(classifier, images, name):
    one = attack(name) if name != "pgd20-l2" else attack(name, 0.5)
    assert evaluated(one, classifier, images).suspicions == ()


@pytest.mark.parametrize("name", ["pgd20", "square"])
def test_probabilities_are_told_from_logits(classifier, images, name):
    inside = Around(classifier, after=lambda out: out.softmax(1))
    assert (
        "return logits, not probabilities"
        in found(evaluated(attack(name), inside, images))["probabilities"].text
    )
    harmless = Around(classifier, after=lambda out: out.log_softmax(1))
    assert "probabilities" not in found(evaluated(attack(name), harmless, images))


def test_rounded_images_have_no_gradient_and_square_breaks_what_apgd_does_not(classifier, images):
    rounding = Around(classifier, before=lambda x: (x * 8).round() / 8)
    outcome = evaluated(attack("aa", 0.15), rounding, images)
    right = int((outcome.clean_predictions == outcome.labels).sum())
    zero, square = found(outcome)["zero-gradients"].numbers, found(outcome)["square-only"].numbers
    assert zero == {"zero": right, "probed": right, "share": 1.0}
    assert square["broken"] == outcome.broken_by.count("square") > 0
    assert square["given"] == square["broken"] + int(outcome.robust.sum())
    assert square["share"] == square["broken"] / 48
    alone = evaluated(attack("square", 0.15), rounding, images)
    assert alone.suspicions == ()  # it needs no gradient and has none to compare with


def test_no_verdict_changes(classifier, images):
    """Square stays the judge of what it broke: a forward of its image is misclassified."""
    rounding = Around(classifier, before=lambda x: (x * 8).round() / 8)
    outcome = evaluated(attack("aa", 0.15), rounding, images)
    with torch.no_grad():
        after = rounding(outcome.adversarial).argmax(1)
    assert torch.equal(
        outcome.robust, (after == outcome.labels) & (outcome.clean_predictions == outcome.labels)
    )


def test_a_loss_that_falls_is_reported_with_its_means(classifier, images):
    """The value is the model's at x and the gradient points the other way: ascent walks downhill."""
    _, x, y = images
    backwards = Around(classifier, before=lambda x: 2 * x.detach() - x)
    outcome = evaluated(attack("pgd20"), backwards, images)
    one = found(outcome)["flat-loss"]
    with torch.no_grad():
        before = nn.functional.cross_entropy(classifier(x).double(), y, reduction="none")
        after = nn.functional.cross_entropy(classifier(outcome.adversarial).double(), y, reduction="none")
    held = outcome.robust
    assert held.sum() > 10
    assert one.numbers["held"] == int(held.sum())
    assert one.numbers["before"] == pytest.approx(float(before[held].mean()), rel=1e-5)
    assert one.numbers["after"] == pytest.approx(float(after[held].mean()), rel=1e-5)
    assert one.numbers["after"] < one.numbers["before"]
    assert "flat-loss" in found(evaluated(attack("apgd-ce"), backwards, images))
    assert "flat-loss" not in found(evaluated(attack("fab-t"), classifier, images))
    whole = evaluated(attack("aa", 0.05), backwards, images)
    assert found(whole)["flat-loss"].numbers["held"] >= int(whole.robust.sum()) > 10
    assert "flat-loss" not in found(evaluated(attack("aa", 0.05), classifier, images))


def test_counts_of_shards_add_up_to_those_of_the_whole(classifier, images):
    ids, x, y = images
    rounding = Around(classifier, before=lambda x: (x * 8).round() / 8)
    for one in (attack("aa", 0.15), attack("pgd20")):
        whole = evaluated(one, rounding, images).diagnostics
        parts = [
            evaluated(one, rounding, (ids[s], x[s], y[s])).diagnostics for s in (slice(20), slice(20, 48))
        ]
        merged = parts[0] + parts[1]
        sums = {"loss_before", "loss_after", "floor_sum", "floor_squares", "range_sum"}
        assert merged.model_dump(exclude=sums) == whole.model_dump(exclude=sums)
        assert merged.floor_squares == pytest.approx(whole.floor_squares, rel=1e-5)
        assert merged.loss_after == pytest.approx(whole.loss_after, rel=1e-5)
        assert Diagnostics.model_validate_json(merged.model_dump_json()) == merged


# ---------------------------------------------------------------------------------------- batches that do not fit
class Small(Around):
    """Takes `most` images at once; `error` makes what it raises for more."""

    def __init__(self, model, most, error):
        super().__init__(model)
        self.most, self.error, self.failures = most, error, 0

    def forward(self, x):
        if len(x) > self.most:
            self.failures += 1
            raise self.error()
        return super().forward(x)


ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
}


@pytest.mark.parametrize(
    ("name", "where"), slow_but([("pgd20", "gpu"), ("aa", "cpu")], product(("pgd20", "aa"), ERRORS))
)
def test_a_batch_too_large_is_halved_until_it_fits(classifier, images, where, name):
    model = Small(classifier, 12, ERRORS[where])
    outcome = evaluated(attack(name), model, images)
    plain = evaluated(attack(name), classifier, images, 12)
    assert torch.equal(outcome.robust, plain.robust)
    assert torch.equal(outcome.adversarial, plain.adversarial)
    assert torch.equal(outcome.forwards, plain.forwards)
    assert found(outcome)["batch"].numbers == {"asked": 48, "fits": 12}
    assert model.failures == 2


def test_the_allocators_own_error_is_known(classifier, images):
    """What the CPU's allocator says of memory nobody has."""

    def greedy(x):
        return x if len(x) <= 24 else x + torch.empty(10**15).sum()

    outcome = evaluated(attack("fgsm"), Around(classifier, before=greedy), images)
    assert found(outcome)["batch"].numbers == {"asked": 48, "fits": 24}


def test_scoring_has_a_batch_size_of_its_own(classifier, images):
    ids, x, y = images
    victim = Victim(Small(classifier, 10, ERRORS["gpu"]), "cpu", 40)
    outcome = attack("fgsm").evaluate(victim, ids, x, y, 0, 5)
    assert found(outcome)["batch"].numbers == {"asked": 40, "fits": 10}
    assert victim.batch_size == 10


def test_one_image_that_does_not_fit_is_the_end(classifier, images):
    model = Small(classifier, 0, ERRORS["gpu"])
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(attack(), model, images)
    assert model.failures == 6  # 48, 24, 12, 6, 3, 1


def test_other_errors_are_not_tried_again(classifier, images):
    model = Small(classifier, 12, lambda: RuntimeError("a layer is broken"))
    with pytest.raises(UserError, match=r"failed on images .* with RuntimeError: a layer is broken"):
        evaluated(attack(), model, images)
    assert model.failures == 1


def test_an_attack_that_depends_on_the_batch_fails(classifier, images):
    model = Small(classifier, 12, ERRORS["gpu"])
    one = attack("aa-reference", components=["apgd-ce"], iterations=3)
    assert one.batch_dependent
    with pytest.raises(torch.OutOfMemoryError):
        evaluated(one, model, images)
    assert model.failures == 1


def test_the_size_that_fits_is_remembered_and_said_once(classifier, images):
    _, x, y = images
    model = Small(classifier, 12, ERRORS["gpu"])
    with pytest.warns(RobbenchWarning) as caught:
        table = robbench.evaluate(
            model, x, y, ["fgsm", "pgd10", "pgd20"], epsilon=0.1, device="cpu", batch_size=48
        ).to_dataframe()
    assert [str(one.message).partition(":")[0] for one in caught] == ["fgsm@0.1"]
    assert model.failures == 2
    assert ["halved to 12" in text for text in table["suspicions"]] == [False, True, False, False, False]


# ---------------------------------------------------------------------------------------------- inputs and models
def test_evaluate_takes_double_and_strided_images(classifier, images):
    _, x, y = images
    strided = x.double().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    tables = [
        robbench.evaluate(classifier, inputs, labels, ["pgd10"], epsilon=0.1, device="cpu").to_dataframe()
        for inputs, labels in ((x, y), (strided, y.int()), (x.repeat_interleave(2, 0)[::2], y))
    ]
    for table in tables[1:]:
        assert table.equals(tables[0])


def double(classifier):
    from robbench.models.classifiers import digits_cnn

    model = digits_cnn((1, 8, 8), 10).double()
    model.load_state_dict({name: value.double() for name, value in classifier.state_dict().items()})
    return model.eval()


def test_a_double_model_is_refused_in_one_line(classifier, images):
    for model, name in ((double(classifier), "torch.float64"), (double(classifier).half(), "torch.float16")):
        for one in (attack(), attack("aa-rand")):
            with pytest.raises(UserError, match=rf"{name}.*torch.float32 images.*model.float\(\)"):
                evaluated(one, model, images)


@pytest.mark.parametrize("name", slow_but(["mim", "square-l2"], ["pgd20", "aa", "mim", "square-l2"]))
def test_a_double_model_that_converts_the_images_is_attacked(classifier, images, name):
    """Logits in double too: nothing in a search depends on the type the model returns."""
    one = attack(name) if name != "square-l2" else attack(name, 0.8)
    outcome = evaluated(one, Around(double(classifier), before=lambda x: x.double()), images)
    plain = evaluated(one, classifier, images)
    clear = (outcome.margins.abs() > 1e-3) & (plain.margins.abs() > 1e-3)
    assert clear.sum() > 40
    assert int((outcome.robust != plain.robust)[clear].sum()) <= 1
    assert outcome.suspicions == ()


@torch.inference_mode()
def inference(out):
    return out + 0.0


BREAKERS = {
    "detached logits": {"after": lambda out: out.detach()},
    "inference mode": {"after": inference},
    "argmax": {"after": lambda out: one_hot(out.argmax(1), 10)},
    "detached images": {"before": lambda x: x.detach()},
    "numpy": {"after": lambda out: torch.from_numpy(out.detach().numpy())},
}


@pytest.mark.parametrize("how", BREAKERS)
@pytest.mark.parametrize("name", ["fgsm", "apgd-t", "fab-t", "aa", "aa-reference", "pgd20-l2"])
def test_a_model_without_gradients_is_refused_in_one_line(classifier, images, how, name):
    model = Around(classifier, **BREAKERS[how])
    with pytest.raises(UserError) as caught:
        evaluated(attack(name), model, images)
    text = str(caught.value)
    assert text.startswith(f"attack '{name}@0.1' follows the gradient")
    assert ("square-l2" if name == "pgd20-l2" else "use square,") in text
    assert "\n" not in text


@pytest.mark.parametrize("how", sorted(set(BREAKERS) - {"argmax"}))
def test_square_attacks_what_has_no_gradients(classifier, images, how):
    outcome = evaluated(attack("square", 0.15), Around(classifier, **BREAKERS[how]), images)
    plain = evaluated(attack("square", 0.15), classifier, images)
    assert torch.equal(outcome.robust, plain.robust)
    assert 0 < int(outcome.robust.sum()) < 48


def test_labels_below_zero_are_outside_the_classes(classifier, images):
    ids, x, y = images
    with pytest.raises(UserError, match="label -1 is outside the model's 10 classes"):
        evaluated(attack(), classifier, (ids, x, y - 1 - y.min()))


# ------------------------------------------------------------------------------------------------------ evaluate
def test_evaluate_shows_and_warns_once_each(classifier, images):
    _, x, y = images
    model = Around(classifier, after=lambda out: out.softmax(1))
    with pytest.warns(RobbenchWarning) as caught:
        table = robbench.evaluate(model, x, y, ["fgsm", "square"], epsilon=0.05, device="cpu").to_dataframe()
    assert len(caught) == 1
    assert str(caught[0].message).startswith("fgsm@0.05, square@0.05: the model returns probabilities")
    assert caught[0].filename == __file__
    assert table["suspicions"].iloc[0] == table["suspicions"].iloc[-1] == ""
    assert all("return logits" in text for text in table["suspicions"].iloc[1:-1])


def test_evaluate_is_silent_where_there_is_nothing(classifier, images):
    _, x, y = images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = robbench.evaluate(classifier, x, y, ["fgsm"], epsilon=0.05, device="cpu").to_dataframe()
    assert (table["suspicions"] == "").all()
