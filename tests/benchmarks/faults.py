"""A fault campaign: runs that are killed, starved and confused at random moments, and run again until they end.

    python tests/benchmarks/faults.py --folder /tmp/faults                        60 faults; hours on two cores
    python tests/benchmarks/faults.py --folder /tmp/faults --kills 5 --lives qat --kinds SIGKILL SIGTERM      minutes

A life is one run of a small chain, of SpinQuant, or of the chain on two ranks. In each attempt one thing goes wrong, in
a stage drawn at random and up to three seconds after it began; then the same command is given again. After its share of
faults the life is left alone until it ends. What it converted has to equal, byte for byte, what an undisturbed run did.

    SIGTERM, SIGKILL   to the command, to all of its processes, or to one rank
    disk full          nothing more fits on the file system of output_dir (a small tmpfs; needs root)
    W&B gone           the server that the run logs to goes away in the middle
    clock jump         the clock goes a day forward or back, and a SIGTERM follows

Prints a table by kind of fault. Exits with 1 if a run was lost, or if one byte differs.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "runs")]

from conftest import SMALL  # noqa: E402
from wandb_server import KEY, Server, serving  # noqa: E402

from llamaq.runs.manifest import MANIFEST  # noqa: E402

KINDS = ("SIGTERM", "SIGKILL", "disk full", "W&B gone", "clock jump")
FAULTS_A_LIFE = 5
PATIENCE = 900.0  # seconds in which a command has to end
DISK = "48m"  # of the tmpfs of a life

QUICK = ["evaluate.control=false", "evaluate.speed=false", "evaluate.file_tokens=64"]
OF_CHAIN = [*SMALL, *QUICK, "evaluate.models=[bf16,final,final.pte]"]
OF_SPINQUANT = [
    *(s for s in SMALL if not s.startswith("qat")),
    *QUICK,
    "evaluate.models=[bf16,spinquant,spinquant.pte]",
    "spinquant.calibration.0.num_samples=8",
    "spinquant.num_selection=4",
    "spinquant.batch_size=4",
    "spinquant.polish_steps=2",
    "spinquant.candidates=[none,r4]",
]
CHAIN = ["base", "qat", "qat_lora", "reference", "qat_dpo", "convert", "export", "evaluate", "files", "report"]
SPINQUANT = [
    "base",
    "calibrate",
    "candidate_none",
    "candidate_r4",
    "spinquant",
    "export",
    "evaluate",
    "files",
    "report",
]


@dataclass(frozen=True)
class Life:
    """A kind of run: its command, its stages, and what has to be equal in the end."""

    words: tuple[str, ...]
    settings: tuple[str, ...]
    stages: tuple[str, ...]
    result: str


LIVES = {
    "chain": Life(("qat_lora_dpo", "--config", "tiny"), tuple(OF_CHAIN), tuple(CHAIN), "convert"),
    "two ranks": Life(
        ("--nproc_per_node", "2", "qat_lora_dpo", "--config", "tiny"), tuple(OF_CHAIN), tuple(CHAIN), "convert"
    ),
    "spinquant": Life(("spinquant", "--config", "tiny_spinquant"), tuple(OF_SPINQUANT), tuple(SPINQUANT), "spinquant"),
    "qat": Life(("qat", "--config", "tiny"), tuple(OF_CHAIN), ("base", "qat"), "qat"),
}


@dataclass
class Fault:
    """What went wrong, and what came of it."""

    kind: str
    life: str
    stage: str
    status: int | None = None
    said: str = ""
    over: bool = False
    """Whether the run came to its end all the same, or before anything could go wrong."""

    @property
    def traceback(self) -> bool:
        """Tell whether the command ended with a traceback."""
        return "Traceback (most recent call last)" in self.said


@dataclass
class Tally:
    """What the campaign found."""

    faults: list[Fault] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return a row for each kind of fault."""
        lines = ["| fault | times | in stages | exit statuses | tracebacks |", "| --- | ---: | --- | --- | ---: |"]
        for kind in KINDS:
            of_kind = [f for f in self.faults if f.kind == kind]
            if of_kind:
                stages = ", ".join(sorted({f.stage for f in of_kind}))
                statuses = ", ".join(f"{s}" for s in sorted({f.status for f in of_kind if f.status is not None}))
                lines.append(
                    f"| {kind} | {len(of_kind)} | {stages} | {statuses} | {sum(f.traceback for f in of_kind)} |"
                )
        return "\n".join(lines)


