"""Models made to mislead: each would print a wrong robustness number if it were believed."""

import torch
from torch import nn
from torch.nn import functional


class Around(nn.Module):
    """A model inside another forward. Subclasses say what is wrong with it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.wrong(x)

    def wrong(self, x):
        return self.model(x)


# ------------------------------------------------------------------------------------- dependent on the batch
class BatchCentred(Around):
    """Statistics of the batch, kept outside buffers."""

    def wrong(self, x):
        return self.model((x - x.mean(0, keepdim=True) + 0.3).clamp(0, 1))


class FunctionalTrainMode(Around):
    """Batch norm called as a function with training=True."""

    def wrong(self, x):
        return self.model(functional.batch_norm(x, None, None, training=True) * 0.3 + 0.3)


class FixedSeedNoise(Around):
    """Noise whose seed is fixed in the forward: the same each time, by place in the batch."""

    def wrong(self, x):
        generator = torch.Generator().manual_seed(0)
        return self.model(x + 0.2 * torch.randn(x.shape, generator=generator))


class KnowsItsPlace(Around):
    """Another function of the second half of a batch."""

    def wrong(self, x):
        half = len(x) // 2
        return self.model(torch.cat([x[:half], 1 - x[half:]]))


class AloneIsSpecial(Around):
    """Another function of a batch of one image."""

    def wrong(self, x):
        return self.model(x) if len(x) > 1 else self.model(x).roll(1, 1)


class LargeBatchesAreSpecial(Around):
    """Another function of batches larger than any probe."""

    def wrong(self, x):
        return self.model(x) if len(x) <= 33 else self.model(x).roll(1, 1)


class StaysInTraining(nn.Module):
    """Batch norm that an overridden train() keeps in training mode."""

    def __init__(self, model):
        super().__init__()
        self.norm, self.model = nn.BatchNorm2d(1), model

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = True
        return self

    def forward(self, x):
        return self.model(self.norm(x) * 0.3 + 0.3)


class StaysInTrainingWithoutStatistics(StaysInTraining):
    def __init__(self, model):
        super().__init__(model)
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)


# ------------------------------------------------------------------------------------------ changing in time
class ChangesAfter(Around):
    """Another function once it was called often enough."""

    def __init__(self, model, calls=25):
        super().__init__(model)
        self.after = calls

    def wrong(self, x):
        return self.model(x) if self.calls <= self.after else self.model(1 - x)


class OneInTwenty(Around):
    """One forward in twenty is random."""

    def __init__(self, model, first=17):
        super().__init__(model)
        self.first = first

    def wrong(self, x):
        out = self.model(x)
        return out.roll(1, 1) if self.calls % 20 == self.first else out


class FixedUnderNoGrad(Around):
    """Robust only where a gradient is asked for."""

    def wrong(self, x):
        return (
            self.model(x) if not torch.is_grad_enabled() else 0 * self.model(x) + torch.eye(10)[0] * x.mean()
        )


class ForgetsAdversaries(Around):
    """After so many calls, whatever is not near a known image gets the class of the nearest one: what a search broke
    is right again when it is scored."""

    def __init__(self, model, known, calls):
        super().__init__(model)
        self.register_buffer("known", known)
        self.after = calls

    def wrong(self, x):
        if self.calls <= self.after:
            return self.model(x)
        nearest = torch.cdist(x.flatten(1), self.known.flatten(1)).argmin(1)
        return self.model(self.known[nearest])


class CountsInABuffer(Around):
    def __init__(self, model):
        super().__init__(model)
        self.register_buffer("count", torch.zeros(()))

    def wrong(self, x):
        self.count += 1
        return self.model(x)


class DriftingWeights(Around):
    """Its own weights are replaced by others at the fourteenth call."""

    def __init__(self, model):
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(10), requires_grad=False)

    def wrong(self, x):
        if self.calls == 14:
            self.scale.data = torch.full((10,), 1.0001)
        return self.model(x) * self.scale


class LeavesHooks(Around):
    def wrong(self, x):
        self.model.register_forward_hook(lambda *_: None)
        return self.model(x)


# ------------------------------------------------------------------------------------------- writing in place
class InPlace(nn.Module):
    """A forward that writes into its input; `how` names the method."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x):
        if self.how == "mul_":
            return self.model(x.mul_(0.7))
        if self.how == "clamp_":
            return self.model(x.clamp_(0.1, 0.6))
        if self.how == "round_":
            return self.model(x.mul_(4).round_().div_(4))
        if self.how == "data":
            x.data.mul_(0.7)
            return self.model(x)
        raise AssertionError(self.how)


class OutOfPlace(InPlace):
    """What `InPlace` computes, without writing into its input."""

    def forward(self, x):
        return super().forward(x.clone())


