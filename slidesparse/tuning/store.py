"""`winners.json`: the best algorithm of every operation and size on this machine, and the look-up.

An entry counts only under the library versions that it was measured with. Look-ups that find nothing, something
near, or only entries of other versions are counted: `summary()` goes into every row that rests on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path

from slidesparse import files
from slidesparse.dtypes import DType
from slidesparse.errors import RecordError
from slidesparse.kernels.backend import own_revision
from slidesparse.kernels.gemm_library import loaded_versions
from slidesparse.machine import package_versions
from slidesparse.pattern import Sparsity
from slidesparse.plan import fingerprint

FORMAT = 1
KERNEL_PACKAGES = (
    "torch", "numpy", "numba", "triton", "nvidia-cublas", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13",
)  # fmt: skip
"""Packages whose version can change which algorithm wins."""


Key = tuple[str, str, str, str, int, int, int]
"""Operation, family, dtype, sparsity, M, N, K."""


def kernel_versions() -> dict[str, str]:
    """Versions here of the packages that run kernels, and of the GPU libraries that are really loaded."""
    packages = {name: version for name, version in package_versions().items() if name in KERNEL_PACKAGES}
    return packages | loaded_versions()


@dataclass(frozen=True)
class Winner:
    """The best algorithm of one operation at one size. `k` is the unlifted K; sizes that do not matter are 0."""

    operation: str
    family: str
    """Backend of a GEMM, or the name of its activation kernels, which dense and sparse backends share."""
    dtype: str
    sparsity: str
    m: int
    n: int
    k: int
    algorithm: str
    alg_id: int
    lat_us: float
    versions: dict[str, str]
    run_id: str
    time_utc: str

    @property
    def key(self) -> Key:
        return self.operation, self.family, self.dtype, self.sparsity, self.m, self.n, self.k


class TuningStore:
    """All winners of one machine. Writing is atomic; one run at a time owns the result folder."""

    def __init__(self, path: Path, winners: Iterable[Winner] = (), versions: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._winners = {winner.key: winner for winner in winners}
        self._versions = dict(kernel_versions() if versions is None else versions)
        self.counts: Counter[str] = Counter()

    @property
    def path(self) -> Path:
        """Where it lies, or will lie once it is saved."""
        return self._path

    @classmethod
    def open(cls, path: Path, versions: Mapping[str, str] | None = None) -> TuningStore:
        """Read a store; empty where there is no file. `versions`: those here unless given.

        Raises:
            RecordError: the file is no tuning store of this format.
        """
        if not path.exists():
            return cls(path, versions=versions)
        data = files.read_json(path)
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, expected {FORMAT}")
            winners = [Winner(**entry) for entry in data["winners"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{path}: not a tuning store ({error}); move it aside and tune again") from None
        return cls(path, winners, versions)

    def put(self, winner: Winner) -> None:
        """Add or replace one entry; `save` writes it."""
        self._winners[winner.key] = winner

    def take(self, other: TuningStore) -> bool:
        """Add the entries of another store; of two with the same key the later one stays. False if nothing changed."""
        before = dict(self._winners)
        for key, winner in other._winners.items():
            if key not in before or before[key].time_utc < winner.time_utc:
                self._winners[key] = winner
        return self._winners != before

    def save(self) -> None:
        """Write the file whole. Raises DiskError."""
        winners = [asdict(winner) for winner in self._winners.values()]
        files.write_json(self._path, {"format": FORMAT, "winners": winners})

    def holds(self, winner_key: Key) -> bool:
        """Is there an entry of exactly this key, of the versions here?"""
        winner = self._winners.get(winner_key)
        return winner is not None and winner.versions == self.versions(winner.family)

    def versions(self, family: str) -> dict[str, str]:
        """The versions that entries of a family count under; of our own kernels their source is one."""
        revision = own_revision(family)
        return self._versions | ({"kernels": revision} if revision else {})

    def find(
        self,
        operation: str,
        family: str,
        dtype: DType,
        sparsity: Sparsity | None,
        size: tuple[int, int, int],
        candidates: Collection[str],
    ) -> str | None:
        """Name of the winner at (M, N, K), or of the nearest size with the same K; None when there is none.

        Near means: smallest |log2| ratio of M and N together (an engine that keeps q, k and v apart asks for
        values of N that were tuned merged). Counts `hits`, `nearest`, `missed` (nothing known), `stale` (all that is
        known is of other library versions, or names algorithms that are not among the candidates).
        """
        m, n, k = size
        wanted = (operation, family, dtype.value, "" if sparsity is None else str(sparsity))
        known = [winner for winner in self._winners.values() if winner.key[:4] == wanted and winner.k == k]
        versions = self.versions(family)
        fresh = [winner for winner in known if winner.versions == versions and winner.algorithm in candidates]
        if not fresh:
            self.counts["stale" if known else "missed"] += 1
            return None
        best = min(fresh, key=lambda winner: (_distance(winner, m, n), winner.m, winner.n))
        self.counts["hits" if (best.m, best.n) == (m, n) else "nearest"] += 1
        return best.algorithm

    def summary(self) -> str:
        """`hits 8, nearest 2, missed 0, stale 0` since the last `reset`."""
        return ", ".join(f"{name} {self.counts[name]}" for name in ("hits", "nearest", "missed", "stale"))

    def reset(self) -> None:
        """Count anew."""
        self.counts.clear()

    @property
    def families(self) -> set[str]:
        """Backends and kinds of activation kernels that have entries."""
        return {winner.family for winner in self._winners.values()}

    def digest(self, families: Collection[str], dtype: DType) -> str:
        """Hash over every entry that a variant could use, without timings: a new winner means a new measurement."""
        entries = sorted(
            (*winner.key, winner.algorithm, sorted(winner.versions.items()))
            for winner in self._winners.values()
            if winner.family in families and winner.dtype == dtype.value
        )
        return fingerprint(*entries)

    def __len__(self) -> int:
        return len(self._winners)


def _distance(winner: Winner, m: int, n: int) -> float:
    return abs(log2(max(winner.m, 1) / max(m, 1))) + abs(log2(max(winner.n, 1) / max(n, 1)))
