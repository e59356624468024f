"""From a card to a module and back: hashes checked, no pickled code, golden tensors reproduced."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from robbench.cards import Architecture, Golden, ModelCard, Weights
from robbench.core.errors import UserError
from robbench.core.foreign import cause, foreign_code
from robbench.core.resources import sha256_file, write_atomically, write_text_atomically
from robbench.core.schema import dump_yaml
from robbench.core.stops import reraise_stop
from robbench.models import embedding  # noqa: F401  (registers)
from robbench.models.checkpoints import load_strictly, read_golden, read_state
from robbench.models.classifiers import ARCHITECTURES, LogitSubset, Normalize
from robbench.models.entry import ZooEntry
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.flows.checks import frozen_like, require_sound
from robbench.models.flows.conditional import ConditionalFlow
from robbench.models.flows.gated_coupling import GatedCouplingFlow
from robbench.models.flows.glow import Glow
from robbench.models.flows.realnvp import RealNVP
from robbench.models.libraries.third_party import OptionAResNet, TradesSmallCNN, convex_small_cnn
from robbench.models.sources import build_named

GOLDEN_TOLERANCE = (
    1e-4  # float32 sums in another order (threads, instruction set) differ by about 1e-6 of the logits
)
GOLDEN_IMAGES = 4  # of a golden file, on which a flow is compared with its frozen copy


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be attacked: eval mode, no parameter gradients."""

    card: ModelCard
    folder: Path
    module: nn.Module


@dataclass(frozen=True)
class LoadedFlow:
    """A flow ready to be attacked. flow: float32, what a search differentiates. judge: what scores images."""

    card: ModelCard
    folder: Path
    flow: FrozenFlow
    judge: FrozenFlow


ARCHITECTURES.register("glow")(Glow)
ARCHITECTURES.register("realnvp")(RealNVP)
ARCHITECTURES.register("conditional-flow")(ConditionalFlow)
ARCHITECTURES.register("gated-coupling")(GatedCouplingFlow)
ARCHITECTURES.register("trades-small-cnn")(TradesSmallCNN)
ARCHITECTURES.register("convex-small-cnn")(convex_small_cnn)
ARCHITECTURES.register("resnet20-option-a")(OptionAResNet)


def build_architecture(
    architecture: Architecture,
    input_shape: tuple[int, int, int],
    classes: int | None,
    grey_levels: int | None,
) -> nn.Module:
    """A freshly initialised module: classifiers get `classes`, flows get `grey_levels`."""
    builder = ARCHITECTURES.get(architecture.name)
    if is_flow(architecture) and grey_levels is None:
        raise UserError(
            f"architecture {architecture.name!r} is a flow and needs the grey levels of its images; "
            f"add grey_levels to the card"
        )
    sizes: dict[str, Any] = {"grey_levels": grey_levels} if is_flow(architecture) else {"classes": classes}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Initializing zero-element tensors")  # a width of 0
            return builder(input_shape, **sizes, **architecture.arguments)
    except UserError:
        raise
    except BaseException as error:  # a plugin's architecture can fail in any way
        reraise_stop(error)
        given = ", ".join(f"{key}={value!r}" for key, value in architecture.arguments.items())
        raise UserError(
            f"architecture {architecture.name!r} cannot be built for images {tuple(input_shape)} with "
            f"{given or 'its default arguments'}: {cause(error)}; correct the arguments"
        ) from error


def is_flow(architecture: Architecture) -> bool:
    """Whether an architecture of the registry is a normalizing flow."""
    builder = ARCHITECTURES.get(architecture.name)
    return isinstance(builder, type) and issubclass(builder, Flow)


def load_model(entry: ZooEntry, device: torch.device | str = "cpu") -> LoadedModel:
    """The module of a card, verified: sha256 of weights, every parameter present, golden outputs reproduced."""
    card = entry.card
    with foreign_code(f"model {card.name!r}", "correct its code, its architecture or its weights"):
        module = (entry.build() if entry.build is not None else _built(entry)).eval().requires_grad_(False)
        if card.golden is not None:
            _check_golden(entry, card.golden, module)
        elif card.kind == "classifier":
            _check_logits(entry, module)
        if card.logits is not None:
            module = LogitSubset(module, card.logits).eval()
        return LoadedModel(card, entry.folder, module.to(device))


def _built(entry: ZooEntry) -> nn.Module:
    """The architecture of a card with its weights in it, behind its preprocessing."""
    card = entry.card
    if ":" in card.architecture.name:  # before its weights: what cannot be built is not downloaded
        module = build_named(entry)
    else:
        module = build_architecture(card.architecture, card.input_shape, card.classes, card.grey_levels)
    state = read_state(entry, module)
    for name, value in state.items():
        state[name] = _without_denormals(value)
    load_strictly(module, state, entry)
    if card.preprocessing is None:
        return module
    return nn.Sequential(Normalize(card.preprocessing.mean, card.preprocessing.std), module)