# --- one command -----------------------------------------------------------------------------------------------------


class Command:
    """A `tune run` in a session of its own, with what it says in a file."""

    def __init__(self, life: Life, folder: Path, *more: str, **environment: str):
        self.said = folder.parents[1] / "said"  # not on the disk that is filled
        command = [str(Path(sys.executable).parent / "tune"), "run", *life.words]
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *life.settings, f"output_dir={folder}", *more],
                env=os.environ | own | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def end(self, seconds: float = PATIENCE) -> int | None:
        """Wait for the exit status; None if it hangs, and then all its processes are killed."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        self.kill_all()
        return status

    def kill_all(self) -> None:
        """Kill every process of the session that is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[int]:
        """Return the processes that compute: torchrun's ranks, or the command itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return [p.pid for p in children if "llamaq.launch" in " ".join(p.cmdline())] or [self.process.pid]
        return [self.process.pid]


def wait_for(reached: Callable[[], bool], command: Command) -> bool:
    """Wait until `reached()` is true; False if the command ends before."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if command.process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- the faults ------------------------------------------------------------------------------------------------------

# put in front of a run: its clock is off by what the file says
CLOCK = """
import os, time
_now, _now_ns, _file = time.time, time.time_ns, os.environ["FAULT_CLOCK"]
def _off():
    try:
        return float(open(_file).read() or 0)
    except (OSError, ValueError):
        return 0.0
time.time = lambda: _now() + _off()
time.time_ns = lambda: _now_ns() + int(_off() * 1e9)
"""


def signalled(kind: str, command: Command, rng: random.Random) -> None:
    """Send the signal to the command, to one rank, or, if nothing may survive, to all processes."""
    signum = signal.Signals[kind]
    whom = rng.choice(["command", "rank", "all"])
    with contextlib.suppress(ProcessLookupError):
        if whom == "all" and signum == signal.SIGKILL:
            os.killpg(command.process.pid, signum)
        else:
            os.kill(command.process.pid if whom != "rank" else rng.choice(command.ranks()), signum)


def fill(folder: Path) -> Path:
    """Fill the file system of a folder to its last byte; return the file that does."""
    filler = folder.parent / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
            file.flush()
    return filler


@contextlib.contextmanager
def started(kind: str, life: Life, folder: Path) -> Iterator[tuple[Command, Server | None, Path]]:
    """Start a command as a kind of fault needs it: with a W&B server, or with a clock that can be set."""
    clock = folder.parents[1] / "clock"
    clock.mkdir(exist_ok=True)
    (clock / "sitecustomize.py").write_text(CLOCK)
    (clock / "off").write_text("0")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving()) if kind == "W&B gone" else None
        if server is not None:
            given = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
            command = Command(life, folder, "wandb.mode=online", **given)
        elif kind == "clock jump":
            path = os.pathsep.join(p for p in (str(clock), os.environ.get("PYTHONPATH")) if p)
            command = Command(life, folder, PYTHONPATH=path, FAULT_CLOCK=str(clock / "off"))
        else:
            command = Command(life, folder)
        try:
            yield command, server, clock / "off"
        finally:
            command.kill_all()


