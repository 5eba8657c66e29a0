"""What is changed in ExecuTorch's exporter: an error while the file is written ends the export."""

import errno
from pathlib import Path

import pytest

from llamaq.errors import UserError
from llamaq.export.patches import errors_of_writing
from llamaq.runs.files import naming_full_disk


class Program:
    """Stands for an exported program of a size that /dev/full does not take."""

    def write_to_file(self, file) -> None:
        file.write(b"x" * 2**20)

    def write_tensor_data_to_file(self, outdir: str) -> None:
        pass


def test_a_full_disk_ends_the_export_and_leaves_no_half_of_the_file(tmp_path):
    from executorch.extension.llm.export import builder

    theirs = builder.save_pte_program
    (tmp_path / "model.pte").symlink_to("/dev/full")
    with errors_of_writing():
        with pytest.raises(OSError) as e:
            builder.save_pte_program(Program(), "model", str(tmp_path))  # pyright: ignore[reportArgumentType]
        assert e.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
        written = builder.save_pte_program(Program(), f"{tmp_path}/whole.pte")  # pyright: ignore[reportArgumentType]
        assert Path(written).stat().st_size == 2**20
    assert builder.save_pte_program is theirs
    (tmp_path / "model.pte").symlink_to("/dev/full")
    refused = pytest.raises(UserError, match=r"no space left while writing .*model\.pte; nothing finished is lost")
    with refused, errors_of_writing(), naming_full_disk(str(tmp_path / "model.pte")):
        builder.save_pte_program(Program(), "model", str(tmp_path))  # pyright: ignore[reportArgumentType]
