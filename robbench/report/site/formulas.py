"""Formulas of threat models and attacks as MathML, written in a small part of TeX: names, sub- and superscripts."""

# ruff: noqa: RUF001 - the letters of formulas are meant
import re
from collections.abc import Callable, Iterator

from markupsafe import Markup, escape

from robbench.specs import Measure, ModelKind, Norm, ResolvedAttack, Space

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]|\d+(?:\.\d+)?|\S")
_NAMES = {
    "epsilon": "ε",
    "eta": "η",
    "lambda": "λ",
    "delta": "δ",
    "alpha": "α",
    "mu": "μ",
    "xi": "ξ",
    "ell": "ℓ",
    "max": "max",
    "min": "min",
    "clip": "clip",
    "sign": "sign",
    "argmax": "arg max",
    "log": "log",
    "Pi": "Π",
    "nabla": "∇",
    "A": "𝒜",
    "N": "𝒩",
    "U": "𝒰",
    "infty": "∞",
    "one": "𝟏",
}
_SIGNS = {
    "in": "∈",
    "le": "≤",
    "ne": "≠",
    "sim": "∼",
    "sum": "∑",
    "norm": "‖",
    "{": "{",
    "}": "}",
    "prime": "′",
}
_OPERATORS = ("\\max", "\\min", "\\argmax", "\\sign", "\\log")
_BELOW = ("\\max", "\\min", "\\argmax", "\\sum")


def math(text: str) -> Markup:
    """A formula in a line of its own: "\\norm x' - x \\norm _\\infty \\le \\epsilon"."""
    tokens = list(_TOKEN.findall(text))
    body = "".join(_sequence(iter(tokens), ""))
    return Markup(f'<math display="block"><mrow>{body}</mrow></math>')


def _sequence(tokens: Iterator[str], end: str) -> list[str]:
    """Elements up to the token `end`."""
    found: list[str] = []
    base = ""
    for token in tokens:
        if token == end:
            break
        if token in "_^" and found:
            found[-1] = _script(base, found[-1], token, _element(next(tokens), tokens))
            continue
        base = token
        found.append(_element(token, tokens))
    return found


def _element(token: str, tokens: Iterator[str]) -> str:
    if token == "{":
        return f"<mrow>{''.join(_sequence(tokens, '}'))}</mrow>"
    name = token.removeprefix("\\")
    if token in _OPERATORS:
        return f'<mo form="prefix" lspace="0.1em" rspace="0.2em">{_NAMES[name]}</mo>'
    if token.startswith("\\") and name in _NAMES:
        return f"<mi>{_NAMES[name]}</mi>"
    if token.startswith("\\"):
        return _operator(_SIGNS[name])
    tag = "mi" if token.isalpha() else "mn" if token[0].isdigit() else "mo"
    return _operator(token) if tag == "mo" else f"<{tag}>{token}</{tag}>"


def _operator(sign: str) -> str:
    """A sign of the height of the text, also where a tall sum stands beside it."""
    sign = {"-": "−", "'": "′"}.get(sign, sign)
    return f'<mo stretchy="false">{sign}</mo>' if sign in "()[]{}‖" else f"<mo>{escape(sign)}</mo>"


def _script(base: str, drawn: str, token: str, small: str) -> str:
    if base in _BELOW:
        return f"<munder>{drawn}{small}</munder>"
    tag = "msub" if token == "_" else "msup"
    return f"<{tag}>{drawn}{small}</{tag}>"


# ------------------------------------------------------------------------------------------------------- formulas
_P = {"linf": "\\infty", "l2": "2", "l1": "1", "none": ""}


def admissible(space: Space, norm: Norm, pixel_range: int) -> tuple[Markup, str]:
    """The set of images that an attacker may choose from, and what its letters mean."""
    box = f"[0, {pixel_range}] ^d"
    latent = _ball(r"\lambda", r"\eta", norm)
    if space == "image":
        ball = _ball("x' - x", r"\epsilon", norm)
        return math(rf"\A (x) = \{{ x' \in {box} : {ball} \}}"), (
            f"x: the clean image of d pixels in [0, {pixel_range}]; ε: the budget, in the same units."
        )
    if space == "latent":
        return math(rf"\A (x) = \{{ \clip ( G ( F (x) + \lambda ) ) : {latent} \}}"), (
            "F: the normalizing flow from images to latents, G its inverse; λ: a move of all latents as one vector, η "
            "its budget in raw latents; clip: to pixels in [0, 1]. How far the image moves is not bounded."
        )
    if space == "joint":
        delta = _ball(r"\delta", r"\epsilon", norm)
        return math(rf"\A (x) = \{{ \clip ( G ( F (x) + \lambda ) + \delta ) : {latent} , {delta} \}}"), (
            "F: the normalizing flow from images to latents, G its inverse; λ: a move of the latents with budget η; δ: "
            "a move of the decoded image with budget ε; clip: to pixels in [0, 1]. The whole move of the image is not "
            "bounded by ε."
        )
    return math(r"\A (x) = \{ c (x) \}"), "c: the corruption, read from files. There is nothing to search."


