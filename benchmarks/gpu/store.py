"""What the jobs leave in a folder: a result each, predictions in files of their own, weights without pickle.

A file that is there is not made again. Everything is written whole or not at all, so that a call that was cut off
costs no more than the job it was at. Predictions are written, with their time, before the first run that they are
about; runs read them from that file and note its SHA-256.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import stabkit
from stabkit._serialise import dumps, to_plain, write_atomically

SCHEMA = 1
GATHERED = (("jobs", "results"), ("predictions", "predictions"), ("failures", "failures"))
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "curvlinops-for-pytorch", "weightwatcher")


class Store:
    """A folder of results of one scale on one kind of device.

    Attributes:
        folder: The folder.
        scale: "full", "reduced" or "small"; a folder holds one of them.
        device: Where the jobs compute; a folder holds results of one kind, as "cpu" or "cuda", of whichever GPUs.
        beside: Jobs that may be at work at the same time, on the same device.

    What was gathered in a few files is taken up, unless `gathered` is False, as in a process that another one has begun.
    """

    def __init__(
        self, folder: str | Path, scale: str, device: torch.device, *, beside: int = 1, gathered: bool = True
    ) -> None:
        self.folder, self.scale, self.device, self.beside = Path(folder), scale, device, beside
        for name in ("jobs", "failures", "predictions", "weights"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if gathered:
            self._unpack()
        for path in sorted((self.folder / "jobs").glob("*.json"))[:1]:
            entry, here = json.loads(path.read_text(encoding="utf-8")), os.fspath(self.folder)
            if entry["scale"] != scale:
                raise ValueError(
                    f"{here!r} holds results of scale {entry['scale']!r}; got {scale!r}. "
                    f"Give another folder, or --scale {entry['scale']}."
                )
            kind = device_kind(entry["device"])
            if kind != device.type:
                raise ValueError(
                    f"{here!r} holds results of device {kind!r} ({entry['device']}); got {device.type!r}, whose seconds and "
                    f"rounding are others. Give another folder, or --device {kind}."
                )

    # ------------------------------------------------------------------ results

    def done(self, job: str) -> bool:
        """Whether a job has left its result."""
        return self._job(job).exists()

    def ready(self, job: str) -> bool:
        """Whether it has left its result and, if it trains a network, that one is still there."""
        return self.done(job) and (self.result(job)["result"]["kind"] != "training" or self._weights(job).exists())

    def failed(self, job: str) -> bool:
        """Whether it has left an error instead."""
        return self._failure(job).exists()

    def result(self, job: str) -> dict[str, Any]:
        """A job's result, with what surrounds it."""
        return json.loads(self._job(job).read_text(encoding="utf-8"))

    def write(self, job: str, content: dict[str, Any], *, started: str, seconds: float, minutes: float) -> Path:
        """Write a job's result and forget an earlier failure of it.

        Args:
            job: The job.
            content: Plain values.
            started: When it began.
            seconds: How long it took.
            minutes: How long it had been estimated to take.

        Returns:
            The file.
        """
        self._failure(job).unlink(missing_ok=True)
        around = {"started": started, "finished": now(), "seconds": seconds, "estimated_minutes": minutes}
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        plain = {**self._header(job), **around, "peak_device_bytes": peak, "result": content}
        return write_atomically(self._job(job), dumps(to_plain(plain)) + "\n")

    def write_failure(self, job: str, text: str) -> None:
        """Note an error, so that a later call does not run into it again."""
        write_atomically(self._failure(job), dumps({**self._header(job), "finished": now(), "error": text}) + "\n")

    def pace(self) -> float:
        """How much longer than estimated the jobs so far took, in all; 1 where they were quicker."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in (self.folder / "jobs").glob("*.json")]
        estimated = 60 * sum(entry["estimated_minutes"] for entry in found)
        return max(1.0, sum(entry["seconds"] for entry in found) / estimated) if estimated else 1.0

    def pack(self) -> None:
        """Gather what the jobs left in a few small files: results.json, predictions.json and, if there are any, failures."""
        for kind, name in GATHERED:
            found = {
                path.stem: json.loads(path.read_text(encoding="utf-8"))
                for path in sorted((self.folder / kind).glob("*.json"))
            }
            path = self.folder / f"{name}.json"
            if found or kind == "jobs":
                lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]
                write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")  # a job a line
            else:
                path.unlink(missing_ok=True)

    def _unpack(self) -> None:
        """Take up what `pack` gathered where the files it was gathered from are gone."""
        for kind, name in GATHERED:
            path = self.folder / f"{name}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            for key, value in found.items():
                place = self.folder / kind / f"{key}.json"
                # A prediction that no run followed is made anew: the network that it was about may be lost. What was done
                # since has not failed.
                wanted = {"jobs": True, "predictions": self.done(key), "failures": not self.done(key)}[kind]
                if wanted and not place.exists():
                    # Predictions in the very text that was hashed.
                    write_atomically(place, canonical(value) if kind == "predictions" else dumps(value) + "\n")

    # ------------------------------------------------------------------ predictions

    def predicted(
        self, job: str, weights: str, make: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What was predicted for a job, read from its file, which is made if it is not there, or of another network.

        Args:
            job: The job.
            weights: What the network was kept as that they are about; its SHA-256 is written down with them.
            make: Makes the predictions.

        Returns:
            The predictions and their mark: the file's name, its SHA-256 and when it was made.
        """
        path, network = self.folder / "predictions" / f"{job}.json", self.weights_sha256(weights)
        if not path.exists() or json.loads(path.read_text(encoding="utf-8")).get("network") != network:
            predictions = make()
            around = {"job": job, "scale": self.scale, "device": device_name(self.device), "made": now()}
            around["network"] = network
            write_atomically(path, canonical({**around, "predictions": predictions}))
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text)
        return plain["predictions"], {"file": path.name, "sha256": sha256(text), "made": plain["made"]}

    # ------------------------------------------------------------------ weights

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Keep a model's parameters and buffers as plain arrays."""
        arrays = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
        handle, temporary = tempfile.mkstemp(dir=self._weights(name).parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, self._weights(name))

    def weights_sha256(self, name: str) -> str:
        """SHA-256 over names and values of what was kept."""
        found = hashlib.sha256()
        with np.load(self._weights(name), allow_pickle=False) as arrays:
            for key in sorted(arrays.files):
                found.update(key.encode())
                found.update(np.ascontiguousarray(arrays[key]).tobytes())
        return found.hexdigest()

    def load_weights(self, name: str, model: nn.Module) -> nn.Module:
        """Put them into a model of the same architecture.

        Args:
            name: What they were kept as.
            model: The model, which is changed.

        Returns:
            The model, in eval mode, on the device.
        """
        with np.load(self._weights(name), allow_pickle=False) as arrays:
            model.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays.files})
        return model.to(self.device).eval()

    # ------------------------------------------------------------------

    def _job(self, job: str) -> Path:
        return self.folder / "jobs" / f"{job}.json"

    def _failure(self, job: str) -> Path:
        return self.folder / "failures" / f"{job}.json"

    def _weights(self, name: str) -> Path:
        return self.folder / "weights" / f"{name}.npz"

    def _header(self, job: str) -> dict[str, Any]:
        """What every file says of where it comes from."""
        return {
            "schema": SCHEMA,
            "job": job,
            "scale": self.scale,
            "device": device_name(self.device),
            "arithmetic": arithmetic_now(),
            "threads": torch.get_num_threads(),
            "jobs_at_once": self.beside,
            "versions": versions(),
            "commit": commit(),
        }


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def canonical(plain: dict[str, Any]) -> str:
    """The text that predictions are hashed as; what was read from it gives it again."""
    return dumps(to_plain(plain)) + "\n"


