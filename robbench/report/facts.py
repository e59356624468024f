"""What is known of models beside their numbers and their own cards."""

from functools import cache

from robbench.cards import ModelCard, Paper
from robbench.core.resources import data_root
from robbench.core.schema import Strict, read_yaml, validate
from robbench.models.zoo import zoo_entries

PUBLISHED = "reports/published/models.yaml"


class PublishedModel(Strict):
    """What is known of a model that others published. extra_data: as in `ModelCard`."""

    architecture: str = ""
    extra_data: str = ""
    paper: Paper | None = None


class _PublishedModels(Strict):
    models: dict[str, PublishedModel]


@cache
def read_published_models() -> dict[str, PublishedModel]:
    """The models of published tables of which more than a name is known, by the name that robbench gives them."""
    path = data_root() / PUBLISHED
    return validate({"models": read_yaml(path)}, _PublishedModels, str(path)).models


def complete(card: ModelCard | None) -> ModelCard | None:
    """The card, and what it leaves out from the shipped card of the same function, or from what is known of a published
    model of its name: cards of older runs say less."""
    if card is None:
        return None
    known = _read_shipped().get(card.function_hash) if card.parameters is None else None
    more = {} if known is None else {key: getattr(known, key) for key in ("parameters", "source")}
    published = known or read_published_models().get(card.name)
    if published is not None:
        more |= {"paper": published.paper, "extra_data": published.extra_data}
    return card.model_copy(update={key: value for key, value in more.items() if not getattr(card, key)})


@cache
def _read_shipped() -> dict[str, ModelCard]:
    return {entry.card.function_hash: entry.card for entry in zoo_entries().values()}
