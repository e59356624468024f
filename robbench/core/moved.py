"""Old names of modules, which import the module under its present name with a warning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_ROOMS = {
    "core": "allocator budget_limits device errors foreign locks npz numerals places precision random registry "
    "resources schema spreadsheet stops terminal threads",
    "store": "matrix.folder matrix.frechet_records matrix.garbage matrix.ledger matrix.merged matrix.record_files "
    "matrix.records matrix.shards",
    "run": "matrix.cells matrix.executor matrix.frechet matrix.plan matrix.progress matrix.ray_backend "
    "matrix.shard_work matrix.watch metrics.features metrics.flow_samples",
    "statistics": "metrics.paired metrics.perturbation",
    "results": "publish.corruptions publish.likelihood publish.pairs publish.parity publish.perturbation publish.rows "
    "publish.tables publish.wording",
    "report": "publish.badge publish.mlflow_export publish.terminal publish.writers",
    "experiments": "published",
    "attacks.search": "attacks.active attacks.engine attacks.geometry attacks.geometry_l1 attacks.spaces",
    "attacks.autoattack": "attacks.apgd attacks.fab attacks.square",
    "attacks.trust": "attacks.audit attacks.preflight attacks.suspicions",
    "models.libraries": "models.onnx models.robustbench models.timm models.torchvision",
}
MOVED = {
    f"robbench.{old}": f"robbench.{room}.{old.rpartition('.')[2]}"
    for room, names in _ROOMS.items()
    for old in names.split()
} | {"robbench.matrix.session": "robbench.cli.run"}
_PACKAGES = {old.rpartition(".")[0] for old in MOVED} - {"robbench", "robbench.attacks", "robbench.models"}


class _Moved(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`, and their former packages."""

    _real: ModuleSpec | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname in _PACKAGES
        return spec_from_loader(fullname, self, is_package=package) if package or fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.name not in MOVED:
            return None
        new = MOVED[spec.name]
        self._real = import_module(
            new
        ).__spec__  # the import system puts the spec of the old name in its place
        warnings.warn(
            f"{spec.name} is {new} now; the old name goes with the next version", DeprecationWarning, 2
        )
        return import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; it was executed under its own name."""
        if module.__name__ not in _PACKAGES:
            module.__spec__ = self._real


def follow_moves() -> None:
    """Make imports of old names work, after all other finders, so that no existing module is hidden."""
    sys.meta_path.append(_Moved())
