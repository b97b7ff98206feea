"""The loss behind a name or a callable."""

from stabkit._validate import check_choice
from stabkit.losses.base import NAMED, Loss, PerSampleLoss
from stabkit.losses.cross_entropy import CrossEntropy
from stabkit.losses.custom import CustomLoss
from stabkit.losses.squared import SquaredError


def resolve_loss(loss: str | PerSampleLoss | Loss) -> Loss:
    """The loss object behind a name, a callable or a loss object.

    Args:
        loss: "cross_entropy", "causal_lm", "mse", a callable (outputs, targets) -> losses of shape (m,), or a `Loss`.

    Returns:
        The loss object.

    Raises:
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type):
        raise TypeError(
            f"`loss` must be a callable giving per-sample losses; got the class {loss.__name__}. Pass an instance, such as "
            f"{loss.__name__}(reduction='none')."
        )
    if callable(loss):
        return CustomLoss(loss)
    if not isinstance(loss, str):
        raise TypeError(
            f"`loss` must be 'cross_entropy', 'causal_lm', 'mse' or a callable giving per-sample losses; got {loss!r}."
        )
    remedy = "A callable giving per-sample losses is taken too."
    check_choice(loss, name="loss", owner="UnlearningProblem", choices=NAMED, remedy=remedy)
    return SquaredError() if loss == "mse" else CrossEntropy(shift=loss == "causal_lm")
