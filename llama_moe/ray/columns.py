"""Columns of a batch in each form that Ray Data gives it: a dict of numpy arrays, a pandas DataFrame or a pyarrow Table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from llama_moe.errors import InvalidOptionError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa

Batch: TypeAlias = Union["Mapping[str, npt.NDArray[np.generic]]", "pd.DataFrame", "pa.Table"]


def column_of(batch: Batch, name: str) -> list[Any]:
    """The values of a column as Python's own: str, numbers, lists and dicts.

    Raises:
        InvalidOptionError: the batch has no such column.
        TypeError: it is no batch.
    """
    import pandas as pd
    import pyarrow as pa

    if isinstance(batch, pa.Table):
        names = batch.column_names
    elif isinstance(batch, pd.DataFrame | Mapping):
        names = list(batch)
    else:
        raise TypeError(f"a batch must be a dict of numpy arrays, a pandas.DataFrame or a pyarrow.Table, not {batch!r}")
    if name not in names:
        raise InvalidOptionError(f"the dataset has no column {name!r}; it has {', '.join(map(repr, names)) or 'none'}")
    column: Any = batch[name]
    return [plain(value) for value in (column.to_pylist() if isinstance(batch, pa.Table) else column)]


def plain(value: Any) -> Any:
    """The value without types of numpy and pandas; a missing one as None, and not in a dict.

    Arrow gives every dict of a column the keys of all of them.
    """
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        entries = {key: plain(item) for key, item in value.items()}
        return {key: item for key, item in entries.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value


def with_columns(batch: Batch, columns: Mapping[str, pa.Array]) -> Batch:
    """The batch with these columns, which replace those of the same name. Numpy arrays become a Table, whose columns keep their types."""
    import pandas as pd

    if isinstance(batch, Mapping):
        from ray.data.block import BlockAccessor

        batch = BlockAccessor.batch_to_block(batch)  # pandas where Arrow has no type for a column
    if isinstance(batch, pd.DataFrame):
        # pandas' own types would make an integer column with gaps one of floats, and know nothing of lists.
        series = {name: pd.Series(pd.array(array, dtype=pd.ArrowDtype(array.type)), index=batch.index) for name, array in columns.items()}
        return batch.assign(**series)
    table: pa.Table = batch
    for name, array in columns.items():
        position = table.schema.get_field_index(name)
        table = table.append_column(name, array) if position < 0 else table.set_column(position, name, array)
    return table
