"""How one arm with one seed is run: trained, attacked, explained, and written down."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_saliency import __version__, _checks
from art_saliency.attacks import pgd
from art_saliency.data import DataSet, load_data, to_unit
from art_saliency.evaluation.audit import audit
from art_saliency.evaluation.autoattack import autoattack
from art_saliency.evaluation.saliency import map_metrics, mean_and_error
from art_saliency.evaluation.saliency_maps import named_maps
from art_saliency.evaluation.summary import summarise
from art_saliency.evaluation.transfer import transfer
from art_saliency.files import write_file
from art_saliency.methods.fsr import FSRLayer, mask_share_inside
from art_saliency.randomness import RandomSource
from art_saliency.threat import ThreatModel
from art_saliency.trainers.arms import Budget, Trained, cost_of, one_step, train_arm
from art_saliency.trainers.methods import TRAINERS
from art_saliency.training.records import versions
from benchmarking.grids import GRIDS, Contestant, Grid, contestant

__all__ = ["SCHEMA", "file_of", "method_of", "run_one", "settings_of", "stands"]

SCHEMA = 1
_EXPLAINED = 100
_SHOWN = 8
_SURROGATES = ("standard", "pgd-at")
_SURROGATE_SEED = 1000
_CPU = torch.device("cpu")


def file_of(folder: Path, grid: str, name: str, seed: int) -> Path:
    """:return: Where the run stands."""
    return folder / grid / f"{_plain(name)}-seed{seed}.json"


def _plain(name: str) -> str:
    return name.replace(":", "_").replace("=", "").replace(" ", "-").replace("@", "-")


def settings_of(grid: Grid, entry: Contestant, seed: int) -> dict[str, Any]:
    """:return: All that a run depends on beside versions and hardware, JSON-able: a stored run with other settings is run again."""
    left_out = (
        "arms",
        "title",
        "seeds",
        "headline_seeds",
        "audited",
        "data_sha256",
        "of_file",
        *(() if grid.held_out else ("held_out",)),
    )
    shared = {k: v for k, v in asdict(grid).items() if k not in left_out}
    return json.loads(json.dumps({**shared, "arm": asdict(entry.arm), "seed": seed, "data": grid.data or "a file"}))


def method_of(grid: Grid, entry: Contestant) -> dict[str, Any]:
    """:return: What the arm's method is set to now, defaults included, JSON-able: a stored run whose method is set otherwise is run again."""
    given = {**entry.arm.parameters, "eps": grid.eps, "norm": "Linf"}
    objective = TRAINERS[entry.arm.trainer].objective_for(given)
    made = objective(**{name: value for name, value in given.items() if name in objective.parameter_names()})
    own = signature(TRAINERS[entry.arm.trainer]).parameters.values()
    layer = {p.name: given.get(p.name, p.default) for p in own if isinstance(p.default, (bool, int, float))}
    return json.loads(json.dumps({**layer, **made.config()}))


def stands(page: Mapping[str, Any]) -> bool:
    """:return: Whether a stored run is one of its grid as grid and methods are now."""
    grid = GRIDS[page["grid"]]
    entry = contestant(page["arm"], grid)
    if page["schema"] != SCHEMA or page["settings"] != settings_of(grid, entry, page["seed"]):
        return False
    if page["data_sha256"] != grid.data_sha256:
        return False
    # A parameter that is newer than the run does at its default what was done before there was one.
    return all(page["method"].get(name, value) == value for name, value in method_of(grid, entry).items())