def _ball(what: str, radius: str, norm: Norm) -> str:
    if norm == "none":
        return rf"{what} \sim \N ( 0 , {radius} ^2 I )"
    return rf"\norm {what} \norm _{_P[norm]} \le {radius}"


def measure(
    target: ModelKind, shown: Measure = "robust accuracy", several: bool = False
) -> tuple[Markup, str]:
    """The number in the tables. shown: which accuracy, of a classifier; several: over all attacks a of a model."""
    if target == "flow":
        return math(r"{1} / n \sum _{i} ( - \log _2 p ( x' _i ) / d )"), (
            "Mean negative log-likelihood in bits per dimension of the attacked images under the flow's density p."
        )
    image = r"x' _{i , a}" if several else r"x' _i"
    under = rf"\one [ \argmax _k f _k ( {image} ) = y _i ]"
    if shown == "accuracy under attack":
        return math(rf"1 / n \sum _{{i}} {under}"), (
            "Accuracy under attack: the share of all n test images, each of them perturbed, that the model f gets "
            "right on the perturbed image, whatever it says of the clean one."
        )
    over = r"\min _a" if several else ""
    return math(rf"1 / n \sum _{{i}} \one [ \argmax _k f _k ( x _i ) = y _i ] {over} {under}"), (
        "Robust accuracy: the share of all n test images that the model f gets right without attack and under it"
        + (", whatever attack a it is; perturbations are no part of it." if several else ".")
    )


def objective(attack: ResolvedAttack) -> tuple[tuple[Markup, ...], str]:
    """What an algorithm looks for and how, and the same in words; no formula for an algorithm of another package."""
    p = attack.parameters
    label = "k" if p.get("label_source") == "predicted" else "y"
    steps: dict[str, Callable[[], tuple[tuple[Markup, ...], str]]] = {
        "pgd": lambda: _pgd(attack, label),
        "latent-pgd": lambda: _latent(attack, label),
        "jsa": lambda: _joint(attack, label),
        "autoattack": lambda: _margin(attack),
        "autoattack-reference": lambda: _margin(attack),
        "random-latent": lambda: _random(attack),
        "nll": lambda: _likelihood(attack),
        "uniform-noise": lambda: (
            (math(r"x' = \clip ( x + u ) , u \sim \U [ - \epsilon , \epsilon ] ^d"),),
            "Drawn, not searched.",
        ),
        "corruption": lambda: ((math("x' = c (x)"),), "Given, not searched."),
    }
    found = steps.get(attack.algorithm)
    return found() if found else ((), f"The algorithm {attack.algorithm!r} belongs to another package.")


_DIRECTION = {
    "linf": r"\sign ( {g} )",
    "l2": r"{g} / \norm {g} \norm _2",
}


def _pgd(attack: ResolvedAttack, label: str) -> tuple[tuple[Markup, ...], str]:
    goal = math(rf"\max _{{x' \in \A (x)}} \ell ( f ( x' ) , {label} )")
    words = [_search_words(attack, "ε"), _label_words(label)]
    gradient = (
        r"g _t" if attack.parameters.get("momentum") is not None else rf"\nabla \ell ( f ( x _t ) , {label} )"
    )
    lines = [goal]
    if attack.parameters.get("momentum") is not None:
        g = rf"\nabla \ell ( f ( x _t ) , {label} )"
        lines.append(math(rf"g _t = \mu g _{{t - 1}} + {g} / \norm {g} \norm _1"))
        words.append(f"μ = {attack.parameters['momentum']:g}: momentum.")
    if attack.norm in _DIRECTION:
        step = _DIRECTION[attack.norm].replace("{g}", gradient)
        lines.append(math(rf"x _{{t + 1}} = \Pi _{{\A (x)}} ( x _t + \alpha {step} )"))
    else:
        words.append(
            "A step moves the 5 % of pixels with the largest gradient, by its sign, and is then projected."
        )
    return tuple(lines), " ".join(filter(None, words))


