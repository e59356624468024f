"""Names of attacks: those of papers and other libraries, as people type them, and the ones they mean here."""

from collections.abc import Iterable

from robbench.core.errors import UserError, folded, known_name, spell_argument, unknown_name
from robbench.specs.schema import ThreatModel

CLEAN_IS_THERE = "clean accuracy is a column of every table and needs no attack"


def listed_attacks(models: dict[str, ThreatModel]) -> list[str]:
    """Names for `--attacks`, without the members of groups."""
    names: list[str] = []
    for model in models.values():
        grouped = {name for group in model.groups for name in model.members(group)}
        names += [*model.groups, *(name for name in model.attacks if name not in grouped)]
    return names


def expand_groups(names: Iterable[str], models: dict[str, ThreatModel]) -> list[str]:
    """The attacks that `names` mean (`attack_name`), every group replaced by its members."""
    members = {group: model.members(group) for model in models.values() for group in model.groups}
    meant = [attack_name(name, models) for name in names]
    return list(dict.fromkeys(attack for name in meant for attack in members.get(name, (name,))))


# Names of attacks in papers and other libraries, folded, that mean one attack here; and those that mean none, with what
# comes nearest to them here.
ALSO_CALLED = {
    "mifgsm": "mim",
    **dict.fromkeys(("natural", "benign", "none", "noattack"), "clean"),
    **dict.fromkeys(("cw", "carlini", "carliniwagner", "carliniwagnerl2", "l2carliniwagner"), "cw-l2"),
    **dict.fromkeys(("ddn", "ddnl2"), "ddn-l2"),
    **dict.fromkeys(("boundaryl2", "l2boundary"), "boundary"),
    **dict.fromkeys(
        ("hsj", "hsja", "hopskipjump"), "hopskipjump-l2"
    ),  # of which the paper and foolbox speak first
    "hsjlinf": "hopskipjump-linf",
    "hsjl2": "hopskipjump-l2",
    **{
        f"{norm}{name}": f"{name}-{norm}"
        for name in ("deepfool", "fmn", "hopskipjump")
        for norm in ("l2", "linf", "l1", "l0")
    },
}
NEAREST_HERE = {
    "deepfool": ("deepfool-l2",),
    "fmn": ("fmn-l2",),
    **dict.fromkeys(("bim", "ifgsm"), ("pgd10",)),
    "autopgd": ("apgd-ce",),
}


def attack_name(name: str, models: dict[str, ThreatModel]) -> str:
    """The attack or group of `models` that `name` means; see `attack_among`."""
    return attack_among(
        name, (found for model in models.values() for found in (*model.attacks, *model.groups))
    )


def attack_among(name: str, known: Iterable[str], kind: str = "attack") -> str:
    """The one of `known` (attacks, groups, labels of a run, "clean") that `name` means, as in "AutoAttack", "PGD-20",
    "fgsm_linf@8/255", "natural"; `UserError` with suggestions for one that is none, or could be several ("pgd")."""
    choices = set(known)
    base, at, budget = name.partition("@")  # a budget is never read in another way: 0.1 is not 01
    if name in choices:
        return name
    same_budget = [found for found in choices if found.partition("@")[1:] == (at, budget)]
    plain = folded(base).replace("autoattack", "aa").removesuffix("attack").removesuffix("linf")
    for shape in (folded(base), ALSO_CALLED.get(folded(base)), plain, ALSO_CALLED.get(plain)):
        meant = folded(shape or "")
        if alike := [found for found in same_budget if folded(found.partition("@")[0]) == meant]:
            return known_name(kind, alike[0] if len(alike) == 1 else name, alike)
    raise unknown_name(kind, name, choices, near=NEAREST_HERE.get(plain, ()))


def without_clean(names: Iterable[str]) -> list[str]:
    """`names` without "clean", "natural" and the like: every table has it, and asking for it is no mistake.
    `UserError` where nothing else is asked for."""
    given = list(names)
    kept = [name for name in given if ALSO_CALLED.get(folded(name), folded(name)) != "clean"]
    if given and not kept:
        raise UserError(
            f"{spell_argument('attacks', ','.join(given))}: {CLEAN_IS_THERE}; name one to go with it, as in fgsm"
        )
    return kept
