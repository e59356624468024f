"""AutoAttack: APGD, FAB and Square, the standard ensemble, and the reference package as an attack."""