def _latent(attack: ResolvedAttack, label: str) -> tuple[tuple[Markup, ...], str]:
    loss = rf"\ell ( f ( \clip ( G ( F (x) + \lambda ) ) ) , {label} )"
    lines = [math(rf"\max _{{{_ball(chr(92) + 'lambda', chr(92) + 'eta', attack.norm)}}} {loss}")]
    if attack.norm in _DIRECTION:
        step = _DIRECTION[attack.norm].replace("{g}", r"\nabla _\lambda \ell")
        lines.append(math(rf"\lambda _{{t + 1}} = \Pi _\eta ( \lambda _t + \alpha {step} )"))
    return tuple(lines), " ".join(
        filter(None, [_search_words(attack, "η"), _levels(attack), _label_words(label)])
    )


def _joint(attack: ResolvedAttack, label: str) -> tuple[tuple[Markup, ...], str]:
    loss = rf"\ell ( f ( \clip ( G ( F (x) + \lambda ) + \delta ) ) , {label} )"
    lines = (
        math(rf"\max _{{\lambda , \delta}} {loss}"),
        math(r"\lambda _{t + 1} = \Pi _\eta ( \lambda _t + \alpha _\eta \sign \nabla _\lambda \ell )"),
        math(r"\delta _{t + 1} = \Pi _\epsilon ( \delta _t + \alpha _\epsilon \sign \nabla _\delta \ell )"),
    )
    literal = attack.parameters.get("in_loop") == "paper_literal"
    box = "The box is met in the final image only." if literal else "The box is met at every step."
    words = [_search_words(attack, "each budget"), box, _levels(attack), _label_words(label)]
    return lines, " ".join(filter(None, words))


def _margin(attack: ResolvedAttack) -> tuple[tuple[Markup, ...], str]:
    parts = ", ".join(attack.parameters.get("components") or ("apgd-ce", "apgd-t", "fab-t", "square"))
    goal = math(r"x' \in \A (x) : f _y ( x' ) \le \max _{k \ne y} f _k ( x' )")
    return (goal,), f"Searched by {parts}, each on the samples that those before it left standing."


def _random(attack: ResolvedAttack) -> tuple[tuple[Markup, ...], str]:
    noise = r"\eta \xi" if attack.norm == "none" else r"\Pi _\eta ( \eta \xi )"
    lines = (math(rf"x' = \clip ( G ( F (x) + {noise} ) ) , \xi \sim \N ( 0 , I )"),)
    draws = attack.parameters.get("draws", 1)
    return lines, f"Drawn, not searched; {draws} draw{'s' if draws != 1 else ''} an image."


def _likelihood(attack: ResolvedAttack) -> tuple[tuple[Markup, ...], str]:
    lowers = attack.parameters.get("images") == "noise"
    goal = math(rf"\{'min' if lowers else 'max'} _{{x' \in \A (x)}} - \log _2 p ( x' ) / d")
    what = (
        "x: uniform-noise images, whose NLL is lowered." if lowers else "x: test images, whose NLL is raised."
    )
    sign = "-" if lowers else "+"
    step = math(
        rf"x _{{t + 1}} = \Pi _{{\A (x)}} ( x _t {sign} \alpha \sign \nabla ( - \log _2 p ( x _t ) ) )"
    )
    return (goal, step), f"{what} {attack.parameters.get('steps')} steps; p: the flow's density, d: pixels."


def _search_words(attack: ResolvedAttack, of: str) -> str:
    p = attack.parameters
    given, relative = p.get("step_size"), p.get("relative_step_size")
    size = (
        f"α = {given:g}" if given is not None else f"α = {relative:g} of {of}" if relative is not None else ""
    )
    restarts = p.get("restarts", 1)
    parts = [f"{p['steps']} step{'s' if p['steps'] != 1 else ''}" if "steps" in p else "", size]
    parts += [f"start: {p['start']}" if "start" in p else "", f"{restarts} starts" if restarts > 1 else ""]
    return ", ".join(filter(None, parts)) + ". ℓ: cross-entropy; Π: projection onto the set."


def _label_words(label: str) -> str:
    return "k: the model's own clean prediction in the place of the true label." if label == "k" else ""


def _levels(attack: ResolvedAttack) -> str:
    levels = attack.parameters.get("levels")
    return f"Only level {', '.join(map(str, levels))} of the flow moves." if levels else ""