class OneOutputBuffer(Around):
    """Returns the same tensor each time, overwritten by the next call."""

    def __init__(self, model):
        super().__init__(model)
        self.held = torch.zeros(0)

    def wrong(self, x):
        out = self.model(x)
        if torch.is_grad_enabled() and out.requires_grad:
            return out
        if len(self.held) < len(out):
            self.held = torch.zeros(len(out), out.shape[1])
        self.held[: len(out)] = out
        return self.held[: len(out)]


# -------------------------------------------------------------------------------------------------- not finite
class NotFiniteWhereWrong(nn.Module):
    """NaN (or an infinity) in all logits, or in one, wherever it would not give the nearest known image's class."""

    def __init__(self, model, known, labels, value=float("nan"), everywhere=True):
        super().__init__()
        self.model, self.value, self.everywhere = model, value, everywhere
        self.register_buffer("known", known)
        self.register_buffer("labels", labels)

    def forward(self, x):
        out = self.model(x)
        nearest = torch.cdist(x.detach().flatten(1), self.known.flatten(1)).argmin(1)
        label = self.labels[nearest]
        wrong = out.argmax(1) != label
        where = wrong[:, None] & (
            torch.ones_like(out).bool() if self.everywhere else nn.functional.one_hot(label, 10).bool()
        )
        return torch.where(where, self.value, out)


# ---------------------------------------------------------------------------------- gradients that are no slopes
class _Backwards(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        noise = torch.Generator().manual_seed(int(1e4 * x.sum()) % 2**31)
        other = {
            "noise": lambda: gradient.abs().amax() * torch.randn(gradient.shape, generator=noise),
            "negative": lambda: -gradient,
            "of another place": lambda: gradient.roll(3, -1),
            "of the batch": lambda: gradient.mean(0, keepdim=True).expand_as(gradient),
        }
        return other[ctx.how](), None


def off_grey(x, levels=16):
    """True [n] for images that are not on grey levels."""
    return ((x * levels - (x * levels).round()).abs() > 1e-4).flatten(1).any(1)


class WrongGradient(Around):
    """The right logits, and a gradient that leads nowhere."""

    def __init__(self, model, how):
        super().__init__(model)
        self.how = how

    def wrong(self, x):
        if self.how == "off the grey levels":
            off = off_grey(x.detach())[:, None, None, None]
            return self.model(torch.where(off, _Backwards.apply(x, "noise"), x))
        if self.how == "detached":
            seen = torch.zeros_like(x)
            seen[..., ::8, :] = 1.0
            return self.model(x * seen + (x * (1 - seen)).detach())
        if self.how == "asked for":
            return self.model(_Backwards.apply(x, "noise")) if x.requires_grad else self.model(x)
        if self.how == "tiny":
            ramp = torch.arange(10.0)
            return self.model(x.detach()) + 1e-9 * x.flatten(1).sum(1, keepdim=True) * ramp
        return self.model(_Backwards.apply(x, self.how))


# ------------------------------------------------------------------------------------------- outputs that lie
class AlwaysGreater(torch.Tensor):
    """A tensor that is greater than anything."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        greater = getattr(function, "__name__", "") in ("gt", "__gt__")
        return torch.ones_like(result.as_subclass(torch.Tensor)).bool() if greater else result


class Lying(Around):
    def wrong(self, x):
        return self.model(x).as_subclass(AlwaysGreater)


class Masked(Around):
    """Classes that are ruled out by -1e9, beside which every other logit looks like rounding."""

    def wrong(self, x):
        return torch.cat([self.model(x), torch.full((len(x), 3), -1e9)], 1)


class MaskedNoise(Masked):
    def wrong(self, x):
        out = super().wrong(x)
        return out + torch.randn_like(out)


class RoundsInCompany(Around):
    """Rounds images that are on no grey levels, unless they are alone."""

    def wrong(self, x):
        if len(x) == 1:
            return self.model(x)
        off = off_grey(x.detach())[:, None, None, None]
        return self.model(torch.where(off, x + ((4 * x).round() / 4 - x).detach(), x))


class LeavesMode(Around):
    """A forward that leaves torch in another mode."""

    def __init__(self, model, leave):
        super().__init__(model)
        self.leave = leave

    def wrong(self, x):
        out = self.model(x)
        if self.calls > 13:
            self.leave()
        return out


class OneGradientBuffer(Around):
    """Its backward pass returns the same memory each time."""

    def __init__(self, model):
        super().__init__(model)
        self.held = None

    def wrong(self, x):
        outer = self

        class Held(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                if outer.held is None or outer.held.shape != gradient.shape:
                    outer.held = torch.empty_like(gradient)
                return outer.held.copy_(gradient)

        return self.model(Held.apply(x))
