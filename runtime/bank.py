"""What readers need of a memory bank, wherever its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Bank"]


class Bank(Protocol):
    """A memory bank: `MemoryBank` on the host, `DeviceMemoryBank` on a device. See the former for every attribute."""

    @property
    def length(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def groups(self) -> int: ...

    @property
    def features(self) -> Any: ...

    @property
    def riders(self) -> Mapping[str, Any]: ...

    @property
    def sizes(self) -> npt.NDArray[np.float64]: ...

    @property
    def first_s(self) -> npt.NDArray[np.float64]: ...

    @property
    def last_s(self) -> npt.NDArray[np.float64]: ...

    @property
    def last_merge(self) -> npt.NDArray[np.int32]: ...

    @property
    def frames_seen(self) -> int: ...

    @property
    def used(self) -> int: ...

    @property
    def visible(self) -> npt.NDArray[np.bool_]: ...

    @property
    def order(self) -> npt.NDArray[np.int32]: ...

    @property
    def rank_of_slot(self) -> npt.NDArray[np.int32]: ...

    @property
    def nbytes(self) -> int: ...

    def in_time_order(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]: ...

    def reset(self) -> None: ...

    def settle(self, pair: npt.ArrayLike | None = None) -> None: ...

    def state(self, *, riders: bool = True) -> dict[str, npt.NDArray[Any]]: ...

    def check_state(self, state: Mapping[str, npt.NDArray[Any]], *, riders: bool = True) -> None: ...

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None: ...

    def append(self, features: Any, *, time_s: float, riders: Mapping[str, Any] | None = None) -> None: ...
