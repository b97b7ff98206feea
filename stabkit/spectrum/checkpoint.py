"""The state of a long eigenvalue run in one file, so that a killed run loses a few products and no more."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stabkit.curvature.operators import CurvatureOperator
from stabkit.spectrum._common import product

FORMAT = "stabkit krylov state 1"


class Checkpoint:
    """An `.npz` file of plain arrays beside the settings and the operator they belong to. No pickle is written or read."""

    def __init__(
        self, path: str | Path, operator: CurvatureOperator, settings: Mapping[str, object], *, owner: str
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"`checkpoint` of `{owner}` must be a path or None; got {path!r}.")
        self._path = Path(path)
        self._operator = operator
        self._owner = owner
        self._identity = {"format": FORMAT, "order": operator.shape[0], "dtype": str(operator.dtype), **settings}
        if not self._path.parent.is_dir():
            raise ValueError(
                f"`checkpoint` of `{owner}` must lie in an existing directory; got {os.fspath(path)!r}. Create "
                f"{os.fspath(self._path.parent)!r} first."
            )

    def save(self, state: dict[str, np.ndarray]) -> None:
        """Write the state: to a file beside, which then takes the name, so that a kill leaves the old one or the new one.

        Args:
            state: Arrays of the solver; `image` is the operator's product with the start vector.
        """
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, identity=np.array(json.dumps(self._identity)), **state)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def load(self, start: Tensor) -> dict[str, np.ndarray] | None:
        """Read the state, if there is one.

        Args:
            start: The start vector, shape (d, 1), whose image the file must hold.

        Returns:
            The arrays; None where no file exists. Cost: one product.

        Raises:
            ValueError: If the file is unreadable, or of another operator or other settings.
        """
        if not self._path.exists():
            return None
        name = os.fspath(self._path)
        try:
            with np.load(self._path, allow_pickle=False) as file:
                state = dict(file)
            identity = json.loads(str(state.pop("identity")))
            image = torch.as_tensor(state["image"])
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`checkpoint` of `{self._owner}` must be a file that it wrote; got {name!r}, which cannot be read "
                f"({type(error).__name__}: {error}). Delete it, or name another."
            ) from error
        for key, ours in self._identity.items():
            if identity.get(key) != ours:
                raise ValueError(
                    f"`checkpoint` of `{self._owner}` must belong to the same operator and settings; got {name!r} "
                    f"with {key} {identity.get(key)!r}, not {ours!r}. Name another file, or delete this one to begin anew."
                )
        fresh = product(self._operator, start, owner=self._owner).cpu()
        # The file's image came from a product with more vectors at once, which rounds otherwise.
        allowed = torch.finfo(fresh.dtype).eps ** 0.5 * float(fresh.norm())
        difference = float((fresh - image).norm())
        if difference > allowed:
            raise ValueError(
                f"`checkpoint` of `{self._owner}` must belong to the same operator; got {name!r}, whose product with the "
                f"start vector differs by {difference:.3g} where {allowed:.3g} is rounding. Are model and data the same? "
                "Name another file, or delete this one to begin anew."
            )
        return state
