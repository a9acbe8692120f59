"""Every vector's change as a Parquet file: filled matrix by matrix while it is measured, read in parts.

A row group of the file is a matrix, so that neither needs more memory than a matrix's vectors take.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdanalysis.errors import OutputError
from wdanalysis.measure.vectors import MatrixVectors
from wdanalysis.writing import encodable, first_line, plain_errors, write_whole

if TYPE_CHECKING:
    import pandas as pd

VECTORS_PARQUET = "vectors.parquet"
VECTOR_COLUMNS = ("method", "step", "layer", "module", "name", "vector", "rel_delta_m", "delta_d", "run")
"""The columns of `Vectors.read`."""

_OF_ROW = ("method", "run", "step", "name", "module")
"""What tells the rows of the metrics table from each other."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """What tuning did to every vector; read from its file when it is asked for.

    Attributes
    ----------
    path
        The Parquet file.

    Examples
    --------
    >>> compared = wd.compare("sample_checkpoints/base", "sample_checkpoints/dora", modules=["q"], vectors=True)
    >>> compared.vectors.read(step=240, layer=0)[["vector", "rel_delta_m", "delta_d"]].round(3).head(2)
       vector  rel_delta_m  delta_d
    0       0        0.028    0.017
    1       1        0.027    0.293
    """

    path: Path
    _owner: object = field(
        default=None, repr=False
    )  # a temporary folder, which goes when nobody needs the file

    def read(
        self,
        method: str | None = None,
        *,
        step: int | None = None,
        module: str | None = None,
        layer: int | None = None,
        run: str | None = None,
    ) -> pd.DataFrame:
        """Read the vectors of a method, a run, a step, a module, a layer, or of several of these; by default all.

        Returns
        -------
        DataFrame
            `VECTOR_COLUMNS`: the row of the metrics table that a vector belongs to, its index in the matrix,
            (m − m₀)/m₀ (empty where m₀ is 0) and 1 − cos.

        Raises
        ------
        OutputError
            The file is gone or no longer whole.
        """
        import pandas as pd

        wanted = {"method": method, "run": run, "step": step, "module": module, "layer": layer}
        filters = [(column, "==", value) for column, value in wanted.items() if value is not None]
        try:
            table = pd.read_parquet(self.path, filters=filters or None)
        except (OSError, ValueError) as error:
            raise OutputError(f"the vectors in {self.path} cannot be read ({first_line(error)}).") from error
        return table.astype({"step": "Int64", "layer": "Int64"})

    def save(self, directory: Path, metrics: pd.DataFrame) -> Path:
        """Write the vectors of the metrics table's rows into a folder; the file appears whole or not at all."""
        import pyarrow.parquet as pq

        kept = {_key(row) for row in metrics[list(_OF_ROW)].to_dict("records")}

        def fill(file: Any) -> None:
            with pq.ParquetFile(self.path) as source, _writer(file, source.schema_arrow) as target:
                for index in range(source.num_row_groups):
                    matrix = source.read_row_group(index)
                    first = matrix.slice(0, 1).to_pylist()
                    if first and _key(first[0]) in kept:
                        target.write_table(matrix)

        return write_whole(directory / VECTORS_PARQUET, fill)


class VectorsFile:
    """A file in a temporary folder that vectors are added to, matrix by matrix; a context manager.

    Raises
    ------
    OutputError
        The temporary folder is full, or may not be written.
    """

    def __init__(self) -> None:
        import pyarrow as pa

        self._open = ExitStack()
        names = pa.dictionary(pa.int32(), pa.string())
        kinds = (names, pa.int64(), pa.int64(), names, names, pa.int32(), pa.float32(), pa.float32(), names)
        self._schema = pa.schema(list(zip(VECTOR_COLUMNS, kinds, strict=True)))

    def __enter__(self) -> VectorsFile:
        with plain_errors(Path(tempfile.gettempdir()), "vectors"):
            # goes with its last reader, or with the process
            self._folder = tempfile.TemporaryDirectory(prefix="wd-analysis-", ignore_cleanup_errors=True)
            self._path = Path(self._folder.name) / VECTORS_PARQUET
            self._writer = self._open.enter_context(_writer(self._path, self._schema))
        return self

    def __exit__(self, *error: object) -> None:
        with plain_errors(self._path.parent, "vectors"):
            self._open.close()

    def add(self, vectors: MatrixVectors) -> None:
        """Write the vectors of one matrix."""
        import pyarrow as pa

        count = len(vectors.delta_d)
        of_each = {
            "vector": pa.array(range(count), pa.int32()),
            "rel_delta_m": pa.array(vectors.rel_delta_m, from_pandas=True),
            "delta_d": pa.array(vectors.delta_d),
        }
        columns = [
            of_each[field.name]
            if field.name in of_each
            else _repeated(encodable(getattr(vectors, field.name)), count, field.type)
            for field in self._schema
        ]
        with plain_errors(self._path.parent, "vectors"):
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=max(count, 1))

    @property
    def vectors(self) -> Vectors:
        """What was added; once the file is closed."""
        return Vectors(self._path, self._folder)


def _writer(file: Any, schema: Any) -> Any:
    """A writer that packs what repeats and what counts up; the numbers themselves have nothing to pack."""
    import pyarrow.parquet as pq

    texts = ["method", "run", "name", "module", "step", "layer"]
    return pq.ParquetWriter(
        file, schema, use_dictionary=texts, column_encoding={"vector": "DELTA_BINARY_PACKED"}
    )


def _repeated(value: object, count: int, kind: Any) -> Any:
    """Make a column of one value."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))
    return pa.array(list(itertools.repeat(value, count)), kind)


def _key(row: dict[Any, Any]) -> tuple[Any, ...]:
    import pandas as pd

    step = row["step"]
    is_known = step is not None and not pd.isna(step)
    return (row["method"], row["run"], int(step) if is_known else None, row["name"], row["module"])
