"""Rolling a whole run out on the linearised network, with the true loss and without network passes (T14, T15)."""

from stabkit.rollout.result import SCORE_CAP, LossScale, Rollout, loss_scale
from stabkit.rollout.roll import rollout
from stabkit.rollout.sets import players_of

__all__ = ["SCORE_CAP", "LossScale", "Rollout", "loss_scale", "players_of", "rollout"]
