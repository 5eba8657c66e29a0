"""What a run's folder takes on the disk: of every stage, of checkpoints, and how much of it is there already."""

from dataclasses import dataclass
from pathlib import Path

from llamaq.config import Config
from llamaq.model.shape import Shape
from llamaq.runs.files import bytes_in
from llamaq.runs.manifest import CHECKPOINTS, MANIFEST
from llamaq.spinquant.candidates import candidates_of

GIB = 2**30
CODES, PTE = 1.4, 1.1  # bytes a weight in Meta's layout (a code a byte, the embedding twice) and in a .pte


@dataclass
class Disk:
    """Bytes of a run's folder."""

    whole: float  # that the whole run takes, checkpoints at their most
    held: float  # that its stages and checkpoints hold
    needed: float  # that are still to be written
    superseded: float  # of replaced folders, which nothing reads

    def __str__(self) -> str:
        there = [f"the whole run takes {self.whole / GIB:.2f}, it holds {self.held / GIB:.2f}"] * (self.held > 0)
        old = [f"superseded/ holds {self.superseded / GIB:.2f} and can be deleted"] * (self.superseded > 0)
        return "; ".join(there + old)


def stage_files(shape: Shape, c: Config) -> dict[str, float]:
    """Return the bytes that each stage leaves, by its name; stages that leave only numbers are not in it."""
    latent, adapters = 4.0 * shape.weights, 4.0 * shape.adapters_per_rank * c.adapters.rank
    start = {"base": 2.0 * shape.weights} if c.base else {}
    if c.qat is None:
        statistics = 12.0 * shape.layers * shape.dim**2  # float32 second moments of three sites a layer
        names = [k.stage for k in candidates_of(c.section("spinquant"), c.seed)] if c.spinquant else []
        made = {"calibrate": statistics} | dict.fromkeys([*names, "spinquant"], CODES * shape.weights)
    else:
        made = {"qat": latent, "qat_lora": adapters, "qat_dpo": latent + adapters, "convert": CODES * shape.weights}
        made |= {"control_qat": latent, "control_lora": adapters} if c.evaluate.control else {}
    return start | made | {"export": (PTE + CODES * len(c.export.adapters)) * shape.weights}


def stage_checkpoints(shape: Shape, c: Config) -> dict[str, float]:
    """Return the bytes of checkpoints that each training stage holds at its most: one is written before one goes.

    A checkpoint is float32 weights and Adam's two moments: 14 GiB for 1B.
    """
    adapters = float(shape.adapters_per_rank * c.adapters.rank)
    trained = {"base": shape.weights, "qat": shape.weights, "qat_lora": adapters, "qat_dpo": shape.weights + adapters}
    kept = {name: getattr(c, name).keep_checkpoints + 1 for name in trained if getattr(c, name) is not None}
    most = {name: 12.0 * trained[name] * count for name, count in kept.items()}
    control = {"control_qat": most.get("qat", 0.0), "control_lora": most.get("qat_lora", 0.0)}
    return most | (control if c.evaluate.control else {})


def disk_bytes(shape: Shape, c: Config) -> float:
    """Return the bytes of a whole run's folder: what its stages leave, and the checkpoints of one stage at a time."""
    return sum(stage_files(shape, c).values()) + max(stage_checkpoints(shape, c).values(), default=0.0)


def disk_of(shape: Shape, c: Config) -> Disk:
    """Return what a run takes, what its folder holds of that, and what is still to be written.

    Finished stages need no more. What an unfinished one has written counts, and so do checkpoints, which are deleted as
    their stage finishes. A finished stage that will run again because a setting changed is not foreseen.
    """
    folder, seen = Path(c.output_dir), set()
    unfinished = {s: size for s, size in stage_checkpoints(shape, c).items() if not _is_finished(folder / s)}
    checkpoints = sum(bytes_in(folder / f"{s}.partial" / CHECKPOINTS, seen) for s in unfinished)
    held, needed = checkpoints, max(0.0, max(unfinished.values(), default=0.0) - checkpoints)
    for stage, size in stage_files(shape, c).items():
        there = bytes_in(folder / stage, seen) + bytes_in(folder / f"{stage}.partial", seen)
        held += there
        needed += 0.0 if _is_finished(folder / stage) else max(0.0, size - there)
    return Disk(disk_bytes(shape, c), held, needed, bytes_in(folder / "superseded", seen))


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()
