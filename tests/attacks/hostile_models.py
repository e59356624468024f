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