def attempt(kind: str, name: str, folder: Path, rng: random.Random) -> Fault:
    """Run the command once, let one thing go wrong, and return what came of it."""
    life = LIVES[name]
    left = [s for s in life.stages if not (folder / s / MANIFEST).is_file()] or [life.stages[-1]]
    fault, delay = Fault(kind, name, rng.choice(left)), rng.uniform(0, 3)
    with started(kind, life, folder) as (command, server, clock):
        partial = folder / f"{fault.stage}.partial"
        # an earlier attempt may have left it: the first line is printed when the run is opened
        reached = wait_for(lambda: partial.exists() and command.said.stat().st_size > 0, command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(delay)
        fault.over = not reached or command.process.poll() is not None
        filler = None
        if fault.over:
            pass
        elif kind == "disk full":
            filler = fill(folder)
        elif server is not None:
            server.shutdown()
            server.socket.close()
        elif kind == "clock jump":
            clock.write_text(str(rng.choice([-86400, 86400])))
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.process.wait(rng.uniform(0, 2))
            signalled("SIGTERM", command, rng)
        else:
            signalled(kind, command, rng)
        fault.status = command.end()
        if filler is not None:
            filler.unlink()
    fault.said = command.said.read_text(errors="replace")
    return fault


# --- the campaign ----------------------------------------------------------------------------------------------------


def result_of(life: Life, folder: Path) -> dict[str, str]:
    """Return the hashes of what a run converted: codes, scales, adapters, params.json and the tokenizer."""
    files = sorted(p for p in (folder / life.result).rglob("*") if p.is_file())
    kept = [p for p in files if p.suffix in (".pth", ".safetensors", ".json", ".model") and p.name != MANIFEST]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Let a folder be a small file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if wanted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if wanted:
            subprocess.run(["umount", str(folder)], check=True)


def live(
    name: str, folder: Path, kinds: list[str], rng: random.Random, tally: Tally, show: Callable[[str], None]
) -> bool:
    """Live one life with these faults, one an attempt, and then to its end; tell whether it came to its end."""
    for kind in kinds:
        fault = attempt(kind, name, folder, rng)
        if not fault.over:
            tally.faults.append(fault)
            show(f"{name}: {kind} in {fault.stage}, exit status {fault.status}{', traceback' * fault.traceback}")
        if fault.status is None or (fault.over and fault.status != 0):
            tally.lost.append(f"{name} after {kind} in {fault.stage}: status {fault.status}\n{fault.said[-2000:]}")
            return False
        if fault.status == 0:
            return True
    command = Command(LIVES[name], folder)
    if command.end() == 0:
        return True
    tally.lost.append(f"{name}, left alone: status {command.process.returncode}\n{command.said.read_text()[-2000:]}")
    return False


def campaign(a: argparse.Namespace, show: Callable[[str], None]) -> Tally:
    """Live as many lives as the faults take."""
    rng, tally, expected, number = random.Random(a.seed), Tally(), {}, 0
    while len(tally.faults) < a.kills and not tally.lost:
        name = a.lives[number % len(a.lives)]
        if name not in expected:
            whole = a.folder / f"whole_{name.replace(' ', '_')}" / "disk" / "run"
            whole.parent.mkdir(parents=True, exist_ok=True)
            if Command(LIVES[name], whole).end() != 0:
                sys.exit(f"the undisturbed {name} failed: {whole.parents[1]}/said")
            expected[name] = result_of(LIVES[name], whole)
            assert expected[name], f"{name} left nothing to compare"
        home = a.folder / f"life_{number:02d}"
        kinds = [rng.choice(a.kinds) for _ in range(min(FAULTS_A_LIFE, a.kills - len(tally.faults)))]
        with small_disk(home / "disk", "disk full" in kinds):
            if live(name, home / "disk" / "run", kinds, rng, tally, show):
                found = result_of(LIVES[name], home / "disk" / "run")
                if found != expected[name]:
                    wrong = sorted(k for k in expected[name] if found.get(k) != expected[name][k])
                    tally.different.append(f"{name}: {', '.join(wrong)}")
        if not tally.lost and not tally.different:
            shutil.rmtree(home)
        number += 1
    return tally


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder; what failed is kept there")
    parser.add_argument("--kills", type=int, default=60, help="faults in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lives", nargs="+", choices=LIVES, default=["chain", "spinquant", "two ranks"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    a = parser.parse_args()
    if os.geteuid() != 0 and "disk full" in a.kinds:
        print("no root, so no disk is filled", file=sys.stderr)
        a.kinds.remove("disk full")
    tally = campaign(a, lambda text: print(text, file=sys.stderr, flush=True))
    print(tally.table())
    print(f"\n{len(tally.faults)} faults, {len(tally.lost)} runs lost, {len(tally.different)} with other codes")
    for problem in (*tally.lost, *tally.different):
        print(f"\n{problem}")
    sys.exit(bool(tally.lost or tally.different))


if __name__ == "__main__":
    main()