def _check_logits(entry: ZooEntry, module: nn.Module) -> None:
    """`UserError` unless a classifier without golden outputs turns two grey images into two rows of logits."""
    card = entry.card
    where = f"model {card.name!r} (architecture {card.architecture.name!r})"
    images = torch.full((2, *card.input_shape), 0.5)
    try:
        with torch.no_grad():
            logits = module(images)
    except BaseException as error:  # somebody else's code can fail in any way
        reraise_stop(error)
        raise UserError(
            f"{where} fails on images {card.input_shape} ({cause(error)}); correct input_shape or "
            f"architecture in its card"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{where} returns a {type(logits).__name__}, not a tensor of logits [N,classes]; "
            f"name a module:callable that returns them"
        )
    classes = f"[2,{card.classes}]" if card.classes is not None else "[2,classes]"
    if logits.ndim != 2 or len(logits) != 2 or logits.shape[1] != (card.classes or logits.shape[1]):
        raise UserError(
            f"{where} returns shape {list(logits.shape)} for two images, not {classes}; "
            f"correct classes or architecture in its card"
        )


def _without_denormals(weights: Tensor) -> Tensor:
    """`weights` with denormal numbers set to 0. Weight decay leaves thousands of them in a small network; they change
    no output and make a CPU up to twenty times slower. Those of float16 are normal numbers once in the network."""
    if weights.dtype not in (torch.float32, torch.float64) or weights.layout != torch.strided:
        return weights
    return weights.masked_fill(weights.abs() < torch.finfo(weights.dtype).tiny, 0.0)


def load_flow(entry: ZooEntry, device: torch.device | str = "cpu") -> FrozenFlow:
    """The flow of a card, verified as `load_model` does and frozen; `UserError` when it is not a flow."""
    trained, images = _trained_flow(entry, device), _golden_images(entry)
    flow = frozen_like(trained, images=images).to(device)
    require_sound(flow, images)
    return flow


def load_flow_model(
    entry: ZooEntry, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedFlow:
    """`load_flow` together with a copy in `dtype` that scores; the same object for float32."""
    flow = load_flow(entry, device)
    judge = flow
    if dtype != torch.float32:
        judge = frozen_like(_trained_flow(entry, device), dtype, _golden_images(entry)).to(device)
        require_sound(judge)
    return LoadedFlow(entry.card, entry.folder, flow, judge)


def _trained_flow(entry: ZooEntry, device: torch.device | str) -> Flow:
    card, module = entry.card, load_model(entry, device).module
    if not isinstance(module, Flow):
        raise UserError(
            f"model {card.name!r} ({card.kind}, architecture {card.architecture.name!r}) is not a "
            f"flow; name another (robbench list models), or correct its card"
        )
    for name in ("input_shape", "grey_levels"):
        built, stated = getattr(module, name), getattr(card, name)
        if stated is not None and built != stated:
            raise UserError(
                f"model {card.name!r}: its card says {name} {stated} and its architecture "
                f"{card.architecture.name!r} builds a flow of {name} {built}; correct the card or its arguments"
            )
    return module


def _golden_images(entry: ZooEntry) -> Tensor | None:
    """A few images that a flow was made for, from its golden file; None without one."""
    golden = entry.card.golden
    return None if golden is None else read_golden(entry, golden)["inputs"][:GOLDEN_IMAGES]


def _outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a golden file records: logits of a classifier, log-densities (nats) of a flow."""
    with torch.no_grad():
        if isinstance(module, Flow):
            labels = (
                None if module.label_classes is None else torch.arange(len(inputs)) % module.label_classes
            )
            return module.log_prob(inputs, labels)
        out: Tensor = module(inputs)
    return out


def _check_golden(entry: ZooEntry, golden: Golden, module: nn.Module) -> None:
    tensors = read_golden(entry, golden)
    try:
        inputs, expected = tensors["inputs"], tensors["outputs"]
        outputs = _outputs(module, inputs)
        if outputs.shape != expected.shape or not expected.numel():
            raise ValueError(f"outputs {tuple(expected.shape)} recorded, {tuple(outputs.shape)} computed")
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model {entry.card.name!r}: {golden.file} does not fit it ({' '.join(str(error).split())[:160]}); "
            f"restore the file, or remove `golden` from the card"
        ) from error
    gap = float((outputs - expected).abs().max())
    allowed = golden.tolerance * max(1.0, float(expected.abs().max()))
    if not gap <= allowed:
        raise UserError(
            f"model {entry.card.name!r} does not reproduce its golden outputs: off by {gap:.3g}, allowed "
            f"{allowed:.3g}; the architecture's code changed or this device computes differently"
        )


def save_model_folder(
    folder: Path, card: dict[str, Any], module: nn.Module, golden_inputs: Tensor
) -> ModelCard:
    """Write weights, golden tensors and card.yaml (last, so that a folder with a card is complete).

    card: fields of `ModelCard` without `parameters`, `weights` and `golden`. golden_inputs: a few images [n,C,H,W] in
    [0,1].
    """
    module = module.to("cpu").eval()
    state = {name: value.detach().contiguous().clone() for name, value in module.state_dict().items()}
    weights, golden = folder / "weights.safetensors", folder / "golden.safetensors"
    recorded = {"inputs": golden_inputs.contiguous(), "outputs": _outputs(module, golden_inputs).contiguous()}
    # As bytes: safetensors' own writer reports a full disk as an error of its own, not of the system.
    write_atomically(weights, lambda path: path.write_bytes(save(state)))
    write_atomically(golden, lambda path: path.write_bytes(save(recorded)))
    complete = ModelCard(
        **card,
        parameters=sum(value.numel() for value in module.parameters()) or None,
        weights=Weights(file=weights.name, sha256=sha256_file(weights)),
        golden=Golden(file=golden.name, sha256=sha256_file(golden), tolerance=GOLDEN_TOLERANCE),
    )
    write_text_atomically(folder / "card.yaml", dump_yaml(complete))
    return complete
