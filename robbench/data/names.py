"""Names of the built-in data sets, importable without torch."""

BUILT_IN = ("cifar10", "cifar100", "digits", "fashionmnist", "mnist", "stl10", "svhn")


def dataset_names() -> list[str]:
    """Built-in data sets and those of installed packages (entry points `robbench.datasets`), sorted."""
    from importlib.metadata import entry_points

    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="robbench.datasets"))})
