"""Formulas as MathML, composed of Unicode text with `sub`, `sup` and `under`."""

# ruff: noqa: RUF001 - the letters of formulas are meant
import re

from markupsafe import Markup, escape

_TOKEN = re.compile(r"arg max|\d+(?:\.\d+)?|[^\W\d_]+|\S")
_FUNCTIONS = ("arg max", "max", "min", "sign", "log")
_FENCES = "()[]{}‖"  # not stretched to the height of the formula


def math(*parts: str) -> Markup:
    """A formula on its own line. A part is text, "f(x) = y", or a result of the functions below."""
    return Markup('<math display="block">{}</math>').format(row(*parts))


def row(*parts: str) -> Markup:
    """The parts side by side, as one element."""
    drawn = (part if isinstance(part, Markup) else _tokens(part) for part in parts)
    return Markup("<mrow>{}</mrow>").format(Markup("").join(drawn))


def sub(base: str, small: str) -> Markup:
    """`base` with `small` as its index."""
    return Markup("<msub>{}{}</msub>").format(row(base), row(small))


def sup(base: str, small: str) -> Markup:
    """`base` with `small` as its exponent."""
    return Markup("<msup>{}{}</msup>").format(row(base), row(small))


def under(base: str, small: str) -> Markup:
    """`base`, a sum or "max", with `small` below."""
    drawn = _tokens(base)
    return Markup("<munder>{}{}</munder>").format(drawn, row(small))


def length(inside: str, index: str) -> Markup:
    """The norm of `inside`, with `index`."""
    return row("‖", inside, sub("‖", index))


def _tokens(text: str) -> Markup:
    return Markup("").join(_token(token) for token in _TOKEN.findall(text))


def _token(token: str) -> Markup:
    if token in _FUNCTIONS:
        return Markup('<mo form="prefix" lspace="0.1em" rspace="0.2em">{}</mo>').format(token)
    if token[0].isalpha() or token in "∇𝟏":
        return Markup("<mi>{}</mi>").format(token)
    if token[0].isdigit():
        return Markup("<mn>{}</mn>").format(token)
    fence = Markup(' stretchy="false"') if token in _FENCES else ""
    return Markup("<mo{}>{}</mo>").format(fence, escape(token.replace("-", "−")))