def run_one(
    grid_name: str,
    name: str,
    seed: int,
    data: DataSet,
    out: Path,
    *,
    device: torch.device = _CPU,
    checkpoints: Path | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """
    Train one arm with one seed and learn what it is worth.

    :param data: The grid's, whole. :param out: The folder of results; one file is written into it, at the end.
    :param device: Where it is trained and attacked; on a GPU by kernels whose results repeat.
    :param checkpoints: Where trainings are kept, one folder each, and gone on with; ``None`` trains from the beginning.
    :return: What is in the file.
    """
    grid = GRIDS[grid_name]
    entry, budget = contestant(name, grid), _budget(grid, data, seed, quiet, device)
    trained = _trained(grid_name, entry, budget, checkpoints)
    model = trained.trainer.get_classifier().model
    page = {
        "schema": SCHEMA,
        "grid": grid_name,
        "arm": name,
        "seed": seed,
        "command": f"python examples/benchmark.py run {grid_name}{'' if grid.data else ' --data FILE'} --arms '{name}' --seeds {seed}",
        "settings": settings_of(grid, entry, seed),
        "method": trained.trainer.config(),
        "data_sha256": data.fingerprint(),
        "versions": {**versions(), "art-saliency": __version__},
        "commit": _COMMIT,
        "hardware": {
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),  # results of other kernels differ in their last bits
            "threads": torch.get_num_threads(),
            "device": str(budget.device),
        },
        "history": {key: trained.trainer.history.column(key) for key in trained.trainer.history[-1]},
        "cost": cost_of(trained, budget),
        **_judged(
            model,
            trained,
            budget,
            surrogates=_surrogates(grid_name, budget.data, seed, checkpoints, device),
            audited=grid.audited if seed == 0 else 0,
        ),
    }
    path = file_of(out, grid_name, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(json.dumps(page, indent=1).encode()))
    return page


def recounted(grid_name: str, name: str, data: DataSet) -> float:
    """:return: The forward-backward passes of an arm's step, counted after one step: they depend on no weight."""
    entry, budget = contestant(name, GRIDS[grid_name]), _budget(GRIDS[grid_name], data, seed=0)
    return cost_of(one_step(entry.arm, budget, entry.prepare), budget)["passes_per_step"]


def _budget(grid: Grid, data: DataSet, seed: int, quiet: bool = True, device: torch.device = _CPU) -> Budget:
    (x, y), judged = (data.x_train, data.y_train), (data.x_test, data.y_test)
    if grid.held_out:
        (x, y), judged = data.split(grid.held_out, seed=0)
    count = grid.train_images
    return Budget(
        data=replace(data, x_train=x[:count], y_train=y[:count], x_test=judged[0], y_test=judged[1]),
        spec={},
        network={**grid.network, "num_classes": data.num_classes, "input_shape": list(data.input_shape)},
        threat=ThreatModel("Linf", grid.eps),
        epochs=grid.epochs,
        batch_size=grid.batch_size,
        lr=grid.lr,
        images=min(grid.images, len(judged[1])),
        seed=seed,
        device=device,
        quiet=quiet,
        augment=grid.augment,
    )


def _trained(grid: str, entry: Contestant, budget: Budget, checkpoints: Path | None) -> Trained:
    kept = None if checkpoints is None else checkpoints / grid / f"{_plain(entry.name)}-seed{budget.seed}"
    repeated = {"deterministic": True} if budget.device.type == "cuda" else {}
    return train_arm(entry.arm, budget, prepare=entry.prepare, checkpoint_dir=kept, **repeated)


def _judged(
    model: nn.Module, trained: Trained, budget: Budget, *, surrogates: Mapping[str, nn.Module], audited: int
) -> dict[str, Any]:
    data, threat, seed = budget.data, budget.threat, budget.seed
    x, y = to_unit(data.x_test[: budget.images]).to(budget.device), data.y_test[: budget.images].to(budget.device)
    summary = summarise(model, x, y, threat=threat, seed=seed, progress=False)
    transferred = transfer(model, x, y, surrogates=surrogates, threat=threat, seed=seed)
    found: dict[str, Any] = {
        **summary.to_json(),
        "transfer": _short(transferred.to_json()),
        "withstood": {"autoattack": _bits(summary.autoattack.correct), "transfer": _bits(transferred.correct)},
        "saliency": _explained(model, x[:_EXPLAINED], y[:_EXPLAINED], threat),
        "maps": _packed(named_maps(0)["loss-gradient"](model, x[:_SHOWN], y[:_SHOWN])),
    }
    if any(isinstance(module, FSRLayer) for module in model.modules()):
        found["mask_share_inside"] = mask_share_inside(model, x)
    if audited:
        some = slice(0, audited)
        attacked = summary.autoattack
        if audited < len(x):
            attacked = autoattack(model, x[some], y[some], eps=threat.eps, seed=seed, progress=False)
        report = audit(
            model,
            x[some],
            y[some],
            eps=threat.eps,
            autoattack_result=attacked,
            transferred=transferred.correct[some],
            variants=trained.trainer.objective.adaptive_variants(),
            progress=False,
        )
        found["audit"] = {
            "verdict": report.verdict,
            "reasons": report.reasons,
            "images": report.count,
            "checks": [{"name": c.name, "status": c.status, "figure": c.figure} for c in report.checks],
        }
    return found


