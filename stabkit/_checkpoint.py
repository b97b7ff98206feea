"""The state of a long computation in one file, so that a killed run loses a little and no more."""

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

State = dict[str, np.ndarray]


class Checkpoint:
    """An `.npz` file of plain arrays beside the settings they belong to. No pickle is written or read."""

    def __init__(self, path: str | Path, kind: str, settings: Mapping[str, object], *, owner: str) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"`checkpoint` of `{owner}` must be a path or None; got {path!r}.")
        self._path = Path(path)
        self._owner = owner
        self._identity = {"format": f"stabkit {kind} state 2", **settings}
        if not self._path.parent.is_dir():
            raise ValueError(
                f"`checkpoint` of `{owner}` must lie in an existing directory; got {os.fspath(path)!r}. Create "
                f"{os.fspath(self._path.parent)!r} first."
            )

    def save(self, state: State) -> None:
        """Write the state: to a file beside, which then takes the name, so that a kill leaves the old one or the new one.

        Args:
            state: Arrays by name.
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

    def load(self) -> State | None:
        """Read the state, if there is one.

        Returns:
            The arrays; None where no file exists.

        Raises:
            ValueError: If the file is unreadable or of other settings.
        """
        if not self._path.exists():
            return None
        name = os.fspath(self._path)
        try:
            with np.load(self._path, allow_pickle=False) as file:
                state = dict(file)
            identity = json.loads(str(state.pop("identity")))
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`checkpoint` of `{self._owner}` must be a file that it wrote; got {name!r}, which cannot be read "
                f"({type(error).__name__}: {error}). Delete it, or name another."
            ) from error
        for key, ours in self._identity.items():
            theirs = identity.get(key)
            if theirs != ours:
                if isinstance(theirs, dict) and isinstance(ours, dict):  # say what differs, and not all that does not
                    names = [k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k)]
                    theirs, ours = ({k: side.get(k) for k in sorted(names)} for side in (theirs, ours))
                raise ValueError(
                    f"`checkpoint` of `{self._owner}` must belong to the same computation and settings; got {name!r} "
                    f"with {key} {theirs!r}, not {ours!r}. Name another file, or delete this one to begin anew."
                )
        return state

    def recognise(self, saved: np.ndarray, fresh: Tensor, *, what: str, exact: bool = False) -> None:
        """Refuse a state of another operator, by something that every run computes.

        Args:
            saved: The file's.
            fresh: This run's.
            what: What it is, for the message.
            exact: Whether every bit counts; otherwise differences on the level of the root of rounding do not, as other
                batches and devices round otherwise.

        Raises:
            ValueError: If they differ.
        """
        ours = fresh.double().cpu()
        theirs = torch.as_tensor(saved).double()
        same_shape = theirs.shape == ours.shape
        difference = float((theirs - ours).norm()) if same_shape else float("inf")
        allowed = 0.0 if exact else torch.finfo(fresh.dtype).eps ** 0.5 * float(ours.norm())
        if not difference <= allowed:
            raise ValueError(
                f"`checkpoint` of `{self._owner}` must belong to the same computation; got {os.fspath(self._path)!r}, whose "
                f"{what} differs by {difference:.3g} where {allowed:.3g} is rounding. Are model and data the same? Name "
                "another file, or delete this one to begin anew."
            )
