"""Names, dtypes and shapes of the tensors in a weight file, from its header: no weight is read, no code is run."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaq.errors import UserError

LARGEST_HEADER = 100 * 2**20  # bytes; the safetensors library refuses longer ones


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it."""

    dtype: str  # F32, F16, BF16, F64, or another one that is no float weight
    shape: tuple[int, ...]
    crc: int | None = None  # checksum of its bytes, where the format has one


FLOATS = {"F64", "F32", "F16", "BF16"}
# names of torch's storages
STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}


def read_header(path: Path) -> dict[str, Entry] | None:
    """Return the tensors in a weight file by name; None for a file of torch whose header does not tell.

    Raises:
        UserError: the file is torn.
    """
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); is the file whole?") from e


# --- safetensors -----------------------------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, Entry]:
    """Read 8 bytes with the header's length, and the header, which is JSON."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise UserError(f"{path} cannot be read (it has {size} bytes, less than its header); is the file whole?")
        try:
            header = {k: v for k, v in json.loads(f.read(length)).items() if k != "__metadata__"}
            end = max([0, *(v["data_offsets"][1] for v in header.values())])
            found = {k: Entry(v["dtype"], tuple(v["shape"])) for k, v in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"{path} cannot be read (its header is damaged); is the file whole?") from e
    if 8 + length + end != size:
        raise UserError(f"{path} cannot be read (it has {size} bytes of {8 + length + end}); is the file whole?")
    return found


# --- torch -----------------------------------------------------------------------------------------------------------


def _torch(path: Path) -> dict[str, Entry] | None:
    """Unpickle the names and shapes; what the pickle would call is replaced by functions that make an `Entry`."""
    if not zipfile.is_zipfile(path):
        return None  # torn, or of torch before 1.6: torch itself will tell
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
        if "data.pkl" not in records:
            return None
        checksums = {name.removeprefix("data/"): info.CRC for name, info in records.items()}
        data = archive.read(records["data.pkl"])
    try:
        found = _Reader(data, checksums).load()
    except Exception:  # the pickle holds something that is no tensor; loading it says what
        return None
    found = nested(found)
    whole = isinstance(found, dict) and all(isinstance(v, Entry) for v in found.values())
    return {str(k): v for k, v in found.items()} if whole else None


def nested(loaded: Any) -> Any:
    """Return the state dict in what training tools save: below `model` or `state_dict`, or the thing itself."""
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            return loaded[key]
    return loaded


class _Reader(pickle.Unpickler):
    """Reads torch's pickles without torch: a storage is its dtype and checksum, a tensor an `Entry`."""

    def __init__(self, data: bytes, checksums: dict[str, int]):
        super().__init__(io.BytesIO(data))
        self._checksums = checksums

    def persistent_load(self, pid: Any) -> tuple[str, int | None]:
        """Return dtype and checksum of a storage."""
        _, kind, key, *_ = pid
        return STORAGES.get(kind, str(kind).removesuffix("Storage").lower()), self._checksums.get(key)

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return a stand-in for what torch's pickles name.

        Raises:
            UnpicklingError: it is anything else.
        """
        if module_name == "collections" and global_name == "OrderedDict":
            return dict
        if module_name.startswith("torch") and global_name.endswith("Storage"):
            return global_name
        if (module_name, global_name) in STAND_INS:
            return STAND_INS[module_name, global_name]
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


def _tensor(storage: tuple[str, int | None], offset: int, size: tuple[int, ...], *_: Any) -> Entry:
    dtype, crc = storage
    return Entry(dtype, tuple(size), crc if offset == 0 else None)


def _parameter(data: Entry, *_: Any) -> Entry:
    return data


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