def sha256(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def device_kind(name: str) -> str:
    """The kind of device that called itself so: "cpu", or "cuda" for whatever a GPU calls itself."""
    found = re.fullmatch(r"([a-z]+) \(.*\)", name)
    return found[1] if found else "cuda"


def versions() -> dict[str, str | None]:
    """Versions of what matters; None for what is not installed."""
    found: dict[str, str | None] = {"stabkit": stabkit.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@cache
def commit() -> str | None:
    """The commit that is run: the variable STABKIT_COMMIT where the code was carried elsewhere, or what git says."""
    told = os.environ.get("STABKIT_COMMIT")
    if told:
        return told
    here = ["git", "-C", os.fspath(Path(__file__).parent)]
    try:
        found, changes = (
            subprocess.run([*here, *asked], capture_output=True, text=True, check=True).stdout.strip()
            for asked in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found} and changes" if changes else found


def arithmetic_now() -> dict[str, str]:
    """How float32 is multiplied outside of predictions, which decide it for themselves."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        on = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
        return {name: "tf32" if value else "ieee" for name, value in on.items()}
    found = {"convolutions": torch.backends.cudnn.conv, "products": torch.backends.cuda.matmul}
    return {name: str(backend.fp32_precision) for name, backend in found.items()}


def wait(device: torch.device) -> None:
    """Until the device has done all it was given: work on it is asynchronous, and a clock must not be read before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """A result and the wall-clock seconds it took."""
    wait(device)
    start = time.perf_counter()
    result = function()
    wait(device)
    return result, time.perf_counter() - start
