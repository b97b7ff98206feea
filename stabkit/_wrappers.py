"""Models without what torch.compile, DataParallel and DistributedDataParallel put around them or their parts."""

from collections.abc import Iterator

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without torch.compile, DataParallel and DistributedDataParallel around it.

    Args:
        model: A module.

    Returns:
        The innermost one, itself and not a copy.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def plain_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules(remove_duplicate=False)`, without wrappers at any depth.

    Args:
        model: A module.
        prefix: What its name begins with.

    Yields:
        Names, as they are in `plain_copy`, and modules, each as often as it stands in the model.
    """
    model = unwrapped(model)
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{prefix}.{name}" if prefix else name)


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have in `plain_copy`.

    Args:
        model: A module.

    Returns:
        The model's own, each under its first name, in order.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in plain_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{prefix}.{name}" if prefix else name, parameter))
    return dict(found.values())