def _explained(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> dict[str, Any]:
    """Metrics of loss-gradient maps of clean images and of their PGD-20 versions: mean and standard error."""
    explain = named_maps(0)["loss-gradient"]
    x_adv = pgd(model, x, y, threat=threat, max_iter=20, random=RandomSource(0, x.device))
    values = map_metrics(model, x, y, explain(model, x, y), explain(model, x_adv, y))
    return {name: mean_and_error(value) for name, value in values.items()}


def _packed(maps: Tensor) -> dict[str, Any]:
    """Maps (N, 1, H, W), each scaled to its own maximum, as bytes in text: a figure of all arms is drawn from files alone."""
    size = maps.abs().sum(1)
    size = size / size.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
    data = (255 * size).round().to(torch.uint8).cpu().numpy().tobytes()
    return {"shape": list(size.shape), "base64": base64.b64encode(data).decode()}


def _bits(correct: Tensor) -> str:
    """:return: One digit an image, 1 where it withstood: two arms can be compared image by image."""
    return "".join("1" if right else "0" for right in correct.tolist())


def _short(page: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("accuracy", "interval_95", "count", "surrogates", "attacks", "max_iter", "eps_step", "surrogates_sha256")
    rows = [[row["surrogate"], row["attack"], row["accuracy"]] for row in page["rows"]]
    return {**{name: page[name] for name in kept}, "rows": rows}


def _surrogates(
    grid_name: str, data: DataSet, seed: int, checkpoints: Path | None, device: torch.device
) -> dict[str, nn.Module]:
    """
    A standard and a PGD-AT network of the same grid, from a seed that no arm has; trained once a seed.

    :param data: What the arms were trained and are judged on. Where images were held out of it, as many of the rest are again: every run
        of a grid meets the same pair.
    """
    grid = GRIDS[grid_name]
    key = (json.dumps(asdict(grid)), seed, str(device))
    if key not in _KEPT:
        _KEPT.clear()
        budget = _budget(grid, data, _SURROGATE_SEED + seed, device=device)
        with _one_at_a_time(checkpoints):
            trained = {name: _trained(grid_name, contestant(name, grid), budget, checkpoints) for name in _SURROGATES}
        _KEPT[key] = {name: those.trainer.get_classifier().model for name, those in trained.items()}
    return _KEPT[key]


@contextlib.contextmanager
def _one_at_a_time(folder: Path | None) -> Iterator[None]:
    """Several processes want the same surrogates: the first trains them and the others wait, to read what it kept."""
    if folder is None or sys.platform == "win32":
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "surrogates.lock").open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


_KEPT: dict[tuple[str, int, str], dict[str, nn.Module]] = {}
"""The surrogates of the seed that is being run."""


def read_data(grid: Grid, given: str | None, root: str | None = None) -> DataSet:
    """:return: The grid's own data, or the file that is given. :raises InputError: When that is of anything else."""
    if not (given or grid.data):
        raise _checks.refuse("--data", "nothing", f"the file of {grid.title}")
    data = load_data(given or grid.data, root=root)
    expected = f"the images and labels of {grid.title} ({grid.data_sha256[:12]}...)"
    if grid.of_file is not None:
        train, test = grid.of_file
        expected = f"a file of which the first {train} training and {test} test images are {expected}"
        data = replace(
            data,
            x_train=data.x_train[:train],
            y_train=data.y_train[:train],
            x_test=data.x_test[:test],
            y_test=data.y_test[:test],
        )
    if (found := data.fingerprint()) != grid.data_sha256:
        got = f"{given or grid.data}, whose fingerprint is {found[:12]}..."
        raise _checks.refuse("--data", got, expected)
    return data


def _commit() -> str | None:
    """The project's commit, where there is one; "+" when files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "../../art_saliency") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


_COMMIT = _commit()  # of the code as it was loaded


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return (
            next(line.split(":")[1].strip() for line in lines if line.startswith("model name")) + f" x {os.cpu_count()}"
        )
    except (OSError, StopIteration):
        return platform.processor()
