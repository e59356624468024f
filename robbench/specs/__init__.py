"""Threat models and attacks: their schemas, their names, and how an attack is resolved for a data set.

No torch here: listing attacks and models stays fast.
"""

from robbench.specs.names import CLEAN_IS_THERE as CLEAN_IS_THERE
from robbench.specs.names import attack_among as attack_among
from robbench.specs.names import attack_name as attack_name
from robbench.specs.names import expand_groups as expand_groups
from robbench.specs.names import listed_attacks as listed_attacks
from robbench.specs.names import without_clean as without_clean
from robbench.specs.resolve import from_surrogate as from_surrogate
from robbench.specs.resolve import importance_weighted as importance_weighted
from robbench.specs.resolve import refuse_unused_budgets as refuse_unused_budgets
from robbench.specs.resolve import resolve_attack as resolve_attack
from robbench.specs.resolved import TRANSFER as TRANSFER
from robbench.specs.resolved import ResolvedAttack as ResolvedAttack
from robbench.specs.resolved import Threat as Threat
from robbench.specs.schema import ATTACKED_BY as ATTACKED_BY
from robbench.specs.schema import SHA256 as SHA256
from robbench.specs.schema import AttackSpec as AttackSpec
from robbench.specs.schema import BestTrained as BestTrained
from robbench.specs.schema import Measure as Measure
from robbench.specs.schema import ModelKind as ModelKind
from robbench.specs.schema import Name as Name
from robbench.specs.schema import Norm as Norm
from robbench.specs.schema import Semantics as Semantics
from robbench.specs.schema import Space as Space
from robbench.specs.schema import ThreatModel as ThreatModel
from robbench.specs.schema import threat_models as threat_models
